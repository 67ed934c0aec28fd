"""Reads caches at memory-map speed: any rows of an array in one call, wherever their shards lie.

All shards of an array, of all caches, are mapped side by side into one range of addresses, so that `np.take` gathers
a batch in a single call that releases the interpreter lock. The shards of view 1 follow those of view 0. zarr-python
reads the same files a few hundred times slower, sample by sample.
"""

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import zarr

from ..base.errors import CacheError, CacheMismatch
from .commits import Unit, unit_of
from .format import Cache, wrong_size

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value


class Shard(NamedTuple):
    """One shard of one array: the rows of the range that it fills, its file, and what zarr-python knows it by."""

    first: int
    rows: int
    path: Path
    array: zarr.Array
    selection: tuple[slice, ...]


class MappedArray:
    """A read-only float16 array of `rows` rows, some of which lie in shards; the others must not be touched."""

    def __init__(self, row_shape: tuple[int, ...], rows: int, shards: Sequence[Shard]):
        self.row_shape = row_shape
        self._row_bytes = 2 * math.prod(row_shape)
        self._size = rows * self._row_bytes
        self._base = _map(None, self._size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
        weakref.finalize(self, _libc.munmap, self._base, self._size).atexit = False  # a thread may still be reading
        direct, foreign = [], []
        for shard in shards:
            (direct if _is_plain(shard, self._row_bytes) else foreign).append(shard)
        if foreign:
            self._copy(foreign)
        for shard in direct:
            with shard.path.open("rb") as file:
                length = min(shard.rows * self._row_bytes, os.fstat(file.fileno()).st_size)
                self._map_file(file.fileno(), shard.first * self._row_bytes, length)
        whole: Any = (ctypes.c_char * self._size).from_address(self._base)
        self._rows = np.frombuffer(whole, np.float16).reshape(-1, *row_shape)  # valid as long as this object lives

    def _copy(self, shards: Sequence[Shard]) -> None:
        """Shards that others wrote (compressed, in another order) are read once by zarr-python and kept plain."""
        with tempfile.TemporaryFile() as file:
            file.truncate(self._size)
            for shard in shards:
                file.seek(shard.first * self._row_bytes)
                file.write(np.ascontiguousarray(shard.array[shard.selection], np.float16).tobytes())
            file.flush()
            self._map_file(file.fileno(), 0, self._size)

    def _map_file(self, descriptor: int, start: int, length: int) -> None:
        _map(self._base + start, length, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)

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


def _is_plain(shard: Shard, row_bytes: int) -> bool:
    """Whether a shard is whole pages of one C-order array at offset 0, possibly cut short after some chunk.

    Raises:
        CacheError: the index at the end of the shard is damaged.
    """
    array, codecs = shard.array, shard.array.metadata.to_dict()["codecs"]
    if array.shards is None or any(n * row_bytes % mmap.PAGESIZE for n in (shard.first, shard.rows)):
        return False
    layout: Any = codecs[0]["configuration"]  # type: ignore[index]
    names = [[codec["name"] for codec in layout[part]] for part in ("codecs", "index_codecs")]
    if names != [["bytes"], ["bytes", "crc32c"]] or layout["index_location"] != "end":
        return False
    chunks, chunk_bytes = array.shards[0] // array.chunks[0], array.chunks[0] * row_bytes
    with shard.path.open("rb") as file:
        file.seek(-(16 * chunks + 4), os.SEEK_END)
        content = file.read()
    if google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        damage = "is damaged (wrong checksum of its index): `ip2p-cache verify` says what is affected"
        raise CacheError(f"{shard.path} {damage}")
    index = np.frombuffer(content[:-4], "<u8").reshape(chunks, 2)  # offset and length; all ones for an absent chunk
    there = int((index[:, 0] != 2**64 - 1).sum())
    expected = [(n * chunk_bytes, chunk_bytes) for n in range(there)]
    return np.array_equal(index[:there], np.array(expected, np.uint64).reshape(-1, 2))


class Reader:
    """Gathers samples from caches whose committed shards are all there and whole.

    The rows of several caches follow each other: those of cache number n begin at `first_rows[kind][n]`. Their rows
    must have the same shapes, which they have if the same encoders wrote them at the same resolution.

    Args:
        masks: whether these are gathered, too, where the caches have some.

    Raises:
        CacheError: a shard file is missing or has another size than its record says.
        CacheMismatch: masks are asked for, and one cache has some, another none.
    """

    def __init__(self, *caches: Cache, masks: bool = False):
        have = {bool(cache.manifest.get("masks")): cache.folder for cache in caches}
        if masks and len(have) > 1:
            mend = "leave out --edit_weight, or encode both alike, each into a new --cache"
            raise CacheMismatch(f"{have[True]} has masks of where the edits are, {have[False]} none: {mend}")
        self.holds_text = caches[0].holds_text  # else nobody asks for rows of it
        self.caches, self._units = caches, [_whole_units(cache) for cache in caches]
        self.first_rows: dict[str, list[int]] = {}
        self._rows: dict[str, int] = {}  # of all caches, in one view
        self.arrays: dict[str, MappedArray] = {}
        for kind in ("images", "text"):
            last = (max((u.shard for u in units if u.kind == kind), default=0) for units in self._units)
            rows = [(shard + 1) * cache.shard_rows[kind] for shard, cache in zip(last, caches, strict=True)]
            self.first_rows[kind], self._rows[kind] = [*accumulate(rows[:-1], initial=0)], sum(rows)
            arrays = [cache.arrays(kind) for cache in caches]
            names = [name for name in arrays[0] if masks or name != "mask"]
            self.arrays |= {name: self._map(name, kind, [those[name] for those in arrays]) for name in names}

    def _map(self, name: str, kind: str, arrays: Sequence[zarr.Array]) -> MappedArray:
        images, shards = kind == "images", []
        for cache, units, array, first in zip(self.caches, self._units, arrays, self.first_rows[kind], strict=True):
            rows = cache.shard_rows[kind]
            for unit in (unit for unit in units if unit.kind == kind):
                at = unit.view * self._rows[kind] + first + unit.shard * rows
                path = cache.folder / cache.shard_path(name, unit, array.ndim)
                where = (slice(unit.shard * rows, (unit.shard + 1) * rows), slice(unit.view, unit.view + 1))
                shards.append(Shard(at, rows, path, array, where if images else where[:1]))
        views = max(len(cache.views) for cache in self.caches) if images else 1
        return MappedArray(arrays[0].shape[2 if images else 1 :], views * self._rows[kind], shards)

    @property
    def largest(self) -> tuple[int, int, int]:
        """Channels, height and width of the largest latents: of several shapes, the square."""
        channels, height, *width = self.arrays["original"].row_shape
        return (channels, height, *width) if width else (channels, math.isqrt(height), math.isqrt(height))  # type: ignore[return-value]

    def require(self, rows: np.ndarray, text_rows: np.ndarray) -> None:
        """Make sure that `take` can be asked for these rows in every view; others must never reach it.

        Raises:
            CacheError: a unit that holds some of them has no commit record.
        """
        for kind, wanted in (("images", rows), ("text", text_rows))[: 1 + self.holds_text]:
            owners = np.searchsorted(self.first_rows[kind], wanted, side="right") - 1
            for number, (cache, first) in enumerate(zip(self.caches, self.first_rows[kind], strict=True)):
                shards = np.unique((wanted[owners == number] - first) // cache.shard_rows[kind]).tolist()
                views = range(len(cache.views) if kind == "images" else 1)
                needed = {Unit(kind, shard, view) for shard in shards for view in views}
                if absent := sorted(needed - self._units[number]):
                    raise CacheError(
                        f"{cache.folder}/commits/{absent[0].name}.json is missing: run the same ip2p-encode again, it "
                        f"encodes what is gone (`ip2p-cache verify {cache.folder}` shows the extent)"
                    )

    def take(self, out: dict[str, np.ndarray], rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Gather a batch into `out`, arrays (B, ...) float16 by name; the rest are (B,) integers."""
        for name, buffer in out.items():
            self.arrays[name].take(self._place(name, rows, views, text_rows), buffer)

    def will_need(self, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Ask for rows that `take` will gather soon, so that the disk works ahead (20 times faster when cold)."""
        images = {name: self.arrays[name] for name in ("original", "edited")}
        for name, array in (self.arrays if self.holds_text else images).items():
            array.will_need(self._place(name, rows, views, text_rows).tolist())

    def _place(self, name: str, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> np.ndarray:
        return text_rows if name in ("text", "pooled") else rows + views * self._rows["images"]


def _whole_units(cache: Cache) -> set[Unit]:
    """What is committed, after a look at the size of every shard file and the names of the records."""
    shards = cache.shards()
    for path, expected in shards.items():
        if problem := wrong_size(cache.folder / path, expected):
            mend = f"`ip2p-cache verify {cache.folder} --repair`, then ip2p-encode again"
            raise CacheError(f"{cache.folder / path} {problem}: {mend}")
    return set(filter(None, map(unit_of, shards))) & set(cache.units())
