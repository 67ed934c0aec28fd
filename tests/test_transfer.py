"""Tests of push and pull: a copy is whole or is no cache, over folders, memory and the S3 protocol."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import shelf
import tiny
from ip2p.encode.base.errors import CacheError
from ip2p.encode.base.files import read_record, write_record
from ip2p.encode.cache.format import Cache
from ip2p.encode.keeper.__main__ import main
from ip2p.encode.keeper.transfer import Place, copy
from ip2p.encode.keeper.verify import verify

Encode = Callable[..., None]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """fsspec's file system in memory, empty."""
    MemoryFileSystem.store.clear()
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()


@pytest.fixture
def s3() -> Iterator[shelf.Shelf]:
    """A server that speaks the S3 protocol on loopback, with a bucket called shelf."""
    with shelf.serving() as served:
        yield served


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a cache but the lock, by path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The lines with which a command refuses; its exit status must be 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.split("ip2p-cache: ")[-1].splitlines() if line.strip()]
    assert len(lines) == 1 or "another cache" in lines[0]
    return "\n".join(lines)


def test_a_cache_travels_over_s3_and_comes_back_byte_for_byte(
    s3: shelf.Shelf, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """push to a bucket and pull from it give the same files, and a second push transfers nothing.

    Nothing says where the server is but AWS_ENDPOINT_URL, as with any S3-compatible store.
    """
    main(["push", str(cache), "s3://shelf/caches/first"])
    assert {f"caches/first/{path}": content for path, content in contents(cache).items()} == s3("shelf")
    main(["pull", "s3://shelf/caches/first", str(tmp_path / "pulled")])
    assert contents(tmp_path / "pulled") == contents(cache)
    assert verify(tmp_path / "pulled") == []
    capsys.readouterr()
    main(["push", str(cache), "s3://shelf/caches/first"])
    count = len(contents(cache))
    assert f"copied 0 files, 0.0 MiB, {count} were there already" in capsys.readouterr().out


def test_a_bucket_that_is_not_there_is_told_and_not_made(
    s3: shelf.Shelf, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped bucket is an error of one line; no bucket appears."""
    assert "s3://shelv/x" in refused(["push", cache, "s3://shelv/x"], capsys)
    with pytest.raises(Exception, match="NoSuchBucket"):
        s3("shelv")


def test_the_manifest_goes_last(cache: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, then commit records, then the manifest: at each moment, what a reader may trust is there."""
    written: list[str] = []
    pipe = MemoryFileSystem.pipe_file

    def spy(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        written.append(path.removeprefix("/copy/"))
        pipe(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", spy)
    copy(Place(str(cache)), Place("memory://copy"))
    commits = [n for n, path in enumerate(written) if path.startswith("commits/")]
    assert commits == list(range(len(written) - 1 - len(commits), len(written) - 1))
    assert written[-1] == "manifest.json"


@pytest.mark.parametrize("after", [0, 4, 12])
def test_an_interrupted_push_is_no_cache_and_goes_on_where_it_stopped(
    after: int, cache: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the store fails, there is no manifest; the same command then transfers only what is missing."""
    written: list[str] = []
    fail = [True]
    pipe = MemoryFileSystem.pipe_file

    def flaky(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        if fail[0] and len(written) >= after:
            raise OSError("the line is dead")
        written.append(path)
        pipe(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", flaky)
    with pytest.raises(CacheError, match="the line is dead"):
        copy(Place(str(cache)), Place("memory://copy"))
    assert not memory.exists("/copy/manifest.json")
    with pytest.raises(CacheError, match="is not a cache"):
        Place("memory://copy").manifest()
    done, fail[0] = len(written), False
    copied = copy(Place(str(cache)), Place("memory://copy"))
    assert len(set(written)) == len(written) == len(contents(cache))
    assert copied.files == len(written) - done


def test_a_copy_whose_bits_turned_is_mended_by_copying_again(cache: Path, tmp_path: Path) -> None:
    """Files of the right size and the wrong checksum are replaced, commit records too, and nothing else is touched."""
    target = tmp_path / "copy"
    copy(Place(str(cache)), Place(f"file://{target}"))
    for path in ("data.zarr/text/c/0/0/0", "commits/images-v1-000000.json", "samples.parquet"):
        content = bytearray((target / path).read_bytes())
        content[99] ^= 1
        (target / path).write_bytes(content)
    assert copy(Place(str(cache)), Place(f"file://{target}")).files == 3 + 1
    assert contents(target) == contents(cache)


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_lost_manifest_comes_back_with_a_copy(
    how: str, sd: Path, data: Path, cache: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """As each command advises that meets such a cache, and nothing else does; nothing else is transferred."""
    headless = Path(shutil.copytree(cache, tmp_path / "cache"))
    manifest = headless / "manifest.json"
    content = manifest.read_text()
    manifest.unlink() if how == "missing" else manifest.write_text(
        content.replace('"resolution": 16', '"resolution": 17')
    )
    capsys.readouterr()
    for command in (
        lambda: encode(sd, data, headless, random_flip=True),
        lambda: main(["verify", str(headless)]),
        lambda: main(["verify", str(headless), "--repair"]),
    ):
        with pytest.raises(SystemExit):
            command()
        out, err = capsys.readouterr()
        assert "`ip2p-cache pull` (or push) a copy over it, or delete the cache and encode anew" in out + err
        assert not re.search("`ip2p-cache verify|run the same ip2p-encode", out + err)
    assert copy(Place(str(cache)), Place(str(headless))).files == 1
    assert contents(headless) == contents(cache)


def test_damage_at_the_source_is_not_copied(
    cache: Path, tmp_path: Path, memory: MemoryFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard that differs from its record stops the push; the copy does not become a cache."""
    broken = Path(shutil.copytree(cache, tmp_path / "broken"))
    victim = broken / "data.zarr" / "text" / "c" / "0" / "0" / "0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    assert "data.zarr/text/c/0/0/0 is damaged" in refused(["push", broken, "memory://copy"], capsys)
    assert not memory.exists("/copy/manifest.json")


def test_damage_on_the_way_is_noticed(cache: Path, memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """What arrives is read back: a store that loses a byte does not end up with a cache."""
    pipe = MemoryFileSystem.pipe_file

    def lossy(self: MemoryFileSystem, path: str, value: bytes, **options: Any) -> None:
        pipe(self, path, value[:-1] if path.endswith("edited/c/0/0/0/0/0") else value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lossy)
    with pytest.raises(CacheError, match="edited/c/0/0/0/0/0 arrived damaged"):
        copy(Place(str(cache)), Place("memory://copy"))
    assert not memory.exists("/copy/manifest.json")


def test_a_grown_cache_replaces_its_older_copy(
    sd: Path, tmp_path: Path, memory: MemoryFileSystem, encode: Encode
) -> None:
    """After growth, push sends new units and tables; what is finished stays where it is."""
    local = tmp_path / "cache"
    encode(sd, tiny.dataset(tmp_path / "small", tiny.pairs(3)), local)
    copy(Place(str(local)), Place("memory://copy"))
    old = set(contents(local))
    encode(sd, tiny.dataset(tmp_path / "large", tiny.pairs(5)), local)
    new = [path for path in contents(local) if path not in old or path.endswith(("json", "parquet"))]
    copied = copy(Place(str(local)), Place("memory://copy"))
    assert copied.files <= len(new)
    copy(Place("memory://copy"), Place(str(tmp_path / "back")))
    assert contents(tmp_path / "back") == contents(local)


def test_another_cache_is_never_overwritten(
    cache: Path, sdxl: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target that holds another model's cache, or units that the source lacks, is refused and stays as it is."""
    other = tmp_path / "other"
    encode(sdxl, data, other)
    before = contents(other)
    assert "holds another cache" in refused(["push", cache, other], capsys)
    assert contents(other) == before

    grown = Path(shutil.copytree(cache, tmp_path / "grown"))
    record = read_record(grown / "commits" / "text-000000.json")
    write_record(grown / "commits" / "text-000001.json", record | {"shard": 1})
    before = set(contents(grown))
    assert "commits/text-000001.json, which" in refused(["pull", cache, grown], capsys)
    assert set(contents(grown)) == before
    (grown / "commits" / "text-000001.json").unlink()
    write_record(grown / "commits" / "text-000000.json", record | {"keys": record["keys"][32:] + record["keys"][:32]})
    assert "holds otherwise" in refused(["pull", cache, grown], capsys)


def test_a_damaged_manifest_is_replaced_by_a_push(cache: Path, tmp_path: Path) -> None:
    """As whoever cannot read it is told to."""
    place = tmp_path / "copy"
    copy(Place(str(cache)), Place(str(place)))
    manifest = place / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format"', b'"former"'))
    with pytest.raises(CacheError, match=f"file://{manifest} is damaged .*: push it again from a whole copy"):
        copy(Place(f"file://{place}"), Place(str(tmp_path / "back")))
    assert copy(Place(str(cache)), Place(str(place))).files == 1
    assert contents(place) == contents(cache)


def test_a_folder_of_other_files_is_no_target(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pull into a folder of something else would mix the two: it is refused."""
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    assert "holds other files (a.txt" in refused(["pull", cache, tmp_path / "letters"], capsys)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["push", "CACHE", "s4://bucket/x"], "s4://bucket/x: Protocol not known: s4"),
        (["push", "nowhere", "memory://x"], "nowhere is not a cache"),
        (["pull", "memory://nowhere", "OUT"], "memory://nowhere is not a cache"),
        (["push", "CACHE"], "expected `ip2p-cache push CACHE URL`"),
        (["pull", "CACHE", "memory://x"], "CACHE memory://x is a url, expected a folder of this machine"),
        (
            ["info", "s3://b/c"],
            "CACHE s3://b/c is a url, expected a folder of this machine: `ip2p-cache pull` makes one",
        ),
        (["verify", "s3://b/c"], "CACHE s3://b/c is a url"),
        (["preview", "s3://b/c"], "CACHE s3://b/c is a url"),
        (["diff", "CACHE", "s3://b/c"], "B s3://b/c is a url"),
    ],
)
def test_wrong_places_are_answered_in_a_line(
    arguments: list[str], part: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown protocols, sources that hold no cache, a missing URL: one line, and no folder is made."""
    places = {"CACHE": cache, "OUT": tmp_path / "out"}
    assert part in refused([places.get(argument, argument) for argument in arguments], capsys)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_cache_travels_too(cache: Path, tmp_path: Path) -> None:
    """A cache without some of its units can be moved and be continued elsewhere."""
    part = Path(shutil.copytree(cache, tmp_path / "part"))
    (part / "commits" / "images-v1-000000.json").unlink()
    copy(Place(str(part)), Place(str(tmp_path / "copy")))
    assert len(Cache.open(tmp_path / "copy").commits()) == len(Cache.open(cache).commits()) - 1


def test_a_cache_without_records_is_no_copy(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers would stay behind: said is what is there and what was expected, and nothing is written."""
    bare = Path(shutil.copytree(cache, tmp_path / "bare"))
    shutil.rmtree(bare / "commits")
    expected = f"{bare} holds no records in commits/, expected those of what is encoded of its 10 samples"
    assert expected in refused(["push", bare, tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()
    assert expected in refused(["pull", bare, tmp_path / "out"], capsys)
