"""Rows in WebDataset tar files, local or by url: members are found through an index and read by seeking."""

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import datasets.config
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

from ..base.console import bar
from ..base.errors import SampleError, SourceError, explained
from ..base.files import content_key, file_state, storable, whole
from ..cache.tables import write_table
from .columns import IMAGES, TEXT, Pick, Role, Rows, is_image_name, kinds_of

METADATA = re.compile(r"__[^/]*__($|/)")  # what webdataset's `tar_file_iterator` passes over
MEMBERS = pa.schema([("sample", pa.int32()), ("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
GLANCE = 16  # samples that show what there is
DOWNLOADS = 8  # at once


class Tars(Rows):
    """Rows of the tar files that a name with braces, stars or neither stands for, in order; urls are copied first.

    A column is a suffix, or for texts a key in a JSON member.

    Raises:
        SourceError: a file that is missing or no tar file, or another column than there is.
    """

    def __init__(self, name: str, pick: Pick, cache_dir: Path | None):
        cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "tars"
        cache.mkdir(parents=True, exist_ok=True)
        files = _files(name)
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            copies = pool.map(lambda file: _local(file, cache), files)
            self._shards = list(bar(copies, "fetch shards", "file", total=len(files)) if "://" in name else copies)
        indexes = [_kept_index(shard, cache) for shard in bar(self._shards, "index shards", "file")]
        kinds, members = _glance(self._shards[0], indexes[0])
        self.columns = pick(kinds)
        self._members = {role: members[column] for role, column in self.columns.items()}
        self._ends = np.cumsum([_samples(index) for index in indexes])
        self._places = {
            role: np.concatenate([_places(index, member) for index in indexes])  # (rows, 2)
            for role, member in self._members.items()
        }

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        shard = self._shards[int(np.searchsorted(self._ends, row, side="right"))]
        with explained(SampleError, "the tar file cannot be read", OSError), shard.open("rb") as file:
            return tuple(self._cell(file, row, role) for role in roles)

    def fingerprint(self) -> str:
        """Changes with name, size or time of any file."""
        return content_key(*map(file_state, self._shards))

    def _cell(self, file: BinaryIO, row: int, role: Role) -> Any:
        offset, size = self._places[role][row]
        if size < 0:
            return None
        file.seek(offset)
        content = file.read(size)
        if role.holds == IMAGES:
            return content
        column, member = self.columns[role], self._members[role]
        value = _text(content, member)
        if isinstance(value, dict):
            return value.get(column)
        if column != member:
            raise SampleError(f"{member} holds {type(value).__name__}, expected an object with {column}")
        return value


def index(shard: Path) -> pa.Table:
    """The members of all samples of a tar file: number of the sample, suffix, offset and size in bytes.

    Raises:
        SourceError: no tar file, a compressed or a truncated one, or one that holds a member twice.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            rows = [
                dict(zip(MEMBERS.names, (number, storable(suffix), *place), strict=True))
                for number, sample in enumerate(group_by_keys(_members(tar)))
                for suffix, place in sample.items()
                if suffix not in ("__key__", "__url__")
            ]
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{shard} cannot be read as an uncompressed tar file: {error}") from None
    except ValueError as error:  # of webdataset
        raise SourceError(f"{shard} holds a member twice: {error.args[0]}") from None
    return pa.Table.from_pylist(rows, schema=MEMBERS)


def _members(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The members as webdataset groups them, with offset and size in the place of the content."""
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # or it would keep them all in memory
        if member.isreg() and not METADATA.match(member.name):
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": tar.name}


def _kept_index(shard: Path, cache: Path) -> pa.Table:
    """The index of a shard, made once: finding 100,000 samples takes some ten seconds."""
    kept = cache / f"{content_key(file_state(shard.resolve()))}.parquet"
    if not kept.is_file():
        write_table(kept, index(shard))
    return pq.read_table(kept)


def _glance(shard: Path, index: pa.Table) -> tuple[dict[str, list[str]], dict[str, str]]:
    """What the columns of the first samples hold, and in which member each is: suffixes and keys of JSON objects."""
    values: defaultdict[str, list[Any]] = defaultdict(list)
    members: dict[str, str] = {}
    with shard.open("rb") as file:
        for member in index.filter(pc.field("sample") < GLANCE).to_pylist():
            suffix = member["suffix"]
            file.seek(member["offset"])
            value: Any = b""
            if not is_image_name(f"x.{suffix}"):
                try:
                    value = _text(file.read(member["size"]), suffix)
                except SampleError:
                    value = None
            for column, held in (value if isinstance(value, dict) else {suffix: value}).items():
                values[column].append(held)
                members.setdefault(column, suffix)
    return {column: kinds_of(held) or [TEXT] for column, held in values.items()}, members


def _text(content: bytes, member: str) -> Any:
    """The text of a member, or the value of a JSON one; a `SampleError` where it cannot be read."""
    with explained(SampleError, f"{member} cannot be read"):
        return json.loads(content) if member.endswith("json") else content.decode().strip()


def _places(index: pa.Table, member: str) -> np.ndarray:
    """Offset and size of a member in each sample, (samples, 2); the size is -1 where a sample lacks it."""
    places = np.full((_samples(index), 2), -1, np.int64)
    found = index.filter(pc.field("suffix") == member)
    places[found["sample"].to_numpy()] = np.stack([found["offset"].to_numpy(), found["size"].to_numpy()], 1)
    return places


def _samples(index: pa.Table) -> int:
    return index["sample"][-1].as_py() + 1 if len(index) else 0


def _files(name: str) -> list[str]:
    """What a name stands for: itself, the tar files in a folder, or what its braces and stars make of it."""
    if Path(name).is_dir():
        return sorted(str(file) for file in Path(name).iterdir() if file.suffix.lower() == ".tar")
    if Path(name).is_file():
        return [name]
    # A variable that is not set, braces without an end.
    with explained(SourceError, f"{name} stands for no files", AssertionError, ValueError):
        names = expand_urls(name)
    files = [file for part in names for file in ([part] if "://" in part else sorted(glob(part)) or [part])]
    if missing := [file for file in files if "://" not in file and not Path(file).is_file()]:
        raise SourceError(f"{missing[0]} is not there; {name} stands for {len(files):,} tar files")
    return files


def _local(name: str, cache: Path) -> Path:
    """The file itself, or the copy of what a url names; a copy is complete or absent."""
    if "://" not in name:
        return Path(name)
    copy = cache / f"{content_key(name.encode())}.tar"
    if not copy.is_file():
        with explained(SourceError, f"{name} cannot be fetched"), whole(copy) as unfinished:
            files, path = fsspec.url_to_fs(name)
            files.get_file(path, str(unfinished))
    return copy
