"""A folder on any file system that fsspec knows: an object store, a server, a disk, memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem, url_to_fs
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from .errors import CacheError, reason
from .files import whole


class Place:
    """A folder on any file system that fsspec knows: an object store, a server, a disk, memory.

    Raises:
        CacheError: the store cannot be reached or refuses, in its own words; from all methods.
    """

    def __init__(self, url: str):
        self.url = url
        with self._errors():
            fs, root = url_to_fs(url)
        self.fs: AbstractFileSystem = fs
        self.root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file, by path."""
        with self._errors():
            self.fs.invalidate_cache()
            found: dict[str, Any] = self.fs.find(self.root, detail=True)  # type: ignore[assignment]
            return {name[len(self.root) + 1 :]: info["size"] for name, info in found.items()}

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The content of a file, or of some bytes of it."""
        with self._errors():
            return bytes(self.fs.cat_file(f"{self.root}/{path}", start=start, end=stop))  # type: ignore[arg-type]

    def write(self, path: str, content: bytes) -> None:
        """Write a whole file, over an older one; on the disk when this returns if the place is a local folder."""
        target = f"{self.root}/{path}"
        with self._errors():
            if isinstance(self.fs, LocalFileSystem):
                with whole(Path(target)) as unfinished:
                    unfinished.write_bytes(content)
                return
            if not isinstance(self.fs, AsyncFileSystem):  # object stores have no folders, and would make a bucket
                self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(target, content)

    def delete(self, path: str) -> None:
        """Delete a file."""
        with self._errors():
            self.fs.rm_file(f"{self.root}/{path}")

    def manifest(self) -> bytes:
        """The manifest as it is written; a `CacheError` where there is none."""
        with self._errors():
            is_cache = self.fs.exists(f"{self.root}/manifest.json")
        if not is_cache:
            raise CacheError(f"{self.url} is not a cache: it has no manifest.json")
        return self.read("manifest.json")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has exceptions of its own, all of them about what the user named
            raise CacheError(f"{self.url}: {reason(error)}") from None
