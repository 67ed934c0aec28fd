"""Copies a cache between any places that fsspec knows, file by file with its checksum, the manifest last."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

import google_crc32c

from ..base.console import amount, bar
from ..base.errors import CacheError, CacheMismatch
from ..base.files import unseal, whole_again
from ..base.store import Place
from ..cache.commits import inside, unit_of
from ..cache.format import differences

T = TypeVar("T")
Files = Mapping[str, Any]  # by path
THREADS = 8  # files in flight, each at most a shard (32 MiB, in large caches 256) in memory


class Copied(NamedTuple):
    """What a copy came to."""

    files: int
    bytes: int
    skipped: int  # files that were there already

    def __str__(self) -> str:
        there = f", {self.skipped:,} were there already" if self.skipped else ""
        return f"copied {self.files:,} files, {amount(self.bytes)}{there}"


def copy(source: Place, target: Place) -> Copied:
    """Copy a cache. What is at the target already, with the right checksum, stays.

    The manifest is written last, and taken away first where one is at the target: an interrupted copy is no cache.

    Raises:
        CacheError: no cache at the source, or one of which nothing is encoded; damage there or underway; or the target
            holds something else.
    """
    seal, there, found = source.manifest(), source.sizes(), target.sizes()
    manifest = unseal(seal, f"{source.url}/manifest.json")
    commits = _each(source.read, filter(_is_commit, there), "read records")
    if not commits:  # which are there from the first unit on
        samples = sum(manifest["counts"].values())
        raise CacheError(
            f"{source.url} holds no records in commits/, expected those of what is encoded of its {samples:,} samples: "
            "run the same ip2p-encode again, or copy a whole cache"
        )
    expected = dict(manifest["files"])
    for path, content in commits.items():
        expected |= unseal(content, f"{source.url}/{path}")["files"]
    inside(expected, source.url)
    if "manifest.json" in found:
        content, other = target.read("manifest.json"), manifest
        with contextlib.suppress(CacheError):  # damaged: it is replaced, as records are
            other = unseal(content, "")
        if lines := differences(other, manifest, ("identity", "encoding"), ("at the target", "at the source")):
            raise CacheMismatch("\n".join([f"{target.url} holds another cache: name an empty place", *lines]))
    _check_target(source, target, found, commits, expected)
    expected |= {path: _checksum(content) for path, content in commits.items()}

    def is_there(path: str) -> bool:
        return _checksum(target.read(path)) == expected[path]

    def transfer(path: str) -> None:
        content = source.read(path)
        if _checksum(content) != expected[path]:
            raise CacheError(f"{source.url}/{path} is damaged, or being written: {whole_again(source.url)}")
        target.write(path, content)
        if not is_there(path):
            raise CacheError(f"{target.url}/{path} arrived damaged: run the same command again")

    present = _each(is_there, [path for path in expected if found.get(path) == expected[path]["bytes"]], "compare")
    absent = [path for path in expected if not present.get(path)]
    if "manifest.json" in found:
        if not absent and target.read("manifest.json") == seal:
            return Copied(0, 0, len(expected) + 1)
        target.delete("manifest.json")
    sizes = {path: expected[path]["bytes"] for path in absent}
    _each(transfer, [path for path in absent if not _is_commit(path)], "copy", sizes)
    _each(transfer, filter(_is_commit, absent), "copy records")
    target.write("manifest.json", seal)
    return Copied(len(absent) + 1, sum(sizes.values()) + len(seal), len(expected) - len(absent))


def _check_target(source: Place, target: Place, found: Files, commits: Files, expected: Files) -> None:
    """Refuse to write over other files, or over a cache that holds what the source does not."""
    is_cache = "manifest.json" in found or any(map(_is_commit, found))
    if not is_cache and (others := sorted(set(found) - set(expected) - {".lock", ""})):
        raise CacheError(f"{target.url} holds other files ({others[0]}, …): name an empty place")
    for path, content in _each(target.read, filter(_is_commit, found), "compare records").items():
        if content == commits.get(path):
            continue
        try:
            unseal(content, "")
        except CacheError:  # damaged: it is replaced
            continue
        raise CacheError(
            f"{target.url} holds {path}, which {source.url} {'holds otherwise' if path in commits else 'lacks'}: "
            "name an empty place, or copy the other way"
        )


def _is_commit(path: str) -> bool:
    return path.startswith("commits/") and unit_of(path) is not None


def _checksum(content: bytes) -> dict[str, Any]:
    """Size and crc32c of the content of a file, as commit records hold them."""
    return {"bytes": len(content), "crc32c": f"{google_crc32c.value(content):08x}"}


def _each(work: Callable[[str], T], paths: Iterable[str], label: str, sizes: Files | None = None) -> dict[str, T]:
    """Do something to files, several at a time, and count them, or their bytes, on a bar."""
    pool, results = ThreadPoolExecutor(THREADS), {}
    futures = {pool.submit(work, path): path for path in paths}
    total = sum(sizes.values()) if sizes else len(futures)
    try:
        with bar(None, label, "B" if sizes else "file", total=total) as progress:
            for future in as_completed(futures):
                path = futures[future]
                results[path] = future.result()
                progress.update(sizes[path] if sizes else 1)
    finally:
        pool.shutdown(cancel_futures=True)
    return results
