"""Writes a cache: the empty arrays, whole units with their commit records, and one encode at a time."""

import contextlib
import errno
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import zarr
from zarr.abc.buffer import Buffer

from ..base.errors import CacheError
from ..base.files import UNFINISHED, file_record, sync, whole, write_record
from ..base.system import fcntl
from .commits import Commit, pc, write_commit
from .format import FORMAT, SAMPLES, Cache, Unit, chunk_rows
from .samples import Ledger, counts
from .shapes import RowShapes
from .tables import SAMPLES_FILE, SCORES, SHARDS_FILE, write_samples, write_shards


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[TextIO]:
    """Hold the lock of a folder, which is made if need be, for oneself or `shared` with others that do so.

    The operating system lets go of the lock when its process dies; processes that it starts do not inherit it.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        fcntl.lockf(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        yield lock


@contextlib.contextmanager
def exclusive(folder: Path, *, shared: bool = False) -> Iterator[TextIO]:
    """Hold a cache for oneself, or `shared` with the other processes of one encode.

    Raises:
        CacheError: another process writes to it, it cannot be written, or the disk is full; what is committed stays.
    """
    try:
        with locked(folder, shared=shared) as lock:
            yield lock
    except BlockingIOError:
        raise CacheError(f"{folder} is being written by another ip2p-encode: wait for it or stop it") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = "free some and run the same command, it goes on from here"
            raise CacheError(f"no space left for {folder}: {mend}") from None
        if Path(str(error.filename)).is_relative_to(folder):
            raise CacheError(f"--cache {folder} cannot be written: {error.strerror}") from None
        raise


def share(lock: TextIO) -> None:
    """Turn the lock of a planned encode into one that all its processes hold, so that no other encode can begin."""
    fcntl.lockf(lock, fcntl.LOCK_SH)


def prepare(folder: Path, row_shapes: RowShapes, samples: pa.Table, ledger: Ledger) -> None:
    """Make the metadata of Zarr arrays that hold all rows of `samples` and `ledger`, and put it in place.

    float16, chunks inside shards, no compression, NaN where nothing is written: so a shard's data is one plain
    C-order array, which can be mapped into memory. Metadata that is there already is not trusted, but compared.
    """
    (folder / "commits").mkdir(parents=True, exist_ok=True)
    for path in [path for path in folder.rglob("*") if UNFINISHED.fullmatch(path.name)]:
        path.unlink()
    metadata: dict[str, Buffer] = {}
    group = zarr.create_group(metadata, zarr_format=3)
    for kind, shapes in row_shapes.items():
        shard, chunk = ledger.shard_rows[kind], chunk_rows(kind, ledger.shard_rows[kind])
        used = [0, pc.max(samples["row" if kind == "images" else "text_row"]).as_py() or 0]
        for unit, commit in ledger.commits.items():
            if unit.kind == kind:
                used += [unit.shard * shard + row for row in np.flatnonzero(commit.keys.is_valid())[-1:].tolist()]
        views, one = ((ledger.views,), (1,)) if kind == "images" else ((), ())
        for name, shape in shapes.items():
            size, shards, chunks = (max(used) + 1, *views, *shape), (shard, *one, *shape), (chunk, *one, *shape)
            how = {"dtype": "float16", "compressors": None, "fill_value": math.nan}
            group.create_array(name, shape=size, shards=shards, chunks=chunks, **how)
    for name, content in metadata.items():
        file = folder / "data.zarr" / name
        if not file.is_file() or file.read_bytes() != content.to_bytes():
            with whole(file) as unfinished:
                unfinished.write_bytes(content.to_bytes())


def write_state(folder: Path, manifest: Mapping[str, Any], samples: pa.Table, commits: Mapping[Unit, Commit]) -> None:
    """Write the samples table, the list of the shards that `commits` name, and the manifest with their checksums.

    A cache of an older format becomes one of today's with that: its arrays and records stay as they are.
    """
    write_samples(folder / SAMPLES_FILE, samples)
    write_shards(folder / SHARDS_FILE, commits)
    small = [folder / SAMPLES_FILE, folder / SHARDS_FILE, *sorted((folder / "data.zarr").glob("**/zarr.json"))]
    files = {str(path.relative_to(folder)): file_record(path) for path in small}
    kept = [name for name in samples.column_names if name not in {*SAMPLES.names, *SCORES.names}]
    state = {"format": FORMAT, "counts": counts(samples), "files": files, "kept": kept}
    write_record(folder / "manifest.json", {**manifest, **state})


class UnitWriter:
    """Collects the rows of one unit and writes them at once: all of them, then the record that makes them exist."""

    def __init__(self, cache: Cache, unit: Unit):
        self.cache, self.unit = cache, unit
        self.arrays = {
            # Dense even where all values are NaN: the reader maps a shard only if nothing is left out of it.
            name: array.with_config({"write_empty_chunks": True})
            for name, array in cache.arrays(unit.kind, mode="r+").items()
        }
        self.rows = cache.shard_rows[unit.kind]
        self.first = unit.shard * self.rows
        self.stop = min(self.first + self.rows, next(iter(self.arrays.values())).shape[0])
        self.keys: list[str | None] = [None] * self.rows
        self.sizes: list[Sequence[int] | None] = [None] * self.rows
        self.quarantined: dict[int, str] = {}
        shapes = {name: array.shape[2 if unit.kind == "images" else 1 :] for name, array in self.arrays.items()}
        rows = self.stop - self.first
        self.buffers = {name: np.full((rows, *shape), np.nan, np.float16) for name, shape in shapes.items()}

    def put(self, row: int, key: str, values: dict[str, np.ndarray], sizes: Sequence[int] | None = None) -> bool:
        """Take one row, unless a value is not finite; returns whether it was taken."""
        finite = all(np.isfinite(value).all() for value in values.values())
        if finite:
            at = row - self.first
            self.keys[at], self.sizes[at] = key, sizes
            for name, value in values.items():
                place: Any = self.buffers[name][at]
                if place.ndim < value.ndim:  # it has room for the largest shape
                    value = value.reshape(len(value), -1)
                    place[:, value.shape[1] :] = 0
                place[..., : value.shape[-1]] = value
        return finite

    def quarantine(self, row: int, key: str, reason: str) -> None:
        """Record why a row stays empty."""
        self.keys[row - self.first] = key
        self.quarantined[row - self.first] = reason

    def commit(self) -> None:
        """Write all arrays, wait for the disk, then write the record."""
        files = {}
        for name, array in self.arrays.items():
            path = self.cache.shard_path(name, self.unit, array.ndim)
            file = self.cache.folder / path
            file.unlink(missing_ok=True)  # torn, of a killed process: zarr-python would try to merge with it
            if self.unit.kind == "images":
                array[self.first : self.stop, self.unit.view : self.unit.view + 1] = self.buffers[name][:, None]
            else:
                array[self.first : self.stop] = self.buffers[name]
            sync(file)
            sync(file.parent)
            files[path] = file_record(file)
        sizes = self.sizes if self.unit.kind == "images" else None
        write_commit(self.cache.folder, self.unit, self.keys, sizes, self.quarantined, files)
