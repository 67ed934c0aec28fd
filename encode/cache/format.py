"""The cache on disk: what lies where, and what makes it trustworthy.

    CACHE/
      manifest.json       what was encoded, with what, how; checksums of the small files
      samples.parquet     one row per sample of the dataset
      data.zarr/          the numbers: original, edited, text, and for SDXL pooled
      commits/            one record per finished shard

Latents are stored **raw**: unscaled, not normalized. Training multiplies by the VAE's scaling factor, once, in
`train/objective.py`.

A *unit* is what is written at once: the shard number `shard` of every array of one kind. There are two kinds: the
images of one view (`original`, `edited`) and the texts (`text`, `pooled`). A unit is there when its commit record is
there, and the record is written after the data is safe on disk. The record names the content of each row, so the
records alone say what is cached; `samples.parquet` says which samples the dataset consists of now.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from ..base.errors import CacheError
from ..base.files import file_record, read_record, whole

Cells = TypeVar("Cells", bound=Any)  # an array of numpy or a tensor
FORMAT = 2
READABLE = (1, FORMAT)
SHARD_BYTES = 32 * 2**20
SHARD_ROWS = 1024
CHUNK_ROWS = {"images": 64, "text": 16}
PAGE = 4096  # a shard is a whole number of pages, so that shards can be mapped side by side
TEXT_ALONE = "instructions alone"  # what the encoding says of a cache that holds none embedded
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
        ("crop_top", pa.list_(pa.int32())),  # in each view, of the square in the resized original
        ("crop_left", pa.list_(pa.int32())),
        ("flip", pa.bool_()),  # whether training may show it flipped
        ("status", pa.string()),  # ok, pending, quarantined
        ("reason", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """What is written at once: shard number `shard` of the images of one view, or of the texts."""

    kind: str
    shard: int
    view: int = 0

    @property
    def name(self) -> str:
        return f"text-{self.shard:06d}" if self.kind == "text" else f"images-v{self.view}-{self.shard:06d}"


Record = Mapping[str, Any]
"""What a record says; a commit record, of its unit: key, sizes, and reason of each row, and checksums of the files."""
RowShapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""The shape of one row of each array, by kind and name."""


def row_shapes(channels: int, cells: tuple[int, ...], tokens: int, width: int, pooled: int | None) -> RowShapes:
    """Shapes of latents (channels, *cells), and of instructions (tokens, width) with, for SDXL, (pooled,).

    `cells` is height and width where all latents have one shape, else the largest number of them: see `shaped`.
    """
    images = {"original": (channels, *cells), "edited": (2 * channels, *cells)}
    return {"images": images, "text": {"text": (tokens, width)} | ({"pooled": (pooled,)} if pooled else {})}


def shaped(cells: Cells, height: int, width: int) -> Cells:
    """Latents (..., height, width) out of rows that have room for the largest shape, zeros after them; a view."""
    return cells[..., : height * width].reshape(*cells.shape[:-1], height, width)


def shard_rows(kind: str, row_shapes: Iterable[tuple[int, ...]]) -> tuple[int, int]:
    """Rows of a shard and of the chunks inside, for arrays of float16 rows that are written together.

    At most `SHARD_ROWS` rows and `SHARD_BYTES` bytes; whole chunks, and whole pages if that can be had.
    """
    sizes = [2 * math.prod(shape) for shape in row_shapes]
    fit = max(1, min(SHARD_ROWS, SHARD_BYTES // max(sizes)))
    chunk = min(CHUNK_ROWS[kind], fit)
    step = math.lcm(chunk, *(PAGE // math.gcd(PAGE, size) for size in sizes))
    if step > fit:
        step = chunk
    return fit // step * step, chunk


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
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """Open for reading; a `CacheError` where none is, it is damaged, or its format is of another version."""
        if not (folder / "manifest.json").is_file():
            raise CacheError(f"{folder} is not a cache: it has no manifest.json (make one with ip2p-encode --cache)")
        manifest = read_record(folder / "manifest.json")
        if (found := manifest.get("format")) not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise CacheError(f"{folder} has cache format {found}, this version of ip2p reads {known}: encode anew")
        return cls(folder, manifest)

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
        """Whether it holds each instruction embedded, or the empty one alone."""
        return holds_text(self.manifest)

    @property
    def shard_rows(self) -> dict[str, int]:
        """Rows of one shard, by kind."""
        return self.manifest["shard_rows"]

    def arrays(self, kind: str, mode: Literal["r", "r+"] = "r") -> dict[str, zarr.Array]:
        """The Zarr arrays of one kind, by name."""
        group = zarr.open_group(self.folder / "data.zarr", mode=mode)
        names = ("original", "edited") if kind == "images" else ("text", "pooled")
        return {name: array for name in names if isinstance(array := group.get(name), zarr.Array)}

    def latents(self, sample: Record) -> dict[str, np.ndarray]:
        """What is cached of a sample of the table, by array, (views, channels, h, w)."""
        rows = {name: (array.ndim, np.asarray(array[sample["row"]])) for name, array in self.arrays("images").items()}
        shape = [sample[side] // self.factor for side in ("height", "width")]
        return {name: shaped(row, *shape) if dimensions == 4 else row for name, (dimensions, row) in rows.items()}

    def samples(self, *, kept: bool = True) -> pa.Table:
        """The table of samples as it lies on the disk; `check_files` says whether that is what was written.

        Last stand the columns that are `kept` of the dataset, if they are wanted: whoever writes the table needs them.
        """
        file = self.folder / "samples.parquet"
        more = [field.remove_metadata() for field in pq.read_schema(file) if field.name not in SAMPLES.names]
        return pq.read_table(file, schema=pa.schema([*SAMPLES, *more]) if kept else SAMPLES)

    def shard_path(self, array: str, unit: Unit, dimensions: int) -> str:
        """Path of a shard inside the cache folder, as Zarr names it."""
        lead = [unit.shard, unit.view] if unit.kind == "images" else [unit.shard]
        return "/".join(["data.zarr", array, "c", *map(str, lead + [0] * (dimensions - len(lead)))])

    def commits(self) -> dict[Unit, dict[str, Any]]:
        """All commit records, each checked against its own checksum; a `CacheError` where that differs."""
        records = (read_record(path) for path in sorted((self.folder / "commits").glob("*.json")))
        return {Unit(record["kind"], record["shard"], record["view"]): record for record in records}

    def check_files(self) -> None:
        """Check the small files against the checksums in the manifest; a `CacheError` names the first that differs."""
        for path, expected in self.manifest["files"].items():
            file = self.folder / path
            if not file.is_file():
                raise CacheError(f"{file} is missing: run the same ip2p-encode again, it restores what can be restored")
            if file_record(file) != expected:
                raise CacheError(f"{file} is damaged or from an interrupted run: run the same ip2p-encode again")


def holds_text(manifest: Record) -> bool:
    """Whether a cache holds each instruction embedded, or the empty one alone."""
    return manifest["encoding"].get("text") != TEXT_ALONE


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


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, complete or not at all."""
    with whole(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
