"""Tests of train/data.py: which samples come when."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ip2p.encode.cache import Cache
from ip2p.encode.errors import CacheError
from ip2p.encode.reader import Reader
from ip2p.encode.writer import write_state
from ip2p.train.data import Batches, Order, Samples, null_conditioning
from ip2p.train.objective import Batch

CPU = torch.device("cpu")


def positions(order: Order, start: int, count: int) -> list[int]:
    """Sample numbers at positions."""
    return order(start, count)[0].tolist()


def test_each_epoch_is_a_permutation_and_epochs_differ() -> None:
    """Every sample comes once in each epoch, also where a batch reaches over the end of one."""
    order = Order(10, 1, seed=1)
    stream = [number for start in range(0, 40, 4) for number in positions(order, start, 4)]
    epochs = [stream[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_seed_and_epoch() -> None:
    """Asking in other pieces, or backwards, gives the same sequence; another seed gives another."""
    reference = positions(Order(7, 2, seed=3), 0, 21)
    order = Order(7, 2, seed=3)
    assert [positions(order, start, 1)[0] for start in reversed(range(21))] == reference[::-1]
    assert positions(Order(7, 2, seed=4), 0, 21) != reference


@pytest.mark.parametrize("split", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_goes_on_without_losing_or_repeating_a_sample(split: tuple[int, int]) -> None:
    """5 steps on some processes and the rest on others together make whole epochs."""
    order, seen, position, size = Order(60, 1, seed=5), [], 0, 2
    for processes, steps in ((split[0], 5), (split[1], 30)):
        for _ in range(steps):
            for rank in range(processes):
                seen += positions(order, position + rank * size, size)
            position += processes * size
    assert sorted(seen[:60]) == list(range(60))


def test_sampling_by_prompt_draws_prompts_evenly_and_their_samples_at_random() -> None:
    """A prompt with nine samples comes as often as one with a single sample, and all nine come."""
    groups = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    order = Order(10, 1, 3, groups)
    stream = positions(order, 0, 4000)
    assert stream.count(0) == 2000
    counts = np.bincount(stream, minlength=10)[1:]
    assert counts.min() > 170
    assert counts.max() < 280
    assert positions(Order(10, 1, 3, groups), 25, 9) == stream[25:34]


def test_each_sample_tosses_its_own_coin_for_the_view() -> None:
    """With two views about half of a batch is flipped, not all or nothing, and epochs differ."""
    _, views = Order(1000, 2, seed=1)(0, 2000)
    assert 0.45 < views[:1000].mean() < 0.55
    assert not np.array_equal(views[:1000], views[1000:])
    assert Order(10, 1, seed=1)(0, 20)[1].tolist() == [0] * 20


def test_batches_hold_what_the_order_says(cache: Path) -> None:
    """A batch's rows are the cache's rows of the samples and views at its positions, image and text together."""
    opened = Cache.open(cache)
    reader, samples, order = Reader(opened), Samples.of(opened, None), Order(10, 2, seed=9)
    batches = Batches(reader, samples, order, CPU, batch_size=4, start=4, stride=8)
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

    batches = Batches(Broken(opened), Samples.of(opened, None), Order(10, 2, 0), CPU, batch_size=4, start=0, stride=4)
    with pytest.raises(CacheError, match="a shard went away"):
        next(batches)


def test_the_empty_instruction_comes_from_text_row_0(cache: Path) -> None:
    """The null condition is the cached encoding of the empty instruction."""
    opened = Cache.open(cache)
    null = null_conditioning(opened, Reader(opened), CPU)
    assert null.pooled is None
    assert np.array_equal(null.text.numpy()[0], np.asarray(opened.arrays("text")["text"][0]))


def test_sdxl_batches_carry_pooled_text_and_time_ids(sdxl: Path, data: Path, tmp_path: Path, encode) -> None:
    """Time ids are original height and width, crop top and left, target height and width, per sample."""
    encode(sdxl, data, tmp_path / "cache")
    opened = Cache.open(tmp_path / "cache")
    batches = Batches(Reader(opened), Samples.of(opened, None), Order(10, 1, 0), CPU, batch_size=3, start=0, stride=3)
    batch: Batch = next(batches)
    batches.close()
    assert batch.pooled is not None
    assert batch.pooled.shape == (3, 32)
    assert batch.time_ids is not None
    assert batch.time_ids.tolist() == [[20, 24, 0, 0, 16, 16]] * 3


def test_max_train_samples_takes_the_first_and_never_more_than_there_are(cache: Path) -> None:
    """A limit beyond the number of samples means all of them."""
    opened = Cache.open(cache)
    assert len(Samples.of(opened, 3).rows) == 3
    assert len(Samples.of(opened, 1000).rows) == 10


def test_an_unfinished_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    """Training on a part of the data without knowing it is prevented; the message names the command."""
    opened = Cache.open(cache)
    table = opened.samples()
    status = ["pending", *table["status"].to_pylist()[1:]]
    table = table.set_column(table.column_names.index("status"), "status", [status])
    write_state(tmp_path, opened.manifest, table)
    with pytest.raises(CacheError, match="not finished, 1 of 10 samples are missing: run the same ip2p-encode"):
        Samples.of(Cache.open(tmp_path), None)
