"""Tests of encode/planning/index.py and of encodes that find all done: what was read once is not read again."""

from pathlib import Path
from typing import Any

import pytest

import fakes
from ip2p.encode.base.errors import CacheError, SampleError
from ip2p.encode.cache.format import Cache
from ip2p.encode.data.pairs import Pair
from ip2p.encode.keeper.verify import Finding, repair, verify
from ip2p.encode.planning import index as module
from ip2p.encode.planning.index import Index

ROWS = 4


class Source(fakes.Pairs):
    """A dataset that notes what is read of it, and fails where it is told to."""

    def __init__(self, count: int):
        super().__init__(Pair(fakes.png(n), fakes.png(n + 1), f"{n}") for n in range(count))
        self.read: list[int] = []
        self.failing: dict[int, BaseException] = {}

    def __getitem__(self, position: Any) -> Any:
        """A pair; that it was read is noted."""
        self.read.append(position)
        if position in self.failing:
            raise self.failing[position]
        return super().__getitem__(position)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """Twenty-three pairs in blocks of five, read two at a time."""
    monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(module, "BATCH", 2)
    found = Source(23)
    fakes.install(monkeypatch, found, ROWS)
    return found


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_reading(processes: int, source: Source, tmp_path: Path) -> None:
    """Each sample is read once, by whichever process; together they know what one alone would."""
    for process in range(processes):
        Index(tmp_path, "print", 23, fakes.SQUARES).make(source, 0, process, processes)  # type: ignore[arg-type]
    assert sorted(source.read) == list(range(23))
    table = Index(tmp_path, "print", 23, fakes.SQUARES).read()
    assert table["position"].to_pylist() == list(range(23))
    assert table.equals(module.identify(source, fakes.SQUARES, range(23)))  # type: ignore[arg-type]


def test_an_encode_that_was_killed_while_it_read_reads_only_the_rest(source: Source, tmp_path: Path) -> None:
    """Whole blocks stay, and go once the plan is written; another dataset takes nothing from them."""
    source.failing = {17: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        fakes.encode(tmp_path)
    assert len(list((tmp_path / ".index").iterdir())) == 3
    source.failing = {}
    source.read.clear()
    fakes.encode(tmp_path)
    assert sorted(source.read[:8]) == list(range(15, 23))
    assert not (tmp_path / ".index").exists()
    assert verify(tmp_path) == []
    (tmp_path / ".index").mkdir()
    Index(tmp_path, "other", 23, fakes.SQUARES).make(source, 0)  # type: ignore[arg-type]
    assert verify(tmp_path) == []  # it is no damage
    source[0] = source[0]._replace(instruction="new")
    source.read.clear()
    fakes.encode(tmp_path)
    assert sorted(source.read[:23]) == list(range(23))


@pytest.mark.parametrize("damage", ["a bit", "cut", "deleted"])
def test_a_block_that_was_damaged_is_read_again(damage: str, source: Source, tmp_path: Path) -> None:
    """Parquet's own checksums leave out much of a file: its name holds one of all of it."""
    index = Index(tmp_path, "print", 23, fakes.SQUARES)
    index.make(source, 0)  # type: ignore[arg-type]
    whole, (path,) = index.read(), (tmp_path / ".index").glob("print-000001-*.parquet")
    content = path.read_bytes()
    for at in {0, len(content) // 2, len(content) - 1}:
        wrong = {"a bit": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], "cut": content[:at]}
        path.write_bytes(wrong[damage]) if damage in wrong else path.unlink()
        with pytest.raises(CacheError, match="has lost what was read"):
            index.read()
        source.read.clear()
        index.make(source, 0)  # type: ignore[arg-type]
        assert source.read == [5, 6, 7, 8, 9]
        assert index.read().equals(whole)


@pytest.mark.parametrize("flags", [{"on_error": "fail"}, {"retry_quarantined": True}])
def test_what_could_not_be_read_is_read_again_when_it_may_have_been_mended(
    flags: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    """After an encode that stopped at it, or was killed before its plan: its block is, and no other."""
    source.failing = {7: SampleError("out of reach")}
    if "on_error" in flags:
        with pytest.raises(Exception, match="out of reach"):
            fakes.encode(tmp_path, **flags)
    else:
        source.failing[22] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            fakes.encode(tmp_path)
    source.failing = {}
    source.read.clear()
    fakes.encode(tmp_path, **flags)
    assert set(source.read[:5]) == {5, 6, 7, 8, 9}
    assert Cache.open(tmp_path).manifest["counts"] == {"ok": 23}


def stamps(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_finished_encode_changes_nothing_and_reads_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the dataset nor a record; what it says of the samples is what it said before."""
    source[3] = source[3]._replace(original=b"torn")
    fakes.encode(tmp_path)
    before, said = stamps(tmp_path), capsys.readouterr().out
    source.read.clear()
    monkeypatch.setattr(Cache, "commits", lambda _: pytest.fail("a record is read"))
    fakes.encode(tmp_path)
    assert stamps(tmp_path) == before
    assert source.read == []
    again = capsys.readouterr().out
    assert "nothing to encode" in again
    assert said.splitlines()[-2:] == again.splitlines()[-2:]


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ({"no_flip_regex": "none"}, {"ok": 22, "quarantined": 1}),
        ({"random_flip": True}, {"ok": 22, "quarantined": 1}),
        ({"retry_quarantined": True}, {"ok": 22, "quarantined": 1}),
        ({}, {"ok": 22, "quarantined": 1}),
    ],
)
def test_an_encode_that_is_asked_for_more_is_not_finished(
    flags: dict[str, Any], counts: dict[str, int], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another flag, another try of what stands aside, and a unit that is gone: the records are looked at."""
    source[3] = source[3]._replace(original=b"torn")
    fakes.encode(tmp_path)
    if not flags:
        repair(tmp_path, [Finding("commits/images-v0-000002.json", "is damaged", None, drop=True)])
    looked, commits = [], Cache.commits
    monkeypatch.setattr(Cache, "commits", lambda cache: (looked.append(cache), commits(cache))[1])
    fakes.encode(tmp_path, **flags)
    assert looked
    assert Cache.open(tmp_path).manifest["counts"] == counts
    assert verify(tmp_path) == []
    with pytest.raises(Exception, match="sample"):
        fakes.encode(tmp_path, on_error="fail")
