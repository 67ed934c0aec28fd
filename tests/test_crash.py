"""Tests of encodes on one, two and three processes that are killed at random moments and go on."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import zarr

import tiny
from ip2p.encode.base.errors import CacheError
from ip2p.encode.base.files import file_record
from ip2p.encode.cache.format import Cache, Unit
from ip2p.encode.cache.writer import exclusive
from ranks import FORKS, encode_rank

PAIRS = 60


class Row(tuple[int, Unit, int]):
    """Who encoded which row of which unit."""

    @classmethod
    def parse(cls, line: str) -> "Row":
        rank, kind, shard, view, row = line.split()
        return cls((int(rank), Unit(kind, int(shard), int(view)), int(row)))


class Encode:
    """Starts encodes of one dataset, each as a group of processes."""

    def __init__(self, model: Path, data: Path, logs: Path):
        self.flags: dict[str, object] = {"pretrained_model_name_or_path": model, "dataset_name": data, "resolution": 16}
        self.flags |= {"random_flip": True, "bucket_step": 4, "encode_batch_size": 3, "dataloader_num_workers": 1}
        self.logs = logs
        self.runs = 0

    @contextmanager
    def start(self, cache: Path, processes: int, late: Sequence[float] = (0, 0, 0)) -> Iterator[list[BaseProcess]]:
        """The processes of one encode; what is left of them at the end is killed."""
        self.runs += 1
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        arguments = tiny.arguments(self.flags | {"cache": cache})
        group = [
            FORKS.Process(target=encode_rank, args=(rank, processes, port, arguments, self.log, late[rank]))
            for rank in range(processes)
        ]
        for process in group:
            process.start()
        try:
            yield list(group)
        finally:
            kill(group)

    @property
    def log(self) -> Path:
        return self.logs / f"{self.runs:03d}.log"

    def rows(self) -> list[Row]:
        """What the latest run has encoded until now."""
        return [Row.parse(line) for line in self.log.read_text().splitlines()] if self.log.is_file() else []

    def said(self, rank: int = 0) -> str:
        return self.log.with_suffix(f".{rank}.txt").read_text()

    def finish(self, cache: Path, processes: int, late: Sequence[float] = (0, 0, 0)) -> None:
        """Encode undisturbed."""
        with self.start(cache, processes, late) as group:
            for process in group:
                process.join(120)
            assert [process.exitcode for process in group] == [0] * processes, self.said()


def kill(group: Sequence[BaseProcess]) -> None:
    """SIGKILL for all processes and those that they have started."""
    for process in group:
        if process.pid and process.exitcode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # it has not become the leader of a group yet
        process.join()


@pytest.fixture(scope="module")
def killable(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Encode:
    """Pairs in three shapes that all have instructions of their own, but for two equal samples at each end."""
    columns = tiny.pairs(PAIRS, sizes=tiny.SIDES)
    columns["edit_prompt"] = [f"make it {n}" for n in range(PAIRS)]
    columns = {name: [*values, values[0], values[0]] for name, values in columns.items()}
    data = tiny.dataset(tmp_path_factory.mktemp("killable"), columns)
    return Encode(sd, data, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def undisturbed(killable: Encode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an encode that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    killable.finish(folder, 1)
    assert Counter(row[1:] for row in killable.rows()).most_common(1)[0][1] == 1
    assert len(killable.rows()) == 2 * PAIRS + PAIRS + 1
    return folder


def committed(cache: Path) -> set[Unit]:
    """Units with a record, each of which has its files whole."""
    records = Cache(cache, {}).commits()
    for record in records.values():
        for path, expected in record.files.items():
            assert file_record(cache / path) == expected
    return set(records)


def check_work(rows: list[Row], before: set[Unit], after: set[Unit]) -> None:
    """No row was encoded that was there or that another process encoded, and no more was lost than what was in flight.

    A process has at most two shards (with all their views) in flight: one that it encodes, one that it writes.
    """
    assert not {unit for _, unit, _ in rows} & before
    assert all(count == 1 for count in Counter(row[1:] for row in rows).values())
    lost = defaultdict(set)
    for rank, unit, _ in rows:
        if unit not in after:
            lost[rank].add((unit.kind, unit.shard))
    assert all(len(shards) <= 2 for shards in lost.values()), lost


def assert_same(cache: Path, expected: Path) -> None:
    """Equal array by array, sample by sample, record by record; and no file is left over."""
    ours, theirs = (zarr.open_group(folder / "data.zarr", mode="r") for folder in (cache, expected))
    assert sorted(ours.array_keys()) == sorted(theirs.array_keys())
    for name, array in theirs.arrays():
        np.testing.assert_array_equal(np.asarray(ours[name][:]), np.asarray(array[:]))  # pyright: ignore
    assert Cache.open(cache).samples().equals(Cache.open(expected).samples())
    for folder in (cache, expected):
        Cache.open(folder).check_files()
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (cache, expected)]
    assert names[0] == names[1]
    for record in (expected / "commits").iterdir():
        assert (cache / "commits" / record.name).read_bytes() == record.read_bytes()


def disturb(encode: Encode, folder: Path, expected: Path, kills: int, seed: int) -> None:
    """Kill encodes until `kills` were killed; caches that come to their end are compared, then another is begun."""
    rng = random.Random(seed)
    killed = 0
    cache = folder / "0"
    while killed < kills:
        before = committed(cache)
        with encode.start(cache, processes=rng.choice((1, 2, 3))) as group:
            if rng.random() < 0.25:  # while it starts, reads the dataset, plans
                time.sleep(rng.uniform(0, 3))
            else:
                wait_for(encode, group, rows=rng.randrange(150))
            alive = any(process.is_alive() for process in group)
        check_work(encode.rows(), before, committed(cache))
        killed += alive
        if not alive:
            assert [process.exitcode for process in group] == [0] * len(group), encode.said()
            assert_same(cache, expected)
            cache = folder / str(killed)
    before = committed(cache)
    encode.finish(cache, processes=2)
    check_work(encode.rows(), before, committed(cache))
    assert_same(cache, expected)


def wait_for(encode: Encode, group: Sequence[BaseProcess], rows: int) -> None:
    """Wait until so many rows were encoded, or all processes have ended."""
    while len(encode.rows()) < rows and any(process.is_alive() for process in group):
        time.sleep(0.005)


def test_killed_encodes_end_as_an_undisturbed_one(killable: Encode, undisturbed: Path, tmp_path: Path) -> None:
    """Three kills on changing numbers of processes: equal arrays, samples and records, nothing encoded twice."""
    disturb(killable, tmp_path, undisturbed, kills=3, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_leave_no_trace(killable: Encode, undisturbed: Path, tmp_path: Path) -> None:
    """Twenty kills, whose moments differ a little each time."""
    disturb(killable, tmp_path, undisturbed, kills=20, seed=20)


def test_a_process_that_falls_behind_takes_its_own_share(killable: Encode, undisturbed: Path, tmp_path: Path) -> None:
    """Records that the others have written in the meantime do not change who encodes what."""
    killable.finish(tmp_path / "cache", processes=2, late=(0, 2))
    check_work(killable.rows(), set(), committed(tmp_path / "cache"))
    assert_same(tmp_path / "cache", undisturbed)
    assert {rank for rank, *_ in killable.rows()} == {0, 1}


def test_processes_leave_their_group_at_the_end(killable: Encode, undisturbed: Path, tmp_path: Path) -> None:
    """NCCL would print a warning for each process that ends without."""
    killable.finish(shutil.copytree(undisturbed, tmp_path / "cache"), processes=2)
    assert all("left the process group: True" in killable.said(rank) for rank in range(2))


def test_each_process_of_an_encode_holds_the_cache(killable: Encode, tmp_path: Path) -> None:
    """Where only the first process was killed, no other encode begins beside those that still write."""
    with killable.start(tmp_path / "cache", processes=2, late=(0, 0)) as group:
        wait_for(killable, group, rows=20)
        kill(group[:1])
        assert group[1].is_alive()
        with pytest.raises(CacheError, match="is being written by another"), exclusive(tmp_path / "cache"):
            pass
        kill(group)
        with exclusive(tmp_path / "cache"):
            pass


@pytest.mark.slow
def test_a_launcher_starts_one_encode_of_two_processes(sd: Path, data: Path, cache: Path, tmp_path: Path) -> None:
    """torchrun, on which accelerate builds, needs nothing but `-m ip2p.encode`."""
    flags: dict[str, object] = {"pretrained_model_name_or_path": sd, "dataset_name": data, "resolution": 16}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [
        *launch,
        "-m",
        "ip2p.encode",
        *tiny.arguments(flags | {"random_flip": True, "cache": tmp_path / "cache"}),
    ]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert Cache.open(tmp_path / "cache").manifest["settings"]["processes"] == 2
    assert_same(tmp_path / "cache", cache)
