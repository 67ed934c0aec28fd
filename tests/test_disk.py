"""Tests of disks that are full, read-only or shared: one line says what to do, and nothing finished is lost."""

import os
import re
import signal
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import fakes
from ip2p.encode.base.errors import CacheError, SettingsError
from ip2p.encode.cache.format import Cache
from ip2p.encode.data.pairs import Pair
from ip2p.encode.planning import plan
from ranks import FORKS, hold

Encode = Callable[..., None]
PAIRS = [Pair(fakes.png(n), fakes.png(n + 1), f"instruction {n % 5}") for n in range(20)]


@contextmanager
def holder(cache: Path, shared: bool = False, worker: bool = False) -> Iterator[BaseProcess]:
    """Another process that holds a cache, and perhaps one forked from it."""
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=hold, args=(cache, shared, worker, there))
    process.start()
    child = here.recv()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    # An error that pytest keeps may hold a file open.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write a file that takes all the space there is."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def statuses(cache: Path) -> list[str]:
    return Cache.open(cache).samples()["status"].to_pylist()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_a_folder_that_cannot_be_written_is_named(
    name: str, sd: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in its place, or above it, is answered with one line."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        encode(sd, data, tmp_path / name)
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"ip2p-encode: --cache {tmp_path / name} cannot be written: ")


def test_a_read_only_disk_is_named(monkeypatch: pytest.MonkeyPatch, small_disk: Path) -> None:
    """A finished cache on it is refused like a new one, and goes on when the disk can be written again."""
    fakes.install(monkeypatch, fakes.Pairs(PAIRS), 4)
    fakes.encode(small_disk / "cache")
    for name in ("cache", "new"):
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        with pytest.raises(SettingsError, match=rf"--cache .*/{name} cannot be written: Read-only file system"):
            fakes.encode(small_disk / name)
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        fakes.encode(small_disk / name)
        assert statuses(small_disk / name) == ["ok"] * 20


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_encode_on_one_cache_is_refused(shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While another process plans, or is one of several that encode; when it was killed, nothing is left of it."""
    fakes.install(monkeypatch, fakes.Pairs(PAIRS), 4)
    with holder(tmp_path / "cache", shared=shared) as process:
        with pytest.raises(CacheError, match="is being written by another ip2p-encode"):
            fakes.encode(tmp_path / "cache")
        assert files(tmp_path / "cache") == {".lock"}
        fakes.encode(tmp_path / "another")
        process.kill()
        process.join()
        fakes.encode(tmp_path / "cache")
    assert statuses(tmp_path / "cache") == ["ok"] * 20


def test_worker_processes_of_a_killed_encode_do_not_hold_its_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Processes that read images notice only after seconds that they are orphans."""
    fakes.install(monkeypatch, fakes.Pairs(PAIRS), 4)
    with holder(tmp_path / "cache", worker=True) as process:
        process.kill()
        process.join()
        fakes.encode(tmp_path / "cache")


@pytest.mark.parametrize("moment", [0, 1, 4, 9, 15, 30, 49])
def test_a_disk_that_fills_up_stops_the_encode_cleanly(
    moment: int, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    """Whenever it happens: one line, then, with space made, the same command finishes without repeating anything."""
    fakes.install(monkeypatch, fakes.Pairs(PAIRS), 4)
    cache, calls = small_disk / "cache", iter(range(1000))

    def fsync(_: int) -> None:
        if next(calls) == moment:
            fill(small_disk)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CacheError) as stopped:
            fakes.encode(cache)
    no_space = f"no space left for {cache}: free some and run the same command, it goes on from here"
    assert str(stopped.value) == no_space or "make space" in str(
        stopped.value
    )  # full before the plan: it would not fit
    there = Cache(cache, {}).commits()
    held = {key for record in there.values() for key in record.keys.to_pylist() if key}
    with pytest.raises(CacheError, match=r"no space left|make space"):  # it is still full
        fakes.encode(cache)
    (small_disk / "filler").unlink()

    fakes.Encoders.log.clear()
    fakes.encode(cache)
    assert statuses(cache) == ["ok"] * 20
    assert len(fakes.Encoders.log) == 20 + 5 + 1 - len(held)
    fakes.encode(small_disk / "undisturbed")
    assert files(cache) == files(small_disk / "undisturbed")


def test_an_encode_that_will_not_fit_is_not_begun(monkeypatch: pytest.MonkeyPatch, small_disk: Path) -> None:
    """The estimate is compared with the free space before anything is written."""
    fakes.install(monkeypatch, fakes.Pairs(PAIRS), 1024)
    needed = 64 * 12 * 32 * 32 * 2 / 2**20
    message = rf"needs {needed:.1f} MiB \(.* KiB each\), 1\.0 MiB are free: make space or move --cache"
    with pytest.raises(CacheError, match=message):
        fakes.encode(small_disk / "cache", resolution=64)
    read = {path for path in files(small_disk / "cache") if path.startswith(".index/")}  # of the dataset
    assert files(small_disk / "cache") - read == {".lock"}


def test_the_estimate_is_shown_and_true(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes per sample, in all, and free; what is then written differs by the indices of the shards alone."""
    usage = namedtuple("usage", "total used free")(0, 0, 5 * 2**30)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    fakes.install(monkeypatch, fakes.Pairs(PAIRS), 64)
    fakes.encode(tmp_path / "cache", resolution=64, random_flip=True)
    said = re.search(
        r"20 of 20 samples to encode: ([\d.]+) MiB \((\d+) KiB each\) in .*, 5\.0 GiB free", capsys.readouterr().out
    )
    assert said
    written = sum(
        f["bytes"] for record in Cache.open(tmp_path / "cache").commits().values() for f in record.files.values()
    )
    assert float(said[1]) == round(written / 2**20, 1)
    assert int(said[2]) == pytest.approx(written / 20 / 2**10, abs=1)
