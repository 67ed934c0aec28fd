"""Tests of encode/cached.py: the samples of one cache and of several."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from ip2p.encode.base.errors import CacheError
from ip2p.encode.cache import format as cache_module
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.writer import write_state
from ip2p.encode.cached import Samples
from ip2p.train.data.batches import Batches
from ip2p.train.data.order import Order, Turns

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other(sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., None]) -> Path:
    """A cache of twelve other pairs in one view, in shards of another size."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD_ROWS", 8)
        encode(sd, tiny.dataset(folder / "data", tiny.pairs(12, first=20)), folder / "cache")
    return folder / "cache"


@pytest.mark.parametrize("turned", [False, True])
def test_samples_of_several_caches_read_as_they_do_alone(cache: Path, other: Path, turned: bool) -> None:
    """Image, text and time ids of each sample and view are those of its own cache, whichever comes first."""
    folders = (other, cache) if turned else (cache, other)
    caches = [Cache.open(folder) for folder in folders]
    reader = Reader(*caches)
    samples = Samples.of_all(reader, None)
    reader.require(samples.rows, samples.text_rows)
    arrays = [
        {name: np.asarray(a[:]) for kind in ("images", "text") for name, a in c.arrays(kind).items()} for c in caches
    ]
    tables = [one.samples().to_pylist() for one in caches]
    order = Order(22, samples.views.shape[1], seed=2)
    drawn = Turns([order], [np.arange(order.samples)], [1]).batches([0], 5)
    batches = Batches(reader, samples, drawn, CPU, batch_size=5)
    seen = set()
    for step in range(20):
        batch = next(batches)
        numbers, drawn = order(5 * step, 5)
        for n, (number, side) in enumerate(zip(numbers, drawn, strict=True)):
            owner, view = samples.caches[number], samples.views[number, side]
            sample = tables[owner][samples.numbers[number]]
            seen.add((owner, samples.numbers[number], view))
            for name, found in (("original", batch.original), ("edited", batch.edited)):
                assert np.array_equal(found[n].numpy(), arrays[owner][name][sample["row"], view])
            assert np.array_equal(batch.text[n].numpy(), arrays[owner]["text"][sample["text_row"]])
    batches.close()
    assert len(seen) > 28  # of 12 in one view and 10 in two
    assert samples.instructions(caches) == [sample["instruction"] for table in tables for sample in table]


def test_the_coin_is_fair_among_the_views_that_a_cache_has(
    sd: Path, cache: Path, other: Path, data: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """One, two and three views: the same coin shows each sample in each of its views equally often."""
    encode(sd, data, tmp_path / "crops", resize_mode="random_crop", crops=3)
    samples = Samples.of_all(Reader(*map(Cache.open, (other, cache, tmp_path / "crops"))), None)
    assert samples.views.shape == (32, 6)
    for number, views in ((0, [6]), (1, [3, 3]), (2, [2, 2, 2])):
        for shown in samples.views[samples.caches == number]:
            assert np.bincount(shown).tolist() == views


def test_prompts_of_two_caches_are_different_prompts(cache: Path, other: Path) -> None:
    """Groups are names that a dataset gives itself: equal ones in two datasets mean nothing."""
    alone = [len(np.unique(Samples.of(Cache.open(folder), None).groups)) for folder in (cache, other)]
    samples = Samples.of_all(Reader(Cache.open(cache), Cache.open(other)), None)
    assert len(np.unique(samples.groups)) == sum(alone)
    assert not set(samples.groups[:10]) & set(samples.groups[10:])


def test_a_limit_holds_for_each_cache(cache: Path, other: Path) -> None:
    """So that a short trial sees all of them."""
    samples = Samples.of_all(Reader(Cache.open(cache), Cache.open(other)), 3)
    assert samples.caches.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_missing_record_of_the_second_cache_is_named(cache: Path, other: Path) -> None:
    """What training is about to read must be committed, in whichever cache it lies."""
    reader = Reader(Cache.open(cache), Cache.open(other))
    samples = Samples.of_all(reader, None)
    reader._units[1] = {unit for unit in reader._units[1] if unit.name != "images-v0-000001"}
    with pytest.raises(CacheError, match=f"{other}/commits/images-v0-000001.json is missing"):
        reader.require(samples.rows, samples.text_rows)


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
    write_state(tmp_path, opened.manifest, table, {})
    with pytest.raises(CacheError, match="not finished, 1 of 10 samples are missing: run the same ip2p-encode"):
        Samples.of(Cache.open(tmp_path), None)
