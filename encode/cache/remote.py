"""A cache that lies elsewhere, in any place that fsspec knows: its small files here, its shards one by one.

Whatever arrives is held against the checksum that was written of it, each time before it is used. Processes of one
machine share a folder: who has the lock of a file fetches it, and all find it there.
"""

import contextlib
import os
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import google_crc32c

from ..base.errors import CacheError, explained
from ..base.files import check_folder, content_key, is_url, stream_record, unseal, whole, whole_again
from ..base.store import Missing, Place
from ..base.system import fcntl
from .commits import Unit, unit_of
from .format import Cache, Record, readable
from .tables import SHARDS_FILE

T = TypeVar("T")
PIECE = 32 * 2**20  # bytes that are in memory at once of a file on its way
PAUSES = (0.5, 1, 2, 4)  # seconds after which a file is tried again


class RemoteCache(Cache):
    """A cache at a url, opened: its small files are in `folder`, and `fetch` brings shards there.

    Raises:
        CacheError: there is none, or none that can be trusted; the store refuses, or what arrives is damaged; a file of
            the folder cannot be used. SettingsError: nor can the folder.
    """

    def __init__(self, url: str, folders: Path):
        check_folder(folders, "--window_dir")
        url = re.sub("(?<![:/])/+$", "", url)
        self.place = Place(url)

        def ask() -> tuple[bytes, dict[str, Any]]:
            seal = self.place.manifest()
            return seal, unseal(seal, f"{url}/manifest.json")

        seal, manifest = _persistently(ask)
        super().__init__(folders / content_key(url.encode()), readable(manifest, url))
        self.name = url
        self.files: dict[str, Record] = dict(manifest["files"])
        if SHARDS_FILE not in self.files:
            mend = "pull it, `ip2p-encode` the same once more, and push it again"
            raise CacheError(f"{url} has no {SHARDS_FILE}, which caches of format 1 lack: {mend}")
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)  # of which each file has a byte
            weakref.finalize(self, os.close, self._locks)
            with whole(self.folder / "manifest.json") as unfinished:
                unfinished.write_bytes(seal)
        for path in manifest["files"]:
            self.fetch(path).close()
        self.files |= self.shards()

    def units(self) -> list[Unit]:
        """The units that are listed: of a whole cache they are those that have a record."""
        return [unit for path in self.files if (unit := unit_of(path))]

    def fetch(self, path: str) -> BinaryIO:
        """A file of the cache, open, and whole as its record says: the one that lies here, or fetched."""
        target, expected = self.folder / path, self.files[path]

        def ask() -> BinaryIO:
            self._download(path, target, expected["bytes"])
            if file := _opened(target, expected):
                return file
            raise CacheError(f"{self.name}/{path} arrives damaged: {whole_again(self.name)}")

        with self._disk(), self._alone(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            return _opened(target, expected) or _persistently(ask)

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        """Say of errors of this machine's disk which folder lies there."""
        mend = ": mend that, or name another folder"
        return explained(CacheError, f"--window_dir {self.folder.parent}", OSError, hint=mend)

    def _download(self, path: str, target: Path, size: int) -> None:
        """Write a new file. One that is there, which others may have mapped, is never changed."""
        target.unlink(missing_ok=True)
        try:
            with target.open("xb") as file:
                for start in range(0, size, PIECE):
                    asked = min(PIECE, size - start)
                    file.write(piece := self.place.read(path, start, start + asked))
                    if len(piece) != asked:  # the file ends here, however large it should be
                        break
        except BaseException as error:
            target.unlink(missing_ok=True)
            if isinstance(error, OSError):  # of this machine: a full disk
                error.filename = error.filename or str(target)
            raise

    @contextlib.contextmanager
    def _alone(self, path: str) -> Iterator[None]:
        """Keep a file to this process; one that dies holds nothing."""
        lock: Any = self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, google_crc32c.value(path.encode())
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(*lock)
                break
            time.sleep(0.02)  # to wait in the kernel, it would have to know that threads differ
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, *lock[2:])


def _opened(target: Path, expected: Record) -> BinaryIO | None:
    """A file, if it is there and what was written; else it is deleted."""
    with contextlib.suppress(FileNotFoundError):
        file = target.open("rb")
        if os.fstat(file.fileno()).st_size == expected["bytes"] and stream_record(file) == expected:
            return file
        file.close()
        target.unlink(missing_ok=True)
    return None


def _persistently(ask: Callable[[], T]) -> T:
    """What is asked of a store, again after a while where that is a `CacheError`, unless something is not there."""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except Missing:
            raise
        except CacheError as error:
            if pause is None:
                raise CacheError(f"{error}; tried {len(PAUSES) + 1} times") from None
            time.sleep(pause)
    raise AssertionError


def completed(cache: Cache) -> str:
    """What to do about a cache that lacks some of what it should hold."""
    if isinstance(cache, RemoteCache):
        return "run the same ip2p-encode again where it was made, and push it again"
    return "run the same ip2p-encode again"


def open_caches(places: Iterable[str], folders: Path) -> list[Cache]:
    """The caches in folders and at urls; the files of the latter come to lie in `folders`."""
    return [RemoteCache(place, folders.expanduser()) if is_url(place) else Cache.open(Path(place)) for place in places]
