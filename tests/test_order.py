"""Tests of train/data/order.py: which samples come when."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import train_config
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.cached import Samples
from ip2p.train.config import TrainConfig
from ip2p.train.data.order import FINE, Mix, Order, Turns, identity, make_order


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


def test_a_mix_holds_the_share_of_each_cache_scattered_over_the_epoch() -> None:
    """The shares are exact in every epoch, come as often early as late in it, and each coin stays with its cache."""
    mix = Mix([Order(20, 2, 1, stream=1), Order(10, 1, 1, stream=2)], [6, 24], seed=1)
    numbers, views = (part.reshape(100, 30) for part in mix(0, 3000))
    of_first = numbers < 20
    assert mix.samples == 30
    assert (of_first.sum(axis=1) == 6).all()
    assert of_first[:, :15].mean() == pytest.approx(0.2, abs=0.03)
    assert views[of_first].mean() == pytest.approx(0.5, abs=0.1)
    assert not views[~of_first].any()


@pytest.mark.parametrize(("sizes", "shares"), [((20, 10), (6, 24)), ((7, 30, 5), (21, 14, 7)), ((3, 50), (30, 23))])
def test_nothing_of_a_cache_comes_again_before_all_of_it_has_come(sizes: tuple[int, ...], shares: list[int]) -> None:
    """What is drawn from each cache is a sequence of permutations, over the ends of epochs and several in one."""
    mix = Mix([Order(size, 1, 4, stream=n + 1) for n, size in enumerate(sizes)], shares, seed=4)
    stream, first = np.array(positions(mix, 0, 40 * sum(shares))), 0
    for size in sizes:
        mine = stream[(stream >= first) & (stream < first + size)] - first
        passes = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(passes) > 4
        assert (np.sort(passes) == np.arange(size)).all()
        assert len(np.unique(passes, axis=0)) > 4
        first += size


def test_a_mix_is_a_function_of_seed_and_position() -> None:
    """Asked in other pieces, or backwards, it is the same sequence: resuming is exact on any number of devices."""

    def mix(seed: int) -> Mix:
        return Mix([Order(20, 4, seed, stream=1), Order(10, 4, seed, stream=2)], [10, 20], seed)

    numbers, views = mix(3)(0, 200)
    again = mix(3)
    for start in reversed(range(0, 200, 8)):
        assert np.array_equal(again(start, 8), (numbers[start : start + 8], views[start : start + 8]))
    assert positions(mix(4), 0, 200) != numbers.tolist()


def columns(sizes: Sequence[int], groups: Sequence[int] | None = None, shapes: Sequence[int] | None = None) -> Samples:
    """Samples of caches of some sizes; of one shape, or each of one that is given by its width."""
    count = sum(sizes)
    numbers, nothing = np.arange(count), np.zeros((count, 2), np.int64)
    prompts = numbers if groups is None else np.array(groups)
    owners, sides = np.repeat(np.arange(len(sizes)), sizes), np.full((count, 2), 8)
    sides[:, 1] = 8 if shapes is None else shapes
    return Samples(numbers, numbers, nothing, nothing, sides, prompts, numbers, owners, numbers)


def config(caches: int, *weights: float, **flags: Any) -> TrainConfig:
    """Flags of a run on some caches."""
    folders = tuple(Path(f"cache{number}") for number in range(caches))
    return train_config(cache=folders, cache_weights=weights, **flags)


def test_without_weights_an_epoch_is_every_sample_of_every_cache_once() -> None:
    """Several caches are then one larger one."""
    order = make_order(config(2), columns((20, 10)), seed=1).orders[0]
    assert sorted(positions(order, 0, 30)) == list(range(30))
    assert positions(order, 0, 60) == positions(Order(30, 2, seed=1), 0, 60)


@pytest.mark.parametrize(
    ("sizes", "weights", "shares"),
    [((30, 10), (3, 1), [30, 10]), ((30, 10), (1, 3), [10, 30]), ((10, 10, 13), (1, 1, 1), [11, 11, 11])],
)
def test_weights_are_shares_of_an_epoch(sizes: tuple[int, ...], weights: tuple[float, ...], shares: list[int]) -> None:
    """An epoch stays as long as all caches together, and its places are divided by weight."""
    samples = columns(sizes)
    order = make_order(config(len(sizes), *weights), samples, seed=1).orders[0]
    assert order.samples == sum(sizes)
    for start in (0, order.samples):
        owners = samples.caches[positions(order, start, order.samples)]
        assert np.bincount(owners).tolist() == shares


def test_prompts_are_drawn_within_the_share_of_their_cache() -> None:
    """With `--sample_by prompt` a cache keeps its share, and its prompts divide it evenly."""
    samples = columns((10, 10), [0] * 9 + [1] + list(range(2, 12)))
    order = make_order(config(2, 1, 1, sample_by="prompt"), samples, seed=1).orders[0]
    stream = np.array(positions(order, 0, 4000))
    assert (stream < 10).sum() == 2000
    assert (stream == 9).sum() == 1000
    assert np.bincount(stream)[10:].tolist() == [200] * 10


@pytest.mark.parametrize(("sizes", "weights"), [((20, 10), (1000, 1)), ((20, 0), (1, 1))])
def test_a_cache_that_would_never_be_seen_is_named(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    """Too small a weight, or all of its samples held out."""
    with pytest.raises(SettingsError, match=r"cache1 would give \d+ of .* from \d+ .*leave it out"):
        make_order(config(2, *weights), columns(sizes), seed=1)


@pytest.mark.parametrize(
    "weights", [(1.0,), (1, 2, 3), (1, 0), (1, -1), (1, float("nan")), (1, float("inf")), (1e308, 1e308)]
)
def test_weights_that_make_no_sense_are_refused(weights: tuple[float, ...]) -> None:
    """One number above 0 for each cache; the answer says so and repeats what was given."""
    with pytest.raises(
        SettingsError, match=r"--cache_weights .*: expected one number above 0 for each --cache \(cache0 cache1\)"
    ):
        config(2, *weights)


@pytest.mark.parametrize("again", ["a", "a/", "b/../a", "link", "s3://bucket/a/"])
def test_a_cache_that_is_named_twice_is_refused(again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever name: each of its samples would be trained on twice in an epoch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "b").mkdir()
    with pytest.raises(SettingsError, match=f"--cache names {again} a second time: .*--cache_weights"):
        train_config(cache=("a", "b", "s3://bucket/a", again))
    train_config(cache=("a", "b", "s3://bucket/a", "s3://bucket/b"))


RECORDED = {  # of 1,000 positions at commit 005a64b, by seed 7 and by one of more than 32 bits
    "one cache": ("74d2b6a8078f44a6", "ddf8303667c5adce"),
    "two caches": ("fcc19f90c6a29ceb", "359398037da69678"),
    "weights": ("43df29536abf4d9d", "c8272223a5b9a46e"),
    "prompts": ("b13f722586b13041", "8a3da114ef4fd505"),
    "weights and prompts": ("aca6c0b65cfe1f99", "d337a6adedd496dd"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_samples_of_one_shape_come_as_they_always_did(name: str) -> None:
    """Bit for bit as before there were shapes, so that a run that was begun then goes on as it would have."""
    flags, samples = {
        "one cache": (config(1), columns((37,))),
        "two caches": (config(2), columns((20, 10))),
        "weights": (config(2, 3, 1), columns((30, 10))),
        "prompts": (config(1, sample_by="prompt"), columns((12,), [0, 0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4])),
        "weights and prompts": (config(2, 1, 2.5, sample_by="prompt"), columns((10, 10), [0] * 9 + [1, *range(2, 12)])),
    }[name]
    for seed, expected in zip((7, 2**40 + 1), RECORDED[name], strict=True):
        drawn = itertools.islice(make_order(flags, samples, seed).batches([0], 10), 100)
        numbers, views = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        content = np.stack([numbers, views]).astype("<i8").tobytes()
        assert hashlib.blake2b(content, digest_size=8).hexdigest() == expected


def shapes(*sizes: int) -> Samples:
    """Samples of some shapes, so many of each, in mixed order."""
    widths = np.random.default_rng(0).permutation(np.repeat(np.arange(1, len(sizes) + 1), sizes))
    return columns((sum(sizes),), shapes=widths.tolist())


def run(turns: Turns, seen: list[int], size: int, processes: int, steps: int) -> tuple[list[np.ndarray], list[int]]:
    """What all processes see in some steps from a position on, a batch of all of them in each; and the position."""
    ranks = [itertools.islice(turns.batches(seen, size, rank, processes), steps) for rank in range(processes)]
    batches = [np.concatenate([numbers for numbers, _ in parts]) for parts in zip(*ranks, strict=True)]
    for _ in range(steps):
        seen = turns.after(seen, size * processes)
    return batches, seen


def check(samples: Samples, first: tuple[int, int], then: tuple[int, int]) -> None:
    """Train on some processes with some batch, resume on others with another: no batch is partial or of two shapes,
    and of each shape come permutations, one after the other, the same ones in whatever pieces."""
    turns, members = make_order(config(1), samples, seed=3), samples.by_shape()
    position, widths, streams = [0] * len(members), samples.shapes[:, 1], [[] for _ in members]
    for size, processes in (first, then):
        steps = 2 + 3 * len(samples.rows) // (size * processes)
        batches, reached = run(turns, position, size, processes, steps)
        shares = turns.rates / turns.rates.sum()
        if position == [0] * len(members):  # nobody is further from its share than by a batch and a half
            away = np.abs(np.array(reached) - shares * sum(reached))
            assert (away <= 1.5 * size * processes).all()
        position = reached
        for batch in batches:
            assert len(batch) == size * processes
            (width,) = set(widths[batch].tolist())
            streams[width - 1] += batch.tolist()
    assert [len(stream) for stream in streams] == position
    for stream, numbers, order in zip(streams, members.values(), turns.orders, strict=True):
        assert stream == numbers[order(0, len(stream) + 1)[0]].tolist()[:-1]
        for start in range(0, len(stream), len(numbers)):
            one = stream[start : start + len(numbers)]
            assert len(set(one)) == len(one)


def test_of_every_small_case_each_batch_has_one_shape_and_each_shape_all_of_its_samples() -> None:
    """All numbers of samples of one to three shapes, on one to three processes, resumed on other ones."""
    sizes = [counts for shapes in (1, 2, 3) for counts in itertools.product(range(1, 5), repeat=shapes)]
    places = list(itertools.product((1, 2, 3), (1, 2, 3)))
    for n, counts in enumerate(sizes):
        samples = shapes(*counts)
        for m, first in enumerate(places[n % 2 :: 2]):  # each with each, over all sizes
            check(samples, first, places[(n // 2 + m) % len(places)])


def test_of_large_cases_too() -> None:
    """Up to 27 shapes, some of them rare, on up to eight processes."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        counts = np.maximum(1, rng.exponential(40, rng.integers(1, 28))).astype(int).tolist()
        first, then = ((int(rng.integers(1, 17)), int(rng.integers(1, 9))) for _ in range(2))
        check(shapes(*counts), first, then)


