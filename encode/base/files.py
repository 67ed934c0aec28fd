"""Files that are there whole or not at all, and their checksums."""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c

from .errors import CacheError, SettingsError

IRREPLACEABLE = (
    "no other file says how the cache was encoded: `ip2p-cache pull` (or push) a copy over it, or delete the cache "
    "and encode anew"
)
"""What is said of a manifest that is lost."""
UNFINISHED = re.compile(r"\..+\.\d+|.+\.partial")
"""Names of files that were being written when their process was killed: by `whole`, or by zarr-python."""
URL = re.compile(r"[a-z][\w.+:-]+:/")
"""How a `Path` begins that was made of a url."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; what was written is put in place at the end, unless an error ends it.

    The folder is made if need be. The data is on the disk before the name is, and both are when this returns.
    """
    unfinished = path.with_name(f".{path.name[:32]}.{os.getpid()}")  # a name may have 255 bytes, a letter four
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:  # in the words of whoever asked for the file
        error.filename = str(path) if error.filename in (None, str(unfinished)) else error.filename
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def check_folder(folder: Path, flag: str, instead: str = "") -> None:
    """Refuse a place where no folder can be, or none that can be written in, before any work; nothing is made.

    Args:
        instead: what is said to whoever names a url, as a colon and a sentence.

    Raises:
        SettingsError: it is a url; a file is there, or above it; permission is lacking; no such name can be.
    """
    if is_url(folder):
        url = str(folder).replace(":/", "://", 1)  # of which a `Path` keeps one slash
        raise SettingsError(f"{flag} {url} is a url, expected a folder of this machine{instead}")
    try:
        there = next(path for path in (folder, *folder.parents) if _is_there(path))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        tempfile.TemporaryFile(dir=there).close()
    except (OSError, ValueError) as error:  # also a name that is too long, a loop of links, a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"{flag} {folder} cannot be written: {why}") from None


def check_cache(folder: Path) -> None:
    """Raise CacheError for a folder that holds no cache."""
    if not (folder / "manifest.json").is_file():
        raise CacheError(f"{folder} is not a cache: it has no manifest.json (make one with ip2p-encode --cache)")


def check_file(file: Path, flag: str) -> None:
    """Refuse, as `check_folder` does, a place where no file can be written."""
    check_folder(file.parent, flag)
    if file.is_dir():
        raise SettingsError(f"{flag} {file} cannot be written: it is a folder, expected the name of a file")


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path.is_symlink()  # to nowhere: no folder can be made in its place
    return True


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; Windows waits for no folder, and for no file that is but read."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_key(*parts: bytes) -> str:
    """Identity of content: 128 bits of BLAKE2b over the parts, each with its length, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def content_keys(parts: Iterable[bytes]) -> Iterator[str]:
    """`content_key` of each of many short ones, in two thirds of the time."""
    return (hashlib.blake2b(len(part).to_bytes(8, "little") + part, digest_size=16).hexdigest() for part in parts)


def file_state(path: str | os.PathLike[str]) -> bytes:
    """Name, size and time of the last change of a file: changes whenever its content may have changed."""
    try:
        status = os.stat(path)
        state = f"{path}|{status.st_size}|{status.st_mtime_ns}\n"
    except (OSError, ValueError):  # a name that no file can have is one of a file that is missing
        state = f"{path}|missing\n"
    return storable(state).encode()


def storable(text: str) -> str:
    """A text itself, or with what is no character (JSON and names of files may hold halves of some) written out."""
    return text.encode(errors="backslashreplace").decode()


def is_url(place: str | Path) -> bool:
    """Whether a name is one that fsspec knows a file system for, instead of a file or folder of this machine."""
    return "://" in str(place) or (isinstance(place, Path) and bool(URL.match(str(place))))


def whole_again(place: str) -> str:
    """What to do about damage in a cache, by the name of one of its files."""
    if is_url(place):
        return "push it again from a whole copy"
    return (
        IRREPLACEABLE if place.endswith("manifest.json") else "`ip2p-cache verify` says what is affected and mends it"
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and crc32c of a file."""
    with path.open("rb") as file:
        return stream_record(file)


def stream_record(file: BinaryIO) -> dict[str, Any]:
    """Size in bytes and crc32c of what is left to read of a file."""
    checksum = google_crc32c.Checksum()
    size = sum(map(len, checksum.consume(file, 2**22)))
    return {"bytes": size, "crc32c": checksum.hexdigest().decode()}


def write_record(path: Path, record: dict[str, Any], indent: int | None = 1) -> None:
    """Write a JSON file that ends in its own checksum: the crc32c of its bytes with eight zeros in that place."""
    text = json.dumps(record | {"crc32c": "0" * 8}, indent=indent)
    with whole(path) as unfinished:
        content = f"{text[:-1].rstrip()}\n}}".encode()
        unfinished.write_bytes(sealed(content, len(content) - 11))


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote; a CacheError where it is unreadable, or different from what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror})") from None
    return unseal(content, str(path))


def unseal(content: bytes, name: str) -> dict[str, Any]:
    """The record in the bytes of a file called `name`; a CacheError where its checksum is wrong."""
    if content != sealed(content, len(content) - 11):
        raise CacheError(f"{name} is damaged (wrong checksum): {whole_again(name)}")
    record = json.loads(content)
    del record["crc32c"]
    return record


def sealed(content: bytes, at: int) -> bytes:
    """Content whose eight digits from `at` on are the crc32c of all of it with zeros in their place."""
    head, tail = content[:at], content[at + 8 :]
    return head + b"%08x" % google_crc32c.value(head + b"0" * 8 + tail) + tail
