"""Commit records: what each unit of a cache holds, row by row, and the files in which it lies.

A *unit* is what is written at once: the shard number `shard` of every array of one kind. There are two kinds: the
images of one view (`original`, `edited`, maybe `mask`) and the texts (`text`, `pooled`).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ..base.errors import CacheError
from ..base.files import write_record

pc: Any = pyarrow.compute  # whose functions are made when it is imported: type checkers know none of them
# Arrow's own allocator keeps what it frees: with it, a plan of a million samples takes 0.1 GiB more, and longer.
pa.set_memory_pool(pa.system_memory_pool())
NOTHING = "-"  # stands in a record for the key of a row that holds nothing
DIGITS = 32  # of a key
SIZES = "original width, height, edited width, height, crop top, left"  # and height, width where shapes are several
RECORD = re.compile(r"(?:images-v(\d+)|text)-(\d{6,})\.json")
LISTED = re.compile(r"(samples|units)\.parquet|data\.zarr/(\w+/)?zarr\.json|data\.zarr/\w+/c(/\d+)+", re.ASCII)
"""The paths that manifests, records and lists of shards name: none leads out of the cache."""


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """What is written at once: shard number `shard` of the images of one view, or of the texts."""

    kind: str
    shard: int
    view: int = 0

    @property
    def name(self) -> str:
        return f"text-{self.shard:06d}" if self.kind == "text" else f"images-v{self.view}-{self.shard:06d}"


def unit_of(path: str) -> Unit | None:
    """The unit that a file belongs to, by its path inside the cache; None if to none."""
    match path.split("/"):
        case ["commits", name] if record := RECORD.fullmatch(name):
            view, shard = record.groups()
            unit = Unit("text" if view is None else "images", int(shard), int(view or 0))
            return unit if name == f"{unit.name}.json" else None
        case ["data.zarr", "original" | "edited" | "mask", "c", shard, view, *_] if (
            shard.isdecimal() and view.isdecimal()
        ):
            return Unit("images", int(shard), int(view))
        case ["data.zarr", "text" | "pooled", "c", shard, *_] if shard.isdecimal():
            return Unit("text", int(shard))
    return None


def inside(files: Mapping[str, Any], name: object) -> None:
    """Make sure that all `files` that something called `name` lists are such as a cache has; else a `CacheError`."""
    if not isinstance(files, Mapping):  # whatever JSON can hold
        raise CacheError(f"{name} lists no files: do not trust what wrote it")
    if strange := next((path for path in files if not LISTED.fullmatch(path)), None):
        raise CacheError(f"{name} names {strange!r}, which is no file of a cache: do not trust what wrote it")


class Commit(NamedTuple):
    """What a unit holds in each of its N rows, and its files."""

    keys: pa.Array  # (N,) text; null where a row holds nothing
    sizes: np.ndarray  # (6 or 8, N) int32, as in `SIZES`; (6, 0) of texts
    quarantined: Mapping[int, str]  # row in the unit to the reason why it holds no numbers
    files: Mapping[str, Any]  # path to bytes and crc32c

    @classmethod
    def of(cls, record: Mapping[str, Any], name: object = "a record") -> "Commit":
        """What a record says, be it of format 1, row by row, or by column; a `CacheError` if it names strange files."""
        inside(record.get("files", {}), name)
        keys, sizes = record["keys"], record["sizes"] or []
        if isinstance(keys, str):
            wide = keys.replace(NOTHING, NOTHING * DIGITS).encode()
            fixed = pa.Array.from_buffers(pa.binary(DIGITS), len(wide) // DIGITS, [None, pa.py_buffer(wide)])
            text = fixed.cast(pa.string())
            held = pc.if_else(pc.starts_with(text, NOTHING), None, text)
        else:
            held = pa.array(keys, pa.string())
            sizes = by_column(sizes)
        columns = np.array(sizes or [()] * 6, np.int32)
        reasons = {int(row): reason for row, reason in record["quarantined"].items()}
        return cls(held, columns, reasons, record.get("files", {}))


def by_column(sizes: Sequence[Sequence[int] | None]) -> list[list[int]]:
    """The sizes of each row turned into lists, one for each kind; of rows that hold nothing they are 0."""
    kinds = max((len(size) for size in sizes if size), default=6)
    return [list(column) for column in zip(*(size or [0] * kinds for size in sizes), strict=True)]


def write_commit(
    folder: Path,
    unit: Unit,
    keys: Sequence[str | None],
    sizes: Sequence[Sequence[int] | None] | None,
    quarantined: Mapping[int, str],
    files: Mapping[str, Any],
) -> None:
    """Write the record that makes a unit exist, by column: that is read in a quarter of the time, without objects.

    Args:
        folder: of the cache.
        keys: of each row, None where it holds nothing.
        sizes: of each row of images, as `Commit` has them, or None where it holds nothing; None for texts.
    """
    content = {"keys": "".join(key or NOTHING for key in keys), "sizes": sizes and by_column(sizes)}
    record = dataclasses.asdict(unit) | content | {"quarantined": quarantined, "files": files}
    write_record(folder / "commits" / f"{unit.name}.json", record, indent=None)


class Held:
    """What the committed units of one kind and view hold, all their rows behind each other.

    Attributes:
        keys: (M,) text, null where a row holds nothing.
        sizes: (6 or 8, M) int32 as `Commit` has them, of images.
        reasons: (M,) text, null where a row is not quarantined.
    """

    def __init__(self, commits: Mapping[int, Commit], shard_rows: int):
        numbers, units = sorted(commits), [commits[number] for number in sorted(commits)]
        ends = np.cumsum([0, *(len(unit.keys) for unit in units)])
        self.keys = pa.concat_arrays([pa.array([], pa.string()), *(unit.keys for unit in units)])
        self.sizes = np.concatenate([unit.sizes for unit in units] or [np.zeros((6, 0), np.int32)], axis=1)
        reasons = np.full(len(self.keys), None)
        for start, unit in zip(ends.tolist(), units, strict=False):
            for row, reason in unit.quarantined.items():
                reasons[start + row] = reason
        self.reasons = pa.array(reasons, pa.string())
        self._shard_rows = shard_rows
        self._starts = np.full(max(numbers, default=-1) + 2, -1)  # of each shard; the last stands for all that are not
        self._starts[numbers] = ends[:-1]

    def places(self, rows: np.ndarray) -> pa.Array:
        """Where rows of the cache stand here, (N,); null where their unit is not committed, and for -1."""
        starts = self._starts[np.minimum(rows // self._shard_rows, len(self._starts) - 1)]
        return pa.array(starts + rows % self._shard_rows, mask=starts < 0)
