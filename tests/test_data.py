"""Tests of train/data/batches.py: what batches hold."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.encode.base.errors import CacheError
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.train.data import batches as data
from ip2p.train.data.batches import Batches, null_conditioning
from ip2p.train.data.order import Order, Turns
from ip2p.train.objective import Batch

CPU = torch.device("cpu")


def endless(views: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of ten samples of one shape."""
    return Turns([Order(10, views, 0)], [np.arange(10)], [1]).batches([0], size)


def test_batches_hold_what_the_order_says(cache: Path) -> None:
    """A batch's rows are the cache's rows of the samples and views at its positions, image and text together."""
    opened = Cache.open(cache)
    reader, samples, order = Reader(opened), Samples.of(opened, None), Order(10, 2, seed=9)
    drawn = Turns([order], [np.arange(10)], [1]).batches([0], 4, rank=1, processes=2)
    batches = Batches(reader, samples, drawn, CPU, batch_size=4)
    arrays = {name: np.asarray(array[:]) for kind in ("images", "text") for name, array in opened.arrays(kind).items()}
    for step in range(7):
        batch = next(batches)
        numbers, views = order(4 + 8 * step, 4)
        rows, text_rows = samples.rows[numbers], samples.text_rows[numbers]
        assert np.array_equal(batch.original.numpy(), arrays["original"][rows, views])
        assert np.array_equal(batch.edited.numpy(), arrays["edited"][rows, views])
        assert np.array_equal(batch.text.numpy(), arrays["text"][text_rows])
    batches.close()


def test_a_failure_in_the_background_thread_reaches_training(cache: Path) -> None:
    """An error while gathering is raised where the batch is waited for, instead of hanging."""
    opened = Cache.open(cache)

    class Broken(Reader):
        def take(self, *_: object) -> None:  # type: ignore[override]
            raise CacheError("a shard went away")

    batches = Batches(Broken(opened), Samples.of(opened, None), endless(2, 4), CPU, batch_size=4)
    with pytest.raises(CacheError, match="a shard went away"):
        next(batches)


def test_the_thread_works_on_the_device_of_its_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread begins on the first GPU, whichever its process has, and would take memory there."""
    seen: list[tuple[torch.device, str]] = []

    class OnCpu(data.Slot):
        def __init__(self, reader: Reader, batch_size: int, *_: object):
            super().__init__(reader, batch_size, CPU)

    monkeypatch.setattr(data, "Slot", OnCpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda to: seen.append((to, threading.current_thread().name)))
    opened = Cache.open(cache)
    for device in (torch.device("cuda", 1), CPU):
        batches = Batches(Reader(opened), Samples.of(opened, None), endless(2, 4), device, batch_size=4)
        next(batches)
        batches.close()
    assert seen == [(torch.device("cuda", 1), "batches")]


def test_the_empty_instruction_comes_from_text_row_0(cache: Path) -> None:
    """The null condition is the cached encoding of the empty instruction."""
    opened = Cache.open(cache)
    null = null_conditioning(Reader(opened), CPU)
    assert null.pooled is None
    assert np.array_equal(null.text.numpy()[0], np.asarray(opened.arrays("text")["text"][0]))


def test_sdxl_batches_carry_pooled_text_and_time_ids(sdxl: Path, data: Path, tmp_path: Path, encode) -> None:
    """Time ids are original height and width, crop top and left, target height and width, per sample."""
    encode(sdxl, data, tmp_path / "cache")
    opened = Cache.open(tmp_path / "cache")
    batches = Batches(Reader(opened), Samples.of(opened, None), endless(1, 3), CPU, batch_size=3)
    batch: Batch = next(batches)
    batches.close()
    assert batch.pooled is not None
    assert batch.pooled.shape == (3, 32)
    assert batch.time_ids is not None
    assert batch.time_ids.tolist() == [[20, 24, 0, 0, 16, 16]] * 3
