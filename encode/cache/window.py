"""Which shards of a cache that lies elsewhere are here: fetched before they are needed, deleted when there is no room.

What batches need is known long before them, so what is needed first comes first, and what is needed last, or not at
all as far as is known, makes room for it. All processes of a machine expect the same batches: each fetches and deletes
what the others do, and the room is that of one. Deleting a file takes nothing from a process that has it mapped still.
"""

import contextlib
import heapq
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import BinaryIO

from ..base.errors import CacheError, SettingsError
from .commits import Unit, unit_of
from .format import Record
from .remote import RemoteCache

GIB = 2**30
THREADS = 8  # files on their way


def at_least(size: float) -> str:
    """Bytes in GiB, rounded up in the third digit, so that they are enough."""
    gib = size / GIB
    step = 10.0 ** (math.floor(math.log10(gib)) - 2)
    return f"{math.ceil(gib / step) * step:g}"


class Window:
    """The units of a cache that are here, `budget` bytes at most.

    Args:
        put: maps a unit, given its files by path, open.
        remove: lets go of it.
    """

    def __init__(
        self,
        cache: RemoteCache,
        shards: Mapping[str, Record],
        budget: float,
        put: Callable[[Unit, Mapping[str, BinaryIO]], None],
        remove: Callable[[Unit], None],
    ):
        self.cache, self.budget, self._put, self._remove = cache, budget, put, remove
        self.paths: dict[Unit, list[str]] = {}
        for path in sorted(shards):
            if unit := unit_of(path):
                self.paths.setdefault(unit, []).append(path)
        self.sizes = {unit: sum(shards[path]["bytes"] for path in paths) for unit, paths in self.paths.items()}
        self._here: dict[Unit, Future[None] | None] = {}  # None where it is of an earlier run
        self._used = 0
        self._expected: deque[set[Unit]] = deque()
        self._count = 0  # of batches that were expected
        self._uses: dict[Unit, deque[int]] = {}  # numbers of the expected batches that need a unit
        self._waiting: list[tuple[float, Unit]] = []  # a heap: what is to come, by its next use
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(THREADS, "fetch")
        self._take_over()

    def _take_over(self) -> None:
        """Count what an earlier run has left, and delete what is too much; raises SettingsError without room."""
        folder = self.cache.folder
        there = {path.relative_to(folder).as_posix() for path in folder.glob("data.zarr/*/c/**/*") if path.is_file()}
        for path in there - {path for paths in self.paths.values() for path in paths}:
            (folder / path).unlink(missing_ok=True)
        for unit, paths in sorted(self.paths.items()):
            if there & set(paths):
                self._here[unit] = None
                self._used += self.sizes[unit]
        self._room(0, 0, set())
        lacking = min(self.budget, sum(self.sizes.values())) - self._used
        if lacking > (free := shutil.disk_usage(folder).free):
            found = f"{at_least(lacking)} GiB more in {folder}, where {free / GIB:.3g} are free"
            raise SettingsError(
                f"{self.cache.name} takes {found}: give a smaller --window, or a --window_dir with more room"
            )

    def expects(self, units: set[Unit]) -> bool:
        """Whether all of these are of batches that are expected, and have room together."""
        with self._lock:
            return units <= self._uses.keys() and sum(map(self.sizes.__getitem__, units)) <= self.budget

    def expect(self, units: set[Unit]) -> None:
        """Ask for the units of a batch, after those that are expected already."""
        with self._lock:
            self._expected.append(units)
            for unit in units:
                self._uses.setdefault(unit, deque()).append(self._count)
                heapq.heappush(self._waiting, (self._next(unit), unit))
            self._count += 1
            self._ask_waiting()

    def passed(self) -> None:
        """The first batch that was expected needs nothing any more."""
        with self._lock:
            for unit in self._expected.popleft() if self._expected else ():
                self._uses[unit].popleft()
                if not self._uses[unit]:
                    del self._uses[unit]
            self._ask_waiting()

    def forget(self) -> None:
        """Expect nothing any more; what is on its way has arrived when this returns."""
        with self._lock:
            self._expected.clear()
            self._uses.clear()
            self._waiting.clear()
            for unit, future in list(self._here.items()):
                if future and future.cancel():
                    self._used -= self.sizes[unit]
                    del self._here[unit]
            wait(future for future in self._here.values() if future)

    @contextlib.contextmanager
    def hold(self, units: set[Unit]) -> Iterator[None]:
        """Have units here and mapped for a while; raises `CacheError` where one cannot be fetched, or has no room."""
        with self._lock:
            for unit in sorted(units):
                while not self._ask(unit, -1, units):
                    busy = {future for future in self._here.values() if future and not future.done()}
                    if not busy:
                        needed = at_least(sum(map(self.sizes.__getitem__, units)))
                        there = f"its share of --window is {self.budget / GIB:.3g}: give more"
                        raise CacheError(f"{self.cache.name}: {needed} GiB are needed at once, {there}")
                    wait(busy, return_when=FIRST_COMPLETED)
            for unit in units:
                if future := self._here[unit]:
                    future.result()
            yield

    def _next(self, unit: Unit) -> float:
        """The number of the next batch that needs a unit, as far as is known."""
        return self._uses[unit][0] if unit in self._uses else math.inf

    def _ask_waiting(self) -> None:
        while self._waiting and (
            self._waiting[0][1] not in self._uses or self._ask(self._waiting[0][1], self._waiting[0][0], set())
        ):
            heapq.heappop(self._waiting)

    def _ask(self, unit: Unit, use: float, keep: set[Unit]) -> bool:
        """Let a unit come, unless it is here; whether there is room for it, in which `use` comes first."""
        there, future = unit in self._here, self._here.get(unit)
        if there and future and not (future.done() and future.exception()):
            return True
        if there or self._room(self.sizes[unit], use, keep):
            self._used += 0 if there else self.sizes[unit]
            self._here[unit] = self._pool.submit(self._bring, unit)
            return True
        return False

    def _room(self, size: int, use: float, keep: set[Unit]) -> bool:
        """Delete what is needed latest, and later than in `use`, for `size` bytes more; whether there is room."""
        while self._used + size > self.budget:
            settled = (unit for unit, future in self._here.items() if future is None or future.done())
            latest = max((unit for unit in settled if unit not in keep), key=self._next, default=None)
            if latest is None or self._next(latest) <= use:
                return False
            future = self._here.pop(latest)
            if future and not future.exception():
                self._remove(latest)
            for path in self.paths[latest]:
                (self.cache.folder / path).unlink(missing_ok=True)
            self._used -= self.sizes[latest]
            if latest in self._uses:
                heapq.heappush(self._waiting, (self._next(latest), latest))
        return True

    def _bring(self, unit: Unit) -> None:
        with contextlib.ExitStack() as opened:
            self._put(unit, {path: opened.enter_context(self.cache.fetch(path)) for path in self.paths[unit]})
