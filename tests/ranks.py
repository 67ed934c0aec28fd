"""Processes that encode or hold a cache, forked from a server so that none of them has to import torch again."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ip2p.encode.cache import format as cache
from ip2p.encode.cache.commits import Commit, Unit
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.writer import UnitWriter, exclusive

ROWS = 8  # of a shard
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ranks", "ip2p.encode.models.encoders", "ip2p.encode.pipeline"])


def encode_rank(rank: int, processes: int, port: int, arguments: list[str], log: Path, late: float) -> None:
    """One process of an encode, as a launcher starts it; `log` gets a line for each row that it encodes.

    Args:
        late: seconds by which this process falls behind the others when it looks at what is there.
    """
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a process that no server has forked
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = os.open(log.with_suffix(f".{rank}.txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    lines = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    original_put, original_commits = UnitWriter.put, Cache.commits

    def put(self: UnitWriter, row: int, *rest: Any) -> bool:
        os.write(lines, f"{rank} {self.unit.kind} {self.unit.shard} {self.unit.view} {row}\n".encode())
        time.sleep(0.004)
        return original_put(self, row, *rest)

    def commits(self: Cache) -> dict[Unit, Commit]:
        time.sleep(late)
        return original_commits(self)

    os.fsync = lambda _: None  # slow, and SIGKILL takes nothing from a file that was written
    cache.SHARD_ROWS, Cache.commits = ROWS, commits
    UnitWriter.put = put  # pyright: ignore[reportAttributeAccessIssue]
    from ip2p.encode.__main__ import main

    main(arguments)
    if processes > 1:
        print("left the process group:", not torch.distributed.is_initialized())


def hold(folder: Path, shared: bool, worker: bool, started: Connection) -> None:
    """Hold a cache for a minute, perhaps with a process forked from this one; sends the number of that, or 0."""
    with exclusive(folder, shared=shared):
        child = os.fork() if worker else None
        if child != 0:
            started.send(child or 0)
        time.sleep(60)
