"""The small tables of a cache: its samples, and the list of its shards, in Parquet files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..base.files import sealed, whole
from .commits import DIGITS, Commit, inside

SAMPLES_FILE, SHARDS_FILE = "samples.parquet", "units.parquet"
KEYS = ("key", "pair")  # 16 bytes each on the disk
SEAL = b"ip2p.crc32c"  # in the metadata of each file
SCORES = pa.schema(  # of pairs by CLIP, beside the columns that are kept of the dataset
    [
        ("clip_image", pa.float32()),
        ("clip_direction", pa.float32()),
        ("clip_t", pa.float32()),
        ("clip_of", pa.binary(DIGITS // 2)),  # identity of what was judged: both files and their captions
    ]
)
SHARDS = pa.schema([("path", pa.string()), ("bytes", pa.int64()), ("crc32c", pa.string())])


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, complete or not at all, with a seal; equal tables give equal bytes."""
    table = table.combine_chunks().replace_schema_metadata({SEAL: b"0" * 8})
    with whole(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
        unfinished.write_bytes(_sealed(unfinished.read_bytes()))


def is_sealed(path: Path) -> bool:
    """Whether a Parquet file is there and, by its own seal, what was written."""
    return path.is_file() and (content := path.read_bytes()) == _sealed(content)


def _sealed(content: bytes) -> bytes:
    mark = SEAL + b"\x18\x08"  # the next field of the footer: text of 8 bytes
    return sealed(content, content.rfind(mark) + len(mark))


def packed_keys(keys: pa.ChunkedArray) -> bytes:
    """Keys in text as 16 bytes each, one behind the other."""
    return bytes.fromhex(_content(keys.cast(pa.binary(DIGITS))).decode())


def _content(column: pa.ChunkedArray) -> bytes:
    """The bytes of a column whose values are all of one size and none null."""
    width = column.type.byte_width
    parts = ((part.buffers()[1], part.offset * width, len(part) * width) for part in column.chunks if len(part))
    return b"".join(buffer[start : start + size].to_pybytes() for buffer, start, size in parts)


def write_samples(path: Path, samples: pa.Table) -> None:
    """Write a table of samples, whose keys are text in memory."""
    for name in KEYS:
        packed = pa.Array.from_buffers(
            pa.binary(DIGITS // 2), len(samples), [None, pa.py_buffer(packed_keys(samples[name]))]
        )
        samples = samples.set_column(samples.column_names.index(name), name, packed)
    write_table(path, samples)


def read_samples(path: Path, known: pa.Schema, columns: Sequence[str] = ()) -> pa.Table:
    """Read a table of samples, or some columns of it: those that are `known` have these types, others the file's.

    What an earlier version did not know is null.
    """
    there = pq.read_schema(path).names
    columns = columns or list(dict.fromkeys([*known.names, *there]))
    table = pq.read_table(path, columns=[name for name in columns if name in there])
    for name in set(KEYS) & set(table.column_names):
        if pa.types.is_fixed_size_binary(table.field(name).type):  # in format 1 it is text
            digits = _content(table[name]).hex().encode()
            keys = pa.Array.from_buffers(pa.binary(DIGITS), len(table), [None, pa.py_buffer(digits)])
            table = table.set_column(table.column_names.index(name), name, keys.cast(pa.string()))
    for field in known:
        if field.name in set(columns) - set(there):
            table = table.append_column(field, pa.nulls(len(table), field.type))
    table = table.select([name for name in columns if name in table.column_names])
    return table.cast(pa.schema([known.field(f.name) if f.name in known.names else f for f in table.schema]))


def write_shards(path: Path, commits: Mapping[Any, Commit]) -> None:
    """Write the list of all files that commit records name."""
    files = {name: file for commit in commits.values() for name, file in commit.files.items()}
    write_table(path, pa.Table.from_pylist([{"path": name} | files[name] for name in sorted(files)], SHARDS))


def read_shards(path: Path) -> dict[str, Any]:
    """Size and checksum of each shard by its path; a `CacheError` if one leads elsewhere."""
    files = {row.pop("path"): row for row in pq.read_table(path, schema=SHARDS).to_pylist()}
    inside(files, path)
    return files
