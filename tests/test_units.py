"""Tests of the list of shards, of the paths that a cache names, and of the sizes of shards that it was begun with."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import fakes
from ip2p.encode.base.errors import CacheError
from ip2p.encode.base.files import read_record, write_record
from ip2p.encode.cache.format import Cache, shard_rows
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.samples import Ledger
from ip2p.encode.cache.tables import read_shards, write_shards
from ip2p.encode.cache.writer import exclusive, write_state
from ip2p.encode.cached import Samples
from ip2p.encode.data.pairs import Pair
from ip2p.encode.keeper.transfer import Place, copy
from ip2p.encode.keeper.verify import repair, verify


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    """A copy of a finished cache."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def test_training_opens_a_cache_without_its_records(copied: Path) -> None:
    """Their names must be there; what they say stands in units.parquet, and the keys of samples.parquet are binary."""
    named = {path: file for commit in Cache.open(copied).commits().values() for path, file in commit.files.items()}
    assert Cache.open(copied).shards() == named
    expected = Samples.of_all(Reader(Cache.open(copied)), None)
    for path in (copied / "commits").iterdir():
        path.write_text("not to be read")
    found = Samples.of_all(Reader(Cache.open(copied)), None)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    types = pq.read_schema(copied / "samples.parquet")
    assert [str(types.field(name).type) for name in ("key", "pair")] == ["fixed_size_binary[16]"] * 2


def test_where_the_list_and_the_records_differ_the_records_are_right(copied: Path) -> None:
    """`verify` says so, and `--repair` writes the list anew."""
    cache = Cache.open(copied)
    whole = (copied / "units.parquet").read_bytes()
    commits = cache.commits()
    for unit in (min(commits), max(commits)):
        files = {path: file | {"crc32c": "00000000"} for path, file in commits[unit].files.items()}
        write_state(copied, cache.manifest, cache.samples(), commits | {unit: commits[unit]._replace(files=files)})
        (finding,) = verify(copied)
        assert finding.path == "units.parquet"
        assert "differs from the commit records" in finding.problem
        repair(copied, [finding])
        assert verify(copied) == []
        assert (copied / "units.parquet").read_bytes() == whole


OUTSIDE = ["../secret", "data.zarr/edited/c/../../../../secret", "/etc/passwd", "data.zarr/../../secret/c/0", "a\n"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("where", ["commits/text-000000.json", "manifest.json", "units.parquet"])
def test_no_path_leads_out_of_a_cache(where: str, path: str, copied: Path, tmp_path: Path) -> None:
    """Whoever names one, under a seal or not, is refused by all that open, check or copy; nothing is written there."""
    (tmp_path / "secret").write_text("mine")
    file = {"bytes": 4, "crc32c": "01234567"}
    if where == "units.parquet":
        cache = Cache.open(copied)
        commit = next(iter(cache.commits().values()))
        write_state(copied, cache.manifest, cache.samples(), {0: commit._replace(files={path: file})})  # type: ignore[dict-item]
        assert list(pq.read_table(copied / where)["path"].to_pylist()) == [path]
        with pytest.raises(CacheError, match="which is no file of a cache"):
            Reader(Cache.open(copied))
    else:
        record = read_record(copied / where)
        write_record(copied / where, record | {"files": record["files"] | {path: file}})
        with pytest.raises(CacheError, match="which is no file of a cache"):
            Ledger.of(Cache.open(copied))
        with pytest.raises(CacheError, match="which is no file of a cache"):
            copy(Place(str(copied)), Place(str(tmp_path / "deep" / "copy")))
    if where == "manifest.json":
        with pytest.raises(CacheError, match="which is no file of a cache"):
            verify(copied)
    else:
        assert any(finding.path == where and "no file of a cache" in finding.problem for finding in verify(copied))
    assert (tmp_path / "secret").read_text() == "mine"


def test_a_cache_keeps_the_shards_that_it_was_begun_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is usual when it grows: rows are found by the size in the manifest."""
    source = fakes.Pairs(Pair(fakes.png(n), fakes.png(n + 1), f"{n}") for n in range(6))
    fakes.install(monkeypatch, source, 4)
    fakes.encode(tmp_path)
    source += [Pair(fakes.png(n), fakes.png(n), f"{n}") for n in range(20, 29)]
    fakes.install(monkeypatch, source, 1024)
    fakes.encode(tmp_path)
    cache = Cache.open(tmp_path)
    assert cache.shard_rows == {"images": 4, "text": 4}
    assert cache.samples()["row"].to_pylist() == [*range(6), *range(8, 17)]
    assert verify(tmp_path) == []


@pytest.mark.parametrize(("samples", "rows"), [(999_999, 1024), (1_000_000, 8192), (4_000_000, 8192)])
def test_shards_of_large_caches_are_large(samples: int, rows: int) -> None:
    """At most 8192 rows and 256 MiB from a million samples on, so that there are few files to open."""
    assert shard_rows("images", [(4, 32, 32), (8, 32, 32)], samples) == rows
    assert shard_rows("images", [(4, 128, 128), (8, 128, 128)], samples) == rows // 8


def test_records_have_no_indentation(cache: Path) -> None:
    """A record is two lines: a megabyte of spaces would be read for each thousand rows."""
    for path in (cache / "commits").iterdir():
        assert len(path.read_text().splitlines()) == 2
        json.loads(path.read_text())


def test_equal_tables_are_equal_files(cache: Path, tmp_path: Path, encode: Callable[..., None]) -> None:
    """Whatever order the records come in, so that copies compare equal."""
    commits = Cache.open(cache).commits()
    write_shards(tmp_path / "units.parquet", dict(reversed(commits.items())))
    assert (tmp_path / "units.parquet").read_bytes() == (cache / "units.parquet").read_bytes()
    assert read_shards(tmp_path / "units.parquet") == Cache.open(cache).shards()


FOREIGN = """
import fcntl, os, struct, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
kind = fcntl.F_WRLCK if sys.argv[2] == "alone" else fcntl.F_RDLCK
try:
    fcntl.fcntl(lock, fcntl.F_SETLK, struct.pack("hhqqi", kind, os.SEEK_SET, 0, 0, 0))
except OSError as error:
    print("kept out", flush=True)
else:
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_a_foreign_writer_that_follows_the_format_is_kept_out_and_keeps_out(copied: Path) -> None:
    """The lock is the record lock that docs/cache-format.md names, made of system calls alone."""
    command = [sys.executable, "-c", FOREIGN, copied / ".lock"]
    with exclusive(copied):
        assert subprocess.run([*command, "shared"], capture_output=True, text=True, check=True).stdout == "kept out\n"
    with exclusive(copied, shared=True):
        assert subprocess.run([*command, "alone"], capture_output=True, text=True, check=True).stdout == "kept out\n"
    with subprocess.Popen([*command, "shared"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(CacheError, match="is being written"), exclusive(copied):
            pass
        with exclusive(copied, shared=True):
            other.communicate("")
