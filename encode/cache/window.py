"""Which shards of a cache that lies elsewhere are here: fetched before they are needed, deleted when there is no room.

What batches need is asked for in their order, and what was asked for longest ago goes first, but nothing that a batch
is still expected to need. All processes of a machine expect the same, so each fetches and deletes what the others do,
and the room is that of one. Deleting a file takes nothing from a process that has it mapped still.
"""

import contextlib
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import BinaryIO

from ..base.errors import CacheError, SettingsError
from .commits import Unit, unit_of
from .format import Record
from .remote import RemoteCache

GIB = 2**30
THREADS = 8  # files on their way


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
        # What is here, that which was asked for last comes last; None where it is of an earlier run.
        self._here: dict[Unit, Future[None] | None] = {}
        self._used = 0
        self._expected: deque[set[Unit]] = deque()
        self._wanted: Counter[Unit] = Counter()  # by batches that are expected
        self._waiting: deque[Unit] = deque()  # for room
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
        self._room(0, ())
        lacking = min(self.budget, sum(self.sizes.values())) - self._used
        if lacking > (free := shutil.disk_usage(folder).free):
            found = (
                f"{self.cache.name} takes {lacking / 2**30:.1f} GiB more in {folder}, where {free / 2**30:.1f} are free"
            )
            raise SettingsError(f"{found}: give a smaller --window, or a --window_dir with more room")

    def expects(self, units: set[Unit]) -> bool:
        """Whether these are of the batch that is expected next, and have room together."""
        with self._lock:
            first = self._expected[0] if self._expected else set()
            return units <= first and sum(map(self.sizes.__getitem__, units)) <= self.budget

    def expect(self, units: set[Unit]) -> None:
        """Ask for the units of a batch, after those that are expected already."""
        with self._lock:
            self._expected.append(units)
            self._wanted.update(units)
            self._waiting.extend(sorted(units))
            self._ask_waiting()

    def passed(self) -> None:
        """The first batch that was expected needs nothing any more."""
        with self._lock:
            for unit in self._expected.popleft() if self._expected else ():
                self._wanted[unit] -= 1
                if not self._wanted[unit]:
                    del self._wanted[unit]
            self._ask_waiting()

    def forget(self) -> None:
        """Expect nothing any more."""
        with self._lock:
            self._expected.clear()
            self._wanted.clear()
            self._waiting.clear()
            for unit, future in list(self._here.items()):
                if future and future.cancel():
                    self._used -= self.sizes[unit]
                    del self._here[unit]

    @contextlib.contextmanager
    def hold(self, units: set[Unit]) -> Iterator[None]:
        """Have units here and mapped for a while; raises `CacheError` where one cannot be fetched, or has no room."""
        with self._lock:
            keep = units | self._wanted.keys()
            for unit in sorted(units):
                while not (self._ask(unit, keep) or self._ask(unit, units)):
                    busy = {future for future in self._here.values() if future and not future.done()}
                    if not busy:
                        needed = sum(map(self.sizes.__getitem__, units)) / GIB
                        raise CacheError(f"{self.cache.name}: {needed:.2f} GiB are needed at once, give more --window")
                    wait(busy, return_when=FIRST_COMPLETED)
            for unit in units:
                if future := self._here[unit]:
                    future.result()
            yield

    def _ask_waiting(self) -> None:
        while self._waiting and (self._waiting[0] not in self._wanted or self._ask(self._waiting[0], self._wanted)):
            self._waiting.popleft()

    def _ask(self, unit: Unit, keep: Container[Unit]) -> bool:
        """Let a unit come, unless it is here; whether there is room for it beside what is to `keep`."""
        there = unit in self._here
        future = self._here.pop(unit, None)
        if there and future and not (future.done() and future.exception()):
            self._here[unit] = future
        elif there or self._room(self.sizes[unit], keep):
            self._used += 0 if there else self.sizes[unit]
            self._here[unit] = self._pool.submit(self._bring, unit)
        return unit in self._here

    def _room(self, size: int, keep: Container[Unit]) -> bool:
        """Delete what was asked for longest ago, until there is room for `size` bytes; whether there is."""
        for unit, future in list(self._here.items()) if self._used + size > self.budget else ():
            if self._used + size > self.budget and unit not in keep and (future is None or future.done()):
                if future and not future.exception():
                    self._remove(unit)
                for path in self.paths[unit]:
                    (self.cache.folder / path).unlink(missing_ok=True)
                self._used -= self.sizes[unit]
                del self._here[unit]
        return self._used + size <= self.budget

    def _bring(self, unit: Unit) -> None:
        with contextlib.ExitStack() as opened:
            self._put(unit, {path: opened.enter_context(self.cache.fetch(path)) for path in self.paths[unit]})
