"""Shards of one array, mapped side by side into one range of addresses, so that `np.take` gathers in a single call.

A mapping begins where a page does. Where the rows of a shard are not whole pages, which may have 4, 16 or 64 KiB, room
is left before the next one: addresses cost nothing, and no shard is copied.
"""

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import google_crc32c
import numpy as np
import zarr

from ..base.errors import CacheError
from ..base.system import NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE, _MAP_FIXED = 0, 0x10
_NOTHING = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
_FAILED = ctypes.c_void_p(-1).value


class Shard(NamedTuple):
    """One shard of one array: the first of its rows and how many, its file, and what zarr-python knows it by."""

    first: int
    rows: int
    path: Path
    array: zarr.Array
    selection: tuple[slice, ...]


class MappedArray:
    """A read-only float16 array, some rows of which lie in shards that are mapped; the others must not be touched.

    Args:
        row_shape: of one row.
        slots: (M,) rows of each shard that there may be, one behind the other.
    """

    def __init__(self, row_shape: tuple[int, ...], slots: np.ndarray):
        self.row_shape = row_shape
        self._row_bytes = 2 * math.prod(row_shape)
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes)  # rows from one that begins a page to the next
        wide = -(-slots // step) * step if (slots.cumsum() % step)[:-1].any() else slots
        self._block = int(np.gcd.reduce(slots))  # rows that surely lie in one shard
        shifts = (wide.cumsum() - wide) - (slots.cumsum() - slots)
        self._shifts = np.repeat(shifts, slots // self._block) if shifts.any() else None
        self._size = int(wide.sum()) * self._row_bytes
        self._base = _map(None, self._size, _PROT_NONE, _NOTHING, -1)
        weakref.finalize(self, _libc.munmap, self._base, self._size).atexit = False  # a thread may still be reading
        whole: Any = (ctypes.c_char * self._size).from_address(self._base)
        self._rows = np.frombuffer(whole, np.float16).reshape(-1, *row_shape)  # valid as long as this object lives

    def map(self, shards: Iterable[Shard]) -> None:
        """Map shards that stay; a `CacheError` where the index of one is damaged."""
        foreign = []
        for shard in shards:
            with shard.path.open("rb") as file:
                if not self.put(shard, file):
                    foreign.append(shard)
        if foreign:
            self._copy(foreign)

    def put(self, shard: Shard, file: BinaryIO) -> bool:
        """Map a shard, its file open, unless it is no plain array: then others wrote it."""
        if plain := _is_plain(shard, file, self._row_bytes):
            length = min(shard.rows * self._row_bytes, os.fstat(file.fileno()).st_size)
            self._map_file(file.fileno(), 0, shard.first, length)
        return plain

    def remove(self, shard: Shard) -> None:
        """Let go of a shard that was mapped; its rows must not be touched from now on."""
        _map(self._address(shard.first), shard.rows * self._row_bytes, _PROT_NONE, _NOTHING | _MAP_FIXED, -1)

    def _copy(self, shards: Sequence[Shard]) -> None:
        """Shards that others wrote (compressed, in another order) are read once by zarr-python and kept plain."""
        with tempfile.TemporaryFile() as file:
            for shard in shards:
                content = np.ascontiguousarray(shard.array[shard.selection], np.float16).tobytes()
                start = -(-file.seek(0, os.SEEK_END) // mmap.PAGESIZE) * mmap.PAGESIZE
                file.seek(start)
                file.write(content)
                file.flush()
                self._map_file(file.fileno(), start, shard.first, len(content))

    def _map_file(self, descriptor: int, offset: int, row: int, length: int) -> None:
        _map(self._address(row), length, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, offset)

    def _address(self, row: int) -> int:
        return self._base + int(self._places(np.array(row))) * self._row_bytes

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the range of addresses in which rows of the array lie."""
        return rows if self._shifts is None else rows + self._shifts[rows // self._block]

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Gather rows into `out`, (len(rows), ...) float16."""
        np.take(self._rows, self._places(rows), axis=0, out=out, mode="clip")  # "raise" would gather into a copy first

    def will_need(self, rows: np.ndarray) -> None:
        """Ask the operating system to read these rows ahead of their use."""
        for row in self._places(rows).tolist():
            start = self._base + row * self._row_bytes
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            _libc.madvise(page, start + self._row_bytes - page, mmap.MADV_WILLNEED)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int, offset: int = 0) -> int:
    mapped = _libc.mmap(address, size, protection, flags, descriptor, offset)
    if mapped == _FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes failed: {os.strerror(ctypes.get_errno())}")
    return mapped


def _is_plain(shard: Shard, file: BinaryIO, row_bytes: int) -> bool:
    """Whether a shard is one C-order array at offset 0, possibly cut short after some chunk.

    Raises:
        CacheError: the index at the end of the shard is damaged.
    """
    array, codecs = shard.array, shard.array.metadata.to_dict()["codecs"]
    if array.shards is None:
        return False
    layout: Any = codecs[0]["configuration"]  # type: ignore[index]
    names = [[codec["name"] for codec in layout[part]] for part in ("codecs", "index_codecs")]
    if names != [["bytes"], ["bytes", "crc32c"]] or layout["index_location"] != "end":
        return False
    chunks, chunk_bytes = array.shards[0] // array.chunks[0], array.chunks[0] * row_bytes
    file.seek(-(16 * chunks + 4), os.SEEK_END)
    content = file.read()
    if google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        damage = "is damaged (wrong checksum of its index): `ip2p-cache verify` says what is affected"
        raise CacheError(f"{shard.path} {damage}")
    index = np.frombuffer(content[:-4], "<u8").reshape(chunks, 2)  # offset and length; all ones for an absent chunk
    there = int((index[:, 0] != 2**64 - 1).sum())
    expected = [(n * chunk_bytes, chunk_bytes) for n in range(there)]
    return np.array_equal(index[:there], np.array(expected, np.uint64).reshape(-1, 2))