def test_each_shape_is_shuffled_by_itself_in_each_pass_and_lap() -> None:
    """Two shapes of as many samples come in orders of their own, and those of another lap are others again."""
    samples, lists = shapes(30, 30), set[tuple[int, ...]]()
    for lap in (0, 1):
        for order in make_order(config(1), samples, 1, lap).orders:
            lists |= {tuple(positions(order, 0, 30)), tuple(positions(order, 30, 30))}
    assert len(lists) == 8
    one = columns((30,))
    assert positions(make_order(config(1), one, 1, 1).orders[0], 0, 30) not in (
        positions(make_order(config(1), one, 1, lap).orders[0], 0, 30) for lap in (0, 2)
    )


def test_caches_keep_their_shares_over_all_shapes() -> None:
    """Weights 3 and 1 for two caches whose pictures have four shapes in other numbers; rare ones are drawn, too."""
    widths = np.repeat([1, 2, 3, 4, 1, 2, 3, 4], [200, 100, 50, 1, 10, 10, 300, 30])
    samples = columns((351, 350), shapes=widths.tolist())
    turns = make_order(config(2, 3, 1), samples, seed=1)
    batches, _ = run(turns, [0] * 4, 8, 2, 2000)
    seen = np.bincount(np.concatenate(batches), minlength=701)
    assert seen[:351].sum() / seen.sum() == pytest.approx(0.75, abs=0.002)
    assert seen[:351] / seen[:351].mean() == pytest.approx(1, abs=0.1)
    assert seen[351:] / seen[351:].mean() == pytest.approx(1, abs=0.15)
    tiny = make_order(config(2, 10**6, 10**4), samples, seed=1)
    assert min(share for mix in tiny.orders for share in mix.shares) == 1  # type: ignore[attr-defined]
    assert {mix.samples for mix in turns.orders} == {FINE}


def test_prompts_come_equally_often_over_all_shapes() -> None:
    """One with many samples as often as one with few; in two shapes it is two prompts."""
    groups, widths = [0] * 50 + [1] * 5 + list(range(2, 20)), [1] * 30 + [2] * 20 + [1] * 5 + [2] * 10 + [1] * 8
    samples = columns((73,), groups, shapes=widths)
    batches, _ = run(make_order(config(1, sample_by="prompt"), samples, 2), [0, 0], 4, 2, 2000)
    seen = np.bincount(samples.groups[np.concatenate(batches)])
    assert seen[0] / seen[1] == pytest.approx(2, abs=0.05)
    assert seen[1:] / seen[1] == pytest.approx(1, abs=0.05)


def test_positions_count_the_same_as_long_as_the_samples_are_the_same() -> None:
    """Their identity changes with any sample; with several shapes with what decides on turns, too."""
    same, other = identity(config(1), shapes(3, 4)), identity(config(1), shapes(3, 5))
    assert same == identity(config(1), shapes(3, 4)) != other
    assert same != identity(config(1, sample_by="prompt"), shapes(3, 4))
    assert identity(config(1), columns((7,))) == identity(config(1, sample_by="prompt"), columns((7,)))
