"""Reads caches at memory-map speed: any rows of an array in one call, wherever their shards lie.

All shards of an array, of all caches, are mapped side by side (`mapped.py`); the shards of view 1 follow those of
view 0. zarr-python reads the same files a few hundred times slower, sample by sample. Of a cache that lies elsewhere,
what is needed is fetched, mapped at its place, and deleted again (`window.py`).
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import BinaryIO

import numpy as np

from ..base.errors import CacheError, CacheMismatch
from .commits import Unit, unit_of
from .format import ARRAYS, Cache, Record, wrong_size
from .mapped import MappedArray, Shard
from .remote import RemoteCache, completed
from .shapes import misfit
from .tables import SHARDS_FILE
from .window import GIB, Window

VIEWS = 2**16  # more than there are of a pair


class Reader:
    """Gathers samples from caches whose committed shards are all there and whole.

    The rows of several caches follow each other: those of cache number n begin at `first_rows[kind][n]`. Their rows
    must have the same shapes, which they have if the same encoders wrote them at the same resolution.

    Args:
        masks: whether these are gathered, too, where the caches have some.
        window: GiB of which each cache gets its share by size: what lies here at once of one that lies elsewhere, and
            what a run reads at once of any. Without it, all of it.

    Raises:
        CacheError: a shard file is missing or has another size than its record says; a manifest contradicts the arrays.
        CacheMismatch: masks are asked for, and one cache has some, another none.
    """

    def __init__(self, *caches: Cache, masks: bool = False, window: float | None = None):
        for cache, why in zip(caches, map(misfit, caches), strict=True):
            if why:
                raise CacheError(f"{cache.name}/manifest.json: {why}")
        have = {bool(cache.manifest.get("masks")): cache.folder for cache in caches}
        if masks and len(have) > 1:
            mend = "leave out --edit_weight, or encode both alike, each into a new --cache"
            raise CacheMismatch(f"{have[True]} has masks of where the edits are, {have[False]} none: {mend}")
        self.holds_text = caches[0].holds_text  # else nobody asks for rows of it
        listed = [
            {path: file for path, file in cache.shards().items() if masks or "/mask/" not in path} for cache in caches
        ]
        self.caches, self.window = caches, window
        self._units = [_whole_units(cache, shards) for cache, shards in zip(caches, listed, strict=True)]
        self.sizes = [sum(file["bytes"] for file in shards.values()) for shards in listed]
        self.budgets = [window * GIB * size / sum(self.sizes) if window else math.inf for size in self.sizes]
        self.first_rows: dict[str, list[int]] = {}
        self.rows: dict[str, int] = {}  # of all caches, in one view
        self.arrays: dict[str, MappedArray] = {}
        self._zarrs = [cache.arrays("images") | cache.arrays("text") for cache in caches]
        for kind, names in ARRAYS.items():
            last = [max((u.shard for u in units if u.kind == kind), default=0) for units in self._units]
            rows = [(shard + 1) * cache.shard_rows[kind] for shard, cache in zip(last, caches, strict=True)]
            self.first_rows[kind], self.rows[kind] = [*accumulate(rows[:-1], initial=0)], sum(rows)
            slots = np.repeat([cache.shard_rows[kind] for cache in caches], np.array(last) + 1)
            views = max(len(cache.views) for cache in caches) if kind == "images" else 1
            for name, array in self._zarrs[0].items():
                if name not in names or (name == "mask" and not masks):
                    continue
                self.arrays[name] = MappedArray(array.shape[2 if kind == "images" else 1 :], np.tile(slots, views))
        self.windows: dict[int, Window] = {}
        for number, cache in enumerate(caches):
            if isinstance(cache, RemoteCache):
                ways = partial(self._put, number), partial(self._remove, number)
                self.windows[number] = Window(cache, listed[number], self.budgets[number], *ways)
                continue
            for name, array in self.arrays.items():
                array.map(self._shard(number, name, unit) for unit in self._units[number] if name in ARRAYS[unit.kind])

    def _shard(self, number: int, name: str, unit: Unit) -> Shard:
        cache, array, rows = self.caches[number], self._zarrs[number][name], self.caches[number].shard_rows[unit.kind]
        at = unit.view * self.rows[unit.kind] + self.first_rows[unit.kind][number] + unit.shard * rows
        where = slice(unit.shard * rows, (unit.shard + 1) * rows), slice(unit.view, unit.view + 1)
        path = cache.folder / cache.shard_path(name, unit, array.ndim)
        return Shard(at, rows, path, array, where if unit.kind == "images" else where[:1])

    def _put(self, number: int, unit: Unit, files: Mapping[str, BinaryIO]) -> None:
        """Map a unit of a cache that lies elsewhere; `files` are its shards by path, whole and open."""
        for path, file in files.items():
            name = path.split("/")[1]
            if not self.arrays[name].put(self._shard(number, name, unit), file):
                found = f"{self.caches[number].name}/{path} is compressed, or in another order, by another program"
                raise CacheError(f"{found}: `ip2p-cache pull` the cache and train from the copy")

    def _remove(self, number: int, unit: Unit) -> None:
        for name in self.arrays.keys() & set(ARRAYS[unit.kind]):
            self.arrays[name].remove(self._shard(number, name, unit))

    @property
    def largest(self) -> tuple[int, int, int]:
        """Channels, height and width of the largest latents: of several shapes, the square."""
        channels, height, *width = self.arrays["original"].row_shape
        return (channels, height, *width) if width else (channels, math.isqrt(height), math.isqrt(height))  # type: ignore[return-value]

    def row_bytes(self, names: Iterable[str]) -> int:
        """Bytes of a row of some arrays together, as far as they are there."""
        return sum(2 * math.prod(array.row_shape) for name, array in self.arrays.items() if name in names)

    def require(self, rows: np.ndarray, text_rows: np.ndarray) -> None:
        """Make sure that `take` can be asked for these rows in every view; others must never reach it.

        Raises:
            CacheError: a unit that holds some of them has no commit record.
        """
        for number, cache in enumerate(self.caches):
            needed = self._owned(number, "text", text_rows, np.zeros_like(text_rows)) if self.holds_text else set()
            for view in range(len(cache.views)):
                needed |= self._owned(number, "images", rows, np.full_like(rows, view))
            if absent := sorted(needed - self._units[number]):
                name, again = absent[0].name, completed(cache)
                if isinstance(cache, RemoteCache):
                    raise CacheError(f"{cache.name}/{SHARDS_FILE} does not list {name}: {again}")
                shown = f"`ip2p-cache verify {cache.name}` shows the extent"
                raise CacheError(
                    f"{cache.name}/commits/{name}.json is missing: {again}, it encodes what is gone ({shown})"
                )

    def _owned(self, number: int, kind: str, rows: np.ndarray, views: np.ndarray) -> set[Unit]:
        """The units of a cache in which those of some rows lie that are its own."""
        own = np.searchsorted(self.first_rows[kind], rows, side="right") - 1 == number
        shards = (rows[own] - self.first_rows[kind][number]) // self.caches[number].shard_rows[kind]
        return {Unit(kind, *divmod(one, VIEWS)) for one in np.unique(shards * VIEWS + views[own]).tolist()}

    def _needed(self, number: int, names: Iterable[str], *where: np.ndarray) -> set[Unit]:
        """The units of a cache that `take` gathers arrays from."""
        rows, views, text_rows = where
        kinds = {kind for kind, those in ARRAYS.items() if set(names) & set(those)}
        found = self._owned(number, "images", rows, views) if "images" in kinds else set()
        return found | (self._owned(number, "text", text_rows, np.zeros_like(text_rows)) if "text" in kinds else set())

    def take(self, out: dict[str, np.ndarray], rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Gather a batch into `out`, arrays (B, ...) float16 by name; the rest are (B,) integers.

        What has to be fetched first and was not expected is so row by row, and takes no room from what is.
        """
        units = {number: self._needed(number, out, rows, views, text_rows) for number in self.windows}
        expected = all(window.expects(units[number]) for number, window in self.windows.items())
        step = len(rows) if expected else 1
        for part in (slice(start, start + step) for start in range(0, len(rows), step)):
            where = rows[part], views[part], text_rows[part]
            with contextlib.ExitStack() as held:
                for number, window in self.windows.items():
                    held.enter_context(window.hold(self._needed(number, out, *where) if step == 1 else units[number]))
                for name, buffer in out.items():
                    self.arrays[name].take(self._place(name, *where), buffer[part])

    def will_need(self, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Ask for rows that `take` will gather soon, so that the disk works ahead (20 times faster when cold)."""
        for name, array in self._asked.items():
            array.will_need(self._place(name, rows, views, text_rows))

    @property
    def _asked(self) -> dict[str, MappedArray]:
        """The arrays that batches are gathered from."""
        return {name: array for name, array in self.arrays.items() if self.holds_text or name in ARRAYS["images"]}

    def expect(self, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> None:
        """Ask for a batch to be fetched: that of all processes, of which each will `take` its own part."""
        for number, window in self.windows.items():
            window.expect(self._needed(number, self._asked, rows, views, text_rows))

    def passed(self) -> None:
        """Say that the first batch that was expected has been taken."""
        for window in self.windows.values():
            window.passed()

    def forget(self) -> None:
        """Expect no batch any more."""
        for window in self.windows.values():
            window.forget()

    def _place(self, name: str, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray) -> np.ndarray:
        return text_rows if name in ARRAYS["text"] else rows + views * self.rows["images"]


def _whole_units(cache: Cache, shards: Mapping[str, Record]) -> set[Unit]:
    """What is committed, after a look at the size of every shard file and the names of the records."""
    for path, expected in shards.items() if not isinstance(cache, RemoteCache) else ():
        if problem := wrong_size(cache.folder / path, expected):
            mend = f"`ip2p-cache verify {cache.folder} --repair`, then ip2p-encode again"
            raise CacheError(f"{cache.folder / path} {problem}: {mend}")
    return set(filter(None, map(unit_of, shards))) & set(cache.units())
