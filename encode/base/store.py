"""A folder on any file system that fsspec knows: an object store, a server, a disk, memory."""

from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem, url_to_fs
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from .errors import CacheError, explained
from .files import whole, whole_again


class Missing(CacheError):
    """A file that a place does not have: to ask again is of no use."""


class Place:
    """A folder on any file system that fsspec knows: an object store, a server, a disk, memory.

    Each store has exceptions of its own, all of them about what the user named.

    Raises:
        CacheError: the store cannot be reached or refuses, in its own words; from all methods.
    """

    def __init__(self, url: str):
        self.url = url
        with explained(CacheError, url):
            fs, root = url_to_fs(url)
        self.fs: AbstractFileSystem = fs
        self.root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file, by path."""
        with explained(CacheError, self.url):
            self.fs.invalidate_cache()
            found: dict[str, Any] = self.fs.find(self.root, detail=True)  # type: ignore[assignment]
            return {name[len(self.root) + 1 :]: info["size"] for name, info in found.items()}

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The content of a file, or of some bytes of it; `Missing` where it is not there."""
        name = f"{self.url}/{path}"
        with explained(CacheError, name):
            try:
                return bytes(self.fs.cat_file(f"{self.root}/{path}", start=start, end=stop))  # type: ignore[arg-type]
            except FileNotFoundError:
                raise Missing(f"{name} is missing: {whole_again(name)}") from None

    def write(self, path: str, content: bytes) -> None:
        """Write a whole file, over an older one; on the disk when this returns if the place is a local folder."""
        target = f"{self.root}/{path}"
        with explained(CacheError, self.url):
            if isinstance(self.fs, LocalFileSystem):
                with whole(Path(target)) as unfinished:
                    unfinished.write_bytes(content)
                return
            if not isinstance(self.fs, AsyncFileSystem):  # object stores have no folders, and would make a bucket
                self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(target, content)

    def delete(self, path: str) -> None:
        """Delete a file."""
        with explained(CacheError, self.url):
            self.fs.rm_file(f"{self.root}/{path}")

    def manifest(self) -> bytes:
        """The manifest as it is written; `Missing` where there is none."""
        try:
            return self.read("manifest.json")
        except Missing:
            raise Missing(f"{self.url} is not a cache: it has no manifest.json") from None
