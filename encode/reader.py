"""Reads a cache at memory-map speed: any rows of an array in one call, wherever their shards lie.

All shards of an array are mapped side by side into one range of addresses, so that `np.take` gathers a batch in a
single call that releases the interpreter lock. The shards of view 1 follow those of view 0. zarr-python reads the
same files a few hundred times slower, sample by sample.
"""

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr

from .cache import Cache, Unit
from .errors import CacheError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value


class Shard(NamedTuple):
    """One shard of one array: its place in the range, its file, and the selection that zarr-python knows it by."""

    slot: int
    path: Path
    selection: tuple[slice, ...]


class MappedArray:
    """A read-only float16 array over `slots` shards of `shard_rows` rows each; absent shards must not be touched."""

    def __init__(
        self,
        array: zarr.Array,
        row_shape: tuple[int, ...],
        shard_rows: int,
        slots: int,
        shards: Sequence[Shard],
    ):
        self.row_shape = row_shape
        self._row_bytes = 2 * math.prod(row_shape)
        shard_bytes = shard_rows * self._row_bytes
        self._size = slots * shard_bytes
        self._base = _map(None, self._size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        weakref.finalize(self, _libc.munmap, self._base, self._size).atexit = False  # a thread may still be reading
        direct, foreign = [], []
        for shard in shards:
            plain = shard_bytes % mmap.PAGESIZE == 0 and _plain_bytes(shard.path, array, self._row_bytes)
            (direct if plain else foreign).append(shard)
        if foreign:
            self._copy(array, foreign, shard_bytes)
        for shard in direct:
            with shard.path.open("rb") as file:
                length = min(shard_bytes, os.fstat(file.fileno()).st_size)
                _map(
                    self._base + shard.slot * shard_bytes,
                    length,
                    mmap.PROT_READ,
                    mmap.MAP_SHARED | _MAP_FIXED,
                    file.fileno(),
                )
        whole: Any = (ctypes.c_char * self._size).from_address(self._base)
        self._rows = np.frombuffer(whole, np.float16).reshape(-1, *row_shape)  # valid as long as this object lives

    def _copy(self, array: zarr.Array, shards: Sequence[Shard], shard_bytes: int) -> None:
        """Shards that others wrote (compressed, in another order) are read once by zarr-python and kept plain."""
        with tempfile.TemporaryFile() as file:
            file.truncate(self._size)
            for shard in shards:
                file.seek(shard.slot * shard_bytes)
                file.write(np.ascontiguousarray(array[shard.selection], np.float16).tobytes())
            file.flush()
            _map(self._base, self._size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file.fileno())

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Gather rows into `out`, (len(rows), ...) float16."""
        np.take(self._rows, rows, axis=0, out=out, mode="clip")  # "raise" would gather into a copy first

    def will_need(self, rows: Iterable[int]) -> None:
        """Ask the operating system to read these rows ahead of their use."""
        for row in rows:
            start = self._base + row * self._row_bytes
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            _libc.madvise(page, start + self._row_bytes - page, mmap.MADV_WILLNEED)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    mapped = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if mapped == _FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes failed: {os.strerror(ctypes.get_errno())}")
    return mapped


def _plain_bytes(path: Path, array: zarr.Array, row_bytes: int) -> bool:
    """Whether the data of a shard is one C-order array at offset 0, possibly cut short after some chunk.

    Raises:
        CacheError: the index at the end of the shard is damaged.
    """
    codecs: Any = array.metadata.to_dict()["codecs"]
    if array.shards is None or not _is_plain(codecs):
        return False
    chunks, chunk_bytes = array.shards[0] // array.chunks[0], array.chunks[0] * row_bytes
    with path.open("rb") as file:
        file.seek(-(16 * chunks + 4), os.SEEK_END)
        content = file.read()
    if google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise CacheError(f"{path} is damaged (wrong checksum of its index): `ip2p-cache verify` says what is affected")
    index = np.frombuffer(content[:-4], "<u8").reshape(chunks, 2)
    there = index[:, 0] != 2**64 - 1
    expected = np.arange(there.sum(), dtype=np.uint64) * np.uint64(chunk_bytes)
    dense = there[: there.sum()].all() and (index[there, 0] == expected).all()
    return bool(dense and (index[there, 1] == chunk_bytes).all())


def _is_plain(codecs: Sequence[dict[str, Any]]) -> bool:
    if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
        return False
    inside = codecs[0]["configuration"]
    names = [[codec["name"] for codec in inside[part]] for part in ("codecs", "index_codecs")]
    return names == [["bytes"], ["bytes", "crc32c"]] and inside["index_location"] == "end"


class Reader:
    """Gathers samples from a cache whose committed shards are all there and whole.

    Raises:
        CacheError: a shard file is missing or has another size than its record says.
    """

    def __init__(self, cache: Cache):
        self.cache, commits = cache, cache.commits()
        check_sizes(cache, commits)
        self._units = set(commits)
        self._shards = {
            kind: 1 + max((unit.shard for unit in commits if unit.kind == kind), default=0)
            for kind in ("images", "text")
        }
        self.arrays = {
            name: self._map(cache, name, array, kind, [unit for unit in commits if unit.kind == kind])
            for kind in self._shards
            for name, array in cache.arrays(kind).items()
        }
        self.view_rows = self._shards["images"] * cache.shard_rows["images"]
        """Rows from a sample in one view to the same sample in the next."""

    def _map(self, cache: Cache, name: str, array: zarr.Array, kind: str, units: Sequence[Unit]) -> MappedArray:
        rows, images = cache.shard_rows[kind], kind == "images"
        shards = []
        for unit in units:
            where = (slice(unit.shard * rows, (unit.shard + 1) * rows), slice(unit.view, unit.view + 1))
            path = cache.folder / cache.shard_path(name, unit, array.ndim)
            shards.append(Shard(unit.view * self._shards[kind] + unit.shard, path, where if images else where[:1]))
        slots = self._shards[kind] * (len(cache.views) if images else 1)
        return MappedArray(array, array.shape[2 if images else 1 :], rows, slots, shards)

    def require(self, rows: np.ndarray, text_rows: np.ndarray) -> None:
        """Make sure that `take` can be asked for these rows in every view; others must never reach it.

        Raises:
            CacheError: a unit that holds some of them has no commit record.
        """
        for kind, views, wanted in (("images", len(self.cache.views), rows), ("text", 1, text_rows)):
            for shard in np.unique(wanted // self.cache.shard_rows[kind]).tolist():
                for unit in (Unit(kind, shard, view) for view in range(views)):
                    if unit not in self._units:
                        folder = self.cache.folder
                        raise CacheError(
                            f"{folder}/commits/{unit.name}.json is missing: run the same ip2p-encode again, it encodes "
                            f"what is gone (`ip2p-cache verify {folder}` shows the extent)"
                        )

    def take(self, out: dict[str, np.ndarray], rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Gather a batch into `out`, which holds an array (B, ...) float16 by name for each of `arrays`.

        Args:
            rows, views: of the images, (B,) integers.
            text_rows: of the instructions, (B,) integers.
        """
        for name, buffer in out.items():
            self.arrays[name].take(self._place(name, rows, views, text_rows), buffer)

    def will_need(self, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Ask for rows that `take` will gather soon, so that the disk works ahead (20 times faster when cold)."""
        for name, array in self.arrays.items():
            array.will_need(self._place(name, rows, views, text_rows).tolist())

    def _place(self, name: str, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> np.ndarray:
        return text_rows if name in ("text", "pooled") else rows + views * self.view_rows


def check_sizes(cache: Cache, commits: dict[Unit, dict[str, Any]]) -> None:
    """Compare the size of every shard file with its commit record."""
    for record in commits.values():
        for path, expected in record["files"].items():
            file = cache.folder / path
            size = file.stat().st_size if file.is_file() else None
            if size != expected["bytes"]:
                found = "is missing" if size is None else f"has {size:,} bytes, {expected['bytes']:,} were written"
                raise CacheError(f"{file} {found}: `ip2p-cache verify {cache.folder} --repair`, then ip2p-encode again")
