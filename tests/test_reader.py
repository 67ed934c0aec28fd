"""Tests of encode/cache/reader.py: our reader and zarr-python see the same numbers."""

import mmap
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

import tiny
from ip2p.encode.base.errors import CacheError
from ip2p.encode.base.files import file_record, write_record
from ip2p.encode.cache import format as cache_module
from ip2p.encode.cache.format import Cache, chunk_rows, shard_rows
from ip2p.encode.cache.mapped import Shard
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.writer import write_state

Encode = Callable[..., None]


def a_file(folder: Path) -> Path:
    """The first file below a folder."""
    return min(path for path in folder.rglob("*") if path.is_file())


def compare(folder: Path) -> None:
    """Every row of every view, in random order, against zarr-python."""
    cache = Cache.open(folder)
    reader, group = Reader(cache), zarr.open_group(folder / "data.zarr", mode="r")
    table = cache.samples().filter(np.array(cache.samples()["status"].to_pylist()) == "ok")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(table))
    rows, text_rows = table["row"].to_numpy()[order], table["text_row"].to_numpy()[order]
    views = rng.integers(0, len(cache.views), len(order))
    out = {name: np.empty((len(order), *array.row_shape), np.float16) for name, array in reader.arrays.items()}
    reader.will_need(rows, views, text_rows)
    reader.take(out, rows, views, text_rows)
    for name, found in out.items():
        array = np.asarray(group[name][:])  # type: ignore[index]
        expected = array[text_rows] if name in ("text", "pooled") else array[rows, views]
        assert np.isfinite(expected).all()
        assert np.array_equal(found, expected), name


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("count", [64, 130])
def test_reader_and_zarr_python_agree(
    family: str,
    flip: bool,
    count: int,
    tmp_path: Path,
    encode: Encode,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full shards and a partial last one, one view and two, SD and SDXL."""
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 64)
    data = tiny.dataset(tmp_path / "data", tiny.pairs(count))
    encode(request.getfixturevalue(family), data, tmp_path / "cache", random_flip=flip)
    assert len(list((tmp_path / "cache" / "commits").glob("images-v0-*"))) == -(-count // 64)
    compare(tmp_path / "cache")


def test_a_cache_that_grew_is_read_right(sd: Path, tmp_path: Path, encode: Encode) -> None:
    """A partial shard keeps its place when new shards follow it."""
    for count in (10, 25):
        encode(sd, tiny.dataset(tmp_path / "data", tiny.pairs(count)), tmp_path / "cache", random_flip=True)
    compare(tmp_path / "cache")


def test_shards_that_others_wrote_are_read_through_zarr_python(cache: Path, tmp_path: Path) -> None:
    """Compressed arrays cannot be mapped: they are read once, and give the same numbers."""
    folder = shutil.copytree(cache, tmp_path / "cache")
    group = zarr.open_group(folder / "data.zarr", mode="a")
    for name in ("original", "edited", "text"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        values, chunks, shards = np.asarray(array[:]), array.chunks, array.shards
        group.create_array(
            name, data=values, chunks=chunks, shards=shards, compressors="auto", fill_value=np.nan, overwrite=True
        )
    for path in (folder / "commits").glob("*.json"):
        record = cache_module.read_record(path)
        record["files"] = {file: file_record(folder / file) for file in record["files"]}
        write_record(path, record)
    opened = Cache.open(folder)
    write_state(folder, opened.manifest, opened.samples(), opened.commits())
    compare(folder)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_missing_or_short_shard_is_refused(cache: Path, tmp_path: Path, damage: str) -> None:
    """zarr-python would read NaN there without a word; the reader names the file and the mend."""
    folder = shutil.copytree(cache, tmp_path / "cache")
    shard = a_file(folder / "data.zarr" / "edited" / "c")
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"edited.*verify"):
        Reader(Cache.open(folder))


def test_a_damaged_shard_index_is_refused(cache: Path, tmp_path: Path) -> None:
    """A bit flipped in the index at the end of a shard fails its checksum."""
    folder = shutil.copytree(cache, tmp_path / "cache")
    shard = a_file(folder / "data.zarr" / "text" / "c")
    content = bytearray(shard.read_bytes())
    content[-50] ^= 4
    shard.write_bytes(content)
    with pytest.raises(CacheError, match="checksum of its index"):
        Reader(Cache.open(folder))


@pytest.mark.parametrize(
    ("kind", "shapes", "expected"),
    [
        ("images", [(4, 32, 32), (8, 32, 32)], (1024, 64)),
        ("images", [(4, 64, 64), (8, 64, 64)], (512, 64)),
        ("images", [(4, 128, 128), (8, 128, 128)], (128, 64)),
        ("text", [(77, 768)], (256, 16)),
        ("text", [(77, 2048), (1280,)], (96, 16)),
    ],
)
def test_shards_keep_to_their_limits(kind: str, shapes: list[tuple[int, ...]], expected: tuple[int, int]) -> None:
    """At most 1024 rows and 32 MiB, whole chunks and pages of 64 KiB, for SD and SDXL at 256, 512 and 1024 pixels."""
    rows = shard_rows(kind, shapes)
    chunk = chunk_rows(kind, rows)
    assert (rows, chunk) == expected
    assert rows % chunk == 0
    for shape in shapes:
        assert rows * 2 * np.prod(shape) <= 32 * 2**20
        assert rows * 2 * np.prod(shape) % (4096 if shape == (1280,) else 65536) == 0


@pytest.mark.parametrize("page", [2**12, 2**14, 2**16])
def test_arrays_of_several_caches_are_mapped_and_not_copied(
    page: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pages a machine has, shards stay where they are, in the second cache and the second view as well."""

    def copied(_: object, shards: list[Shard]) -> None:
        pytest.fail(f"{shards[0].path} is copied")

    monkeypatch.setattr(mmap, "PAGESIZE", page)
    monkeypatch.setattr("ip2p.encode.cache.mapped.MappedArray._copy", copied)
    alone, twice = Reader(Cache.open(cache)), Reader(Cache.open(cache), Cache.open(cache))
    (_, second), (_, text) = twice.first_rows["images"], twice.first_rows["text"]
    rows, views, texts = np.arange(8), np.arange(8) % 2, np.arange(8) % 3
    shapes = {name: (8, *array.row_shape) for name, array in alone.arrays.items()}
    one, other = ({name: np.empty(shape, np.float16) for name, shape in shapes.items()} for _ in range(2))
    alone.take(one, rows, views, texts)
    twice.take(other, rows + second, views, texts + text)
    for name in shapes:
        assert np.array_equal(one[name], other[name])


@pytest.mark.parametrize("page", [2**14, 2**16])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_shards_of_small_pages_are_mapped_where_pages_are_larger(
    page: int,
    family: str,
    tmp_path: Path,
    encode: Encode,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shard that does not end where a page does is mapped by itself: caches made for 4 KiB open everywhere."""
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 8)
    monkeypatch.setattr(cache_module, "PAGES", (4096,))
    data = tiny.dataset(tmp_path / "data", tiny.pairs(30))
    encode(request.getfixturevalue(family), data, tmp_path / "cache", random_flip=True)
    monkeypatch.setattr(mmap, "PAGESIZE", page)
    monkeypatch.setattr("ip2p.encode.cache.mapped.MappedArray._copy", None)
    assert any(array._shifts is not None for array in Reader(Cache.open(tmp_path / "cache")).arrays.values())
    compare(tmp_path / "cache")
