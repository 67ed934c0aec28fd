"""Batches of a run without a model, in this process or in one of several."""

import itertools
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from configs import train_config
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.remote import RemoteCache
from ip2p.encode.cached import Samples
from ip2p.train.data.batches import Batches
from ip2p.train.data.order import make_order
from ip2p.train.data.sweep import sweep_over
from ip2p.train.objective import Batch

CPU, SEED = torch.device("cpu"), 3


def contents(batch: Batch) -> tuple[bytes, ...]:
    """The numbers of a batch."""
    return tuple(part.numpy().tobytes() for part in batch if part is not None)


def draw(
    cache: Cache,
    window: float,
    count: int,
    seen: list[int] | None = None,
    rank: int = 0,
    processes: int = 1,
    size: int = 5,
) -> Iterator[tuple[tuple[bytes, ...], list[int]]]:
    """Batches of a run over a cache, from a position on, and the positions after them."""
    reader = Reader(cache, window=window)
    samples = Samples.of_all(reader, None)
    order = make_order(train_config("model", "c"), samples, SEED, 0, sweep_over(reader, samples))
    seen = seen or [0] * len(order.orders)
    drawn, everywhere = order.batches(seen, size, rank, processes), order.batches(seen, size * processes)
    batches = Batches(reader, samples, drawn, CPU, batch_size=size, everywhere=everywhere)
    try:
        for batch in itertools.islice(batches, count):
            seen = order.after(seen, size * processes)
            yield contents(batch), seen
    finally:
        batches.close()


def one_run(url: str, folder: Path, window: float, count: int, answer: Connection) -> None:
    """Sends the batches of a run of its own."""
    try:
        answer.send([batch for batch, _ in draw(RemoteCache(url, folder), window, count)])
    except Exception as error:
        answer.send(repr(error))


def one_rank(
    environment: dict[str, str],
    url: str,
    rank: int,
    folder: Path,
    window: float,
    count: int,
    step: Any,
    answer: Connection,
) -> None:
    """Sends the batches of one of two processes that share a window, and step together, as gradients make them."""
    os.environ |= environment
    found = []
    try:
        for batch, _ in draw(RemoteCache(url, folder), window, count, None, rank, 2, 1):
            found.append(batch)
            step.wait(60)
        answer.send(found)
    except Exception as error:
        step.abort()
        answer.send(repr(error))
