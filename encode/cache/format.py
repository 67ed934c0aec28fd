"""The cache on disk: what lies where, and what makes it trustworthy.

    CACHE/
      manifest.json       what was encoded, with what, how; checksums of the small files
      samples.parquet     one row per sample of the dataset
      data.zarr/          the numbers: original, edited, maybe mask, text, and for SDXL pooled
      units.parquet       size and checksum of each finished shard, derived from commits/
      commits/            one record per finished unit

Latents are stored **raw**: unscaled, not normalized. Training multiplies by the VAE's scaling factor, once, in
`train/objective.py`.

A unit (`commits.py`) is there when its commit record is there, and the record is written after the data is safe on
disk. The record names the content of each row, so the records alone say what is cached; `samples.parquet` says which
samples the dataset consists of now, and `units.parquet` spares whoever trains the records.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import zarr

from ..base.errors import CacheError
from ..base.files import check_cache, file_record, read_record
from .commits import Commit, Unit, inside, unit_of
from .tables import SAMPLES_FILE, SHARDS_FILE, read_samples, read_shards

FORMAT, READABLE = 2, (1, 2)
SHARD_BYTES, SHARD_ROWS = 32 * 2**20, 1024
LARGE, LARGER = 1_000_000, 8  # from how many samples on shards are how many times as large: fewer files to open
CHUNK_ROWS = {"images": 64, "text": 16}
ARRAYS = {"images": ("original", "edited", "mask"), "text": ("text", "pooled")}
PAGES = 2**16, 2**14, 2**12  # bytes; a shard is some of the largest that goes, so that shards can lie side by side
CONVENTION = "unscaled; original: posterior mean; edited: mean and log variance; pixels 2 * (x / 255) - 1"

SAMPLES = pa.schema(
    [
        ("key", pa.string()),  # identity of the sample: both files and the instruction
        ("pair", pa.string()),  # identity of both image files; equal pairs share a row
        ("position", pa.int64()),  # where the dataset holds it
        ("instruction", pa.string()),
        ("group", pa.string()),  # the prompt that it belongs to, where that is not the instruction
        ("row", pa.int64()),  # in original and edited; -1 if it was never tried
        ("text_row", pa.int64()),  # in text and pooled; -1 if it was never tried
        ("height", pa.int32()),  # of what is encoded, in pixels
        ("width", pa.int32()),
        *[(f"{side}_{what}", pa.int32()) for side in ("original", "edited") for what in ("width", "height")],
        ("crop_top", pa.list_(pa.int32())),  # in each view, of what is encoded in the resized original
        ("crop_left", pa.list_(pa.int32())),
        ("flip", pa.bool_()),  # whether training may show it flipped
        ("status", pa.string()),  # ok, pending, quarantined
        ("reason", pa.string()),
    ]
)
Record = Mapping[str, Any]
"""What a manifest says, or of a file its bytes and crc32c."""


def shard_rows(kind: str, row_shapes: Iterable[tuple[int, ...]], samples: int = 0) -> int:
    """Rows of a shard of a new cache of `samples` samples, for arrays of float16 rows that are written together.

    At most `SHARD_ROWS` rows and `SHARD_BYTES` bytes, in large caches 8 times as many; whole chunks, and whole pages if
    that can be had.
    """
    sizes, times = [2 * math.prod(shape) for shape in row_shapes], LARGER if samples >= LARGE else 1
    fit = max(1, times * min(SHARD_ROWS, SHARD_BYTES // max(sizes)))
    chunk = chunk_rows(kind, fit)
    pages = (math.lcm(chunk, *(page // math.gcd(page, size) for size in sizes)) for page in PAGES)
    step = next((rows for rows in pages if rows <= fit), chunk)
    return fit // step * step


def chunk_rows(kind: str, rows: int) -> int:
    """Rows of a chunk in shards of so many rows."""
    return min(CHUNK_ROWS[kind], rows)


class View(NamedTuple):
    """What is seen of a pair: which of its random crops, if there are any, and whether it is flipped."""

    crop: int | None
    flip: bool

    @classmethod
    def parse(cls, name: str) -> "View":
        """The view called plain, flip, crop0, crop0-flip, ..."""
        crop = name.removesuffix("-flip").removeprefix("crop")
        return cls(int(crop) if crop.isdecimal() else None, name.endswith("flip"))

    @property
    def name(self) -> str:
        if self.crop is None:
            return "flip" if self.flip else "plain"
        return f"crop{self.crop}" + ("-flip" if self.flip else "")


def view_names(crops: int | None, flip: bool) -> list[str]:
    """The views of a pair with some number of random crops, or none, and perhaps their flips."""
    return [View(crop, f).name for f in (False, True)[: 1 + flip] for crop in (range(crops) if crops else [None])]


def joined_views(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """All views of a cache that has `old` ones and is asked for `new` ones; each crop has its flip, or none has."""
    views = [View.parse(name) for name in (*old, *new)]
    crops = max((view.crop + 1 for view in views if view.crop is not None), default=None)
    return list(dict.fromkeys([*old, *view_names(crops, any(view.flip for view in views))]))


class Cache:
    """A cache folder, opened and checked: manifest, samples and commit records agree with what lies on the disk."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest, self.name = folder, manifest, str(folder)

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Open for reading; a `CacheError` where none is, it is damaged, or its format is of another version."""
        check_cache(folder)
        return cls(folder, readable(read_record(folder / "manifest.json"), folder))

    @property
    def views(self) -> list[str]:
        return self.manifest["views"]

    @property
    def factor(self) -> int:
        """Pixels of a side for each cell of a latent; the first format did not say."""
        side = self.manifest["encoding"]["resolution"]
        return self.manifest.get("vae_scale_factor") or side // self.arrays("images")["original"].shape[-1]

    @property
    def holds_text(self) -> bool:
        """Whether each instruction is there embedded, or the empty one alone."""
        return not self.manifest["encoding"].get("text")

    @property
    def shard_rows(self) -> dict[str, int]:
        """Rows of one shard, by kind."""
        return self.manifest["shard_rows"]

    def arrays(self, kind: str, mode: Literal["r", "r+"] = "r") -> dict[str, zarr.Array]:
        """The Zarr arrays of one kind, by name."""
        group = zarr.open_group(self.folder / "data.zarr", mode=mode)
        return {name: array for name in ARRAYS[kind] if isinstance(array := group.get(name), zarr.Array)}

    def samples(self, *columns: str) -> pa.Table:
        """The table of samples, or these columns of it, as it is on the disk; keys are text. It may have others."""
        table = read_samples(self.folder / SAMPLES_FILE, SAMPLES, columns)
        for number, name in enumerate(table.column_names):
            if name in ("height", "width"):  # the first format had squares alone, and did not say
                side = self.manifest["encoding"]["resolution"]
                table = table.set_column(number, name, table[name].fill_null(side))
        return table

    def shard_path(self, array: str, unit: Unit, dimensions: int) -> str:
        """Path of a shard inside the cache folder, as Zarr names it."""
        lead = [unit.shard, unit.view] if unit.kind == "images" else [unit.shard]
        return "/".join(["data.zarr", array, "c", *map(str, lead + [0] * (dimensions - len(lead)))])

    def commits(self) -> dict[Unit, Commit]:
        """All commit records, each checked against its own checksum; a `CacheError` where that differs."""
        found = {}
        for unit in sorted(self.units()):
            record = read_record(path := self.folder / "commits" / f"{unit.name}.json")
            found[Unit(record["kind"], record["shard"], record["view"])] = Commit.of(record, path)
        return found

    def units(self) -> list[Unit]:
        """The units that have a record, by its name alone; whatever else lies there is none."""
        return [unit for path in (self.folder / "commits").glob("*") if (unit := unit_of(f"commits/{path.name}"))]

    def shards(self) -> dict[str, Record]:
        """Size and checksum of each finished shard by its path: from `units.parquet`, in format 1 from the records."""
        if SHARDS_FILE in self.manifest["files"]:
            return read_shards(self.folder / SHARDS_FILE)
        return {path: file for commit in self.commits().values() for path, file in commit.files.items()}

    def check_files(self) -> None:
        """Check the small files against the checksums in the manifest; a `CacheError` names the first that differs."""
        for path, expected in self.manifest["files"].items():
            file = self.folder / path
            if not file.is_file():
                raise CacheError(f"{file} is missing: run the same ip2p-encode again, it restores what can be restored")
            if file_record(file) != expected:
                raise CacheError(f"{file} is damaged or from an interrupted run: run the same ip2p-encode again")

    def is_sound(self) -> bool:
        """Whether `check_files` finds nothing."""
        with contextlib.suppress(CacheError):
            self.check_files()
            return True
        return False


def readable(manifest: dict[str, Any], place: object) -> dict[str, Any]:
    """A manifest that was found somewhere; a `CacheError` where it is of another version, or names strange files."""
    if (found := manifest.get("format")) not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise CacheError(f"{place} has cache format {found}, this version of ip2p reads {known}: encode anew")
    inside(manifest.get("files", {}), f"{place}/manifest.json")
    return manifest


def differences(old: Record, new: Record, parts: Sequence[str], names: tuple[str, str]) -> list[str]:
    """Field by field, where two manifests differ in `parts`; `names` say whose value is whose."""
    fields = ((field, old[part].get(field), new[part].get(field)) for part in parts for field in old[part] | new[part])
    return [f"  {field}: {a} {names[0]}, {b} {names[1]}" for field, a, b in fields if a != b]


def wrong_size(file: Path, expected: Record) -> str | None:
    """How a file differs from the size that was recorded for it."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    return None if size == expected["bytes"] else f"has {size:,} bytes, {expected['bytes']:,} were written"
