"""Pairs in WebDataset tar files, local or by url: members are found through an index and read by seeking."""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

import braceexpand
import datasets.config
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from ..base.errors import SourceError, reason
from ..base.files import content_key, file_state, whole
from ..cache.format import write_table
from ..config import EncodeConfig
from .columns import IMAGES, TEXT, choose, is_image_name

# The rules of the webdataset package: the key of a sample ends at the first dot of the file name, neighbors with the
# same key are one sample, and names like __this__ are metadata.
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
METADATA = re.compile(r"__[^/]*__($|/)")
MEMBERS = pa.schema([("sample", pa.int32()), ("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
GLANCE = 16  # samples that show what there is
DOWNLOADS = 8  # at once


class Tars:
    """Rows of tar files, in order.

    Args:
        shards: the files.
        indexes: for each the members of its samples, as `index` finds them.
        columns: for originals, edited images and instructions a suffix, or for the latter a key in a JSON member.
        members: the suffix of the member that holds each column.
    """

    def __init__(
        self, shards: Sequence[Path], indexes: Sequence[pa.Table], columns: tuple[str, ...], members: Sequence[str]
    ):
        self.columns = columns
        self._shards, self._members = shards, members
        counts = [_samples(index) for index in indexes]
        self._ends = np.cumsum(counts, dtype=np.int64)
        # Where each member lies: offset and size, the size -1 where a sample lacks it. (rows, columns, 2)
        self._places = np.full((sum(counts), len(columns), 2), -1, np.int64)
        for first, index in zip(self._ends - counts, indexes, strict=True):
            suffixes = index["suffix"].to_numpy()
            places = np.stack([index["offset"].to_numpy(), index["size"].to_numpy()], 1)
            for column, member in enumerate(members):
                found = suffixes == member
                self._places[first + index["sample"].to_numpy()[found], column] = places[found]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        original, edited, *texts = self._read(row, range(len(self.columns)))
        return original, edited, *self._values(texts)

    def instructions(self) -> Iterator[tuple[Any, ...]]:
        """The instructions of all rows."""
        texts = range(2, len(self.columns))
        return (tuple(self._values(self._read(row, texts))) for row in range(len(self)))

    def group(self, _row: int) -> None:
        """Every instruction is a prompt of its own."""

    def fingerprint(self) -> str:
        """Changes with name, size or time of any file."""
        return content_key(*(file_state(shard).encode() for shard in self._shards))

    def _read(self, row: int, columns: Iterable[int]) -> list[bytes | None]:
        contents: list[bytes | None] = []
        shard = self._shards[int(np.searchsorted(self._ends, row, side="right"))]
        with shard.open("rb") as file:
            for offset, size in self._places[row, list(columns)]:
                file.seek(max(offset, 0))
                contents.append(file.read(size) if size >= 0 else None)
        return contents

    def _values(self, texts: Iterable[bytes | None]) -> Iterator[Any]:
        for text, member, column in zip(texts, self._members[2:], self.columns[2:], strict=True):
            value = None if text is None else _content(text, member)
            yield value.get(column) if isinstance(value, dict) else value


def open_tars(config: EncodeConfig, name: str) -> Tars:
    """Open the tar files that a name with braces, stars or neither stands for; urls are copied first.

    Raises:
        SourceError: a file that is missing or no tar file, or another column than there is.
    """
    cache = Path(config.model.cache_dir or datasets.config.HF_DATASETS_CACHE) / "tars"
    cache.mkdir(parents=True, exist_ok=True)
    files = _files(name)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        copies = pool.map(lambda file: _local(file, cache), files)
        shards = list(tqdm(copies, desc="fetch shards", total=len(files), disable="://" not in name))
    indexes = [_kept_index(shard, cache) for shard in tqdm(shards, desc="index shards", leave=False)]
    kinds, members = _glance(shards[0], indexes[0])
    columns = choose(config, name, kinds)
    return Tars(shards, indexes, columns, [members[column] for column in columns])


def index(shard: Path) -> pa.Table:
    """The members of all samples of a tar file: number of the sample, suffix, offset and size in bytes.

    Raises:
        SourceError: no tar file, a compressed or a truncated one, or one that holds a member of a sample twice.
    """
    rows: list[dict[str, Any]] = []
    sample, key, seen = -1, None, set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all in memory
                match = NAME.fullmatch(member.name)
                if not member.isreg() or METADATA.match(member.name) or not match:
                    continue
                if match[1] != key:
                    sample, key, seen = sample + 1, match[1], set()
                if (suffix := match[2].lower()) in seen:
                    raise SourceError(f"{shard} holds {member.name} twice")
                seen.add(suffix)
                values = (sample, suffix, member.offset_data, member.size)
                rows.append(dict(zip(MEMBERS.names, values, strict=True)))
    except (OSError, tarfile.TarError) as error:
        raise SourceError(f"{shard} cannot be read as an uncompressed tar file: {error}") from None
    return pa.Table.from_pylist(rows, schema=MEMBERS)


def _kept_index(shard: Path, cache: Path) -> pa.Table:
    """The index of a shard, made once: finding 100,000 samples takes some ten seconds."""
    kept = cache / f"{content_key(file_state(shard.resolve()).encode())}.parquet"
    if not kept.is_file():
        write_table(kept, index(shard))
    return pq.read_table(kept)


def _glance(shard: Path, index: pa.Table) -> tuple[dict[str, str], dict[str, str]]:
    """What the columns of the first samples hold, and in which member each is: suffixes and keys of JSON objects."""
    kinds: dict[str, str] = {}
    members: dict[str, str] = {}
    with shard.open("rb") as file:
        for member in index.filter(pc.field("sample") < GLANCE).to_pylist():
            suffix = member["suffix"]
            file.seek(member["offset"])
            image = is_image_name(f"x.{suffix}")
            value = None if image else _content(file.read(member["size"]), suffix)
            for column, text in (value if isinstance(value, dict) else {suffix: value}).items():
                kind = IMAGES if image else TEXT if isinstance(text, str | list) else type(text).__name__
                kinds.setdefault(column, kind)
                members.setdefault(column, suffix)
    return kinds, members


def _content(content: bytes, member: str) -> Any:
    """The text of a member, or the value of a JSON one; None where it cannot be read."""
    try:
        return json.loads(content) if member.endswith("json") else content.decode().strip()
    except ValueError:
        return None


def _samples(index: pa.Table) -> int:
    return index["sample"][-1].as_py() + 1 if len(index) else 0


def _files(name: str) -> list[str]:
    """What a name with braces or stars stands for."""
    names = list(braceexpand.braceexpand(name))
    files = [file for part in names for file in ([part] if "://" in part else sorted(glob(part)) or [part])]
    if missing := [file for file in files if "://" not in file and not Path(file).is_file()]:
        raise SourceError(f"{missing[0]} is not there; --dataset_name {name} stands for {len(files):,} tar files")
    return files


def _local(name: str, cache: Path) -> Path:
    """The file itself, or the copy of what a url names; a copy is complete or absent."""
    if "://" not in name:
        return Path(name)
    copy = cache / f"{content_key(name.encode())}.tar"
    if not copy.is_file():
        try:
            with whole(copy) as unfinished:
                files, path = fsspec.url_to_fs(name)
                files.get_file(path, str(unfinished))
        except Exception as error:  # each protocol raises kinds of its own
            raise SourceError(f"{name} cannot be fetched: {reason(error)}") from None
    return copy
