"""Which sample, and which view of it, comes when: a function of the seed and the position alone.

The samples of each shape are an endless sequence of their own, of which a batch of all processes takes the next ones;
so the position is how many samples of each shape were seen.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import numpy as np

from ...encode.base.errors import SettingsError
from ...encode.base.files import content_key
from ...encode.cached import Samples
from ..config import TrainConfig
from .sweep import Sweep, described

FINE = 1000  # places at least, among which the caches of a mix divide those of one shape


class Order:
    """An endless sequence of samples, each epoch a permutation of them.

    Args:
        samples: how many there are.
        views: sides of the coin that is tossed for each.
        seed: decides everything, with the position.
        groups: (N,) numbers of prompts, to draw a prompt first and then one of its samples, as the original project
            does; so the samples of a prompt that has many come more seldom. Without it each sample comes once.
        stream: number of the sequence, where several share a seed.
        place: more numbers that tell it from others.
        sorted_by: brings the samples drawn for an epoch into another order, given it and the rest of its randomness.
    """

    def __init__(
        self,
        samples: int,
        views: int,
        seed: int,
        groups: np.ndarray | None = None,
        stream: int = 0,
        place: tuple[int, ...] = (),
        sorted_by: Callable[[np.ndarray, int, np.random.Generator], np.ndarray] | None = None,
    ):
        self.samples, self.views, self.seed, self.stream, self.place = samples, views, seed, stream, place
        self.sorted_by = sorted_by
        self._epochs: dict[int, np.ndarray] = {}
        self._members = None if groups is None else np.argsort(groups, kind="stable")
        self._sizes = np.zeros(0, np.int64) if groups is None else np.bincount(groups)

    def __call__(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and views at positions `start` to `start + count`, (count,) each."""
        stop, parts = start + count, []
        for epoch in range(start // self.samples, -(-stop // self.samples)):
            first = epoch * self.samples
            parts.append(self._epoch(epoch)[:, max(0, start - first) : stop - first])
        numbers, views = np.concatenate(parts, axis=1)
        return numbers, views

    def _epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers and views of a whole epoch, (2, samples)."""
        if epoch not in self._epochs:
            self._epochs = {known: value for known, value in self._epochs.items() if known >= epoch - 1}
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, self.stream, *self.place])
        order = rng.permutation(self.samples) if self._members is None else self._by_prompt(rng, self._members)
        views = rng.integers(0, self.views, self.samples)
        return np.stack([self.sorted_by(order, epoch, rng) if self.sorted_by else order, views])

    def _by_prompt(self, rng: np.random.Generator, members: np.ndarray) -> np.ndarray:
        """As many positions as there are samples: all prompts in random order, again and again."""
        prompts = len(self._sizes)
        rounds = [rng.permutation(prompts) for _ in range(-(-self.samples // prompts))]
        drawn = np.concatenate(rounds)[: self.samples]
        first = self._sizes.cumsum() - self._sizes
        return members[first[drawn] + rng.integers(0, self._sizes[drawn])]


class Mix(Order):
    """Several orders in one: a fixed share of each epoch's positions, scattered over it, belongs to each of them.

    Each goes on where it stopped in the epoch before: nothing of it comes again before all of it has come.

    Args:
        orders: their samples follow each other.
        shares: positions in an epoch of each; in all as many as there are samples.
    """

    def __init__(self, orders: Sequence[Order], shares: Sequence[int], seed: int, place: tuple[int, ...] = ()):
        super().__init__(sum(shares), 1, seed, place=place)
        self.orders, self.shares = orders, shares
        self._first = [*accumulate((order.samples for order in orders[:-1]), initial=0)]

    def _draw(self, epoch: int) -> np.ndarray:
        places = np.repeat(np.arange(len(self.orders)), self.shares)
        seed = [self.seed, epoch, *((0, *self.place) if self.place else ())]
        owners = np.random.default_rng(seed).permutation(places)
        parts = [np.stack(order(epoch * share, share)) for order, share in zip(self.orders, self.shares, strict=True)]
        for part, first in zip(parts, self._first, strict=True):
            part[0] += first
        drawn = np.empty((2, self.samples), np.int64)
        drawn[:, np.argsort(owners, kind="stable")] = np.concatenate(parts, axis=1)
        return drawn


class Turns:
    """Batches of one shape each, on all processes the same one: the shape that is least far through has its turn.

    That is Sainte-Laguë's rule, by which seats are given to parties: at any time each shape has had its share of the
    samples to within about a batch, and with the next batch the one whose share falls behind the most comes nearest.

    Args:
        orders: of the samples of each shape.
        members: the numbers of these samples, for each shape.
        rates: shares of the shapes, in any unit.
    """

    def __init__(self, orders: Sequence[Order], members: Sequence[np.ndarray], rates: Sequence[float]):
        self.orders, self.members, self.rates = orders, members, np.array(rates, np.float64)

    def after(self, seen: Sequence[int], batch: int) -> list[int]:
        """How many samples of each shape were seen after one more batch, of all processes."""
        turn = self.turn(seen, batch)
        return [count + batch * (shape == turn) for shape, count in enumerate(seen)]

    def turn(self, seen: Sequence[int], batch: int) -> int:
        """Number of the shape whose turn it is."""
        return int(np.argmin((np.array(seen) + batch / 2) / self.rates))

    def batches(
        self, seen: Sequence[int], size: int, rank: int = 0, processes: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endlessly, from a position on: sample numbers and views of each batch of one process, (size,) each."""
        while True:
            turn = self.turn(seen, size * processes)
            numbers, views = self.orders[turn](seen[turn] + rank * size, size)
            yield self.members[turn][numbers], views
            seen = self.after(seen, size * processes)


def identity(config: TrainConfig, samples: Samples, sweep: Sweep | None = None) -> str:
    """Of what positions count: it changes with the samples; and where shapes take turns, with what decides on these.

    A sample is known by its pair and, in its cache, by the row of its instruction.
    """
    flags = repr((config.samples.cache_weights, config.samples.sample_by)) if len(samples.by_shape()) > 1 else ""
    return content_key(samples.pairs.tobytes(), samples.text_rows.tobytes(), flags.encode() + described(sweep))


def remarks(samples: Samples, batch: int, factor: int) -> Iterator[str]:
    """What is said of shapes that have fewer samples than all processes take in a batch; pixels by the VAE's factor."""
    for (height, width), members in (shapes := samples.by_shape()).items():
        if len(members) < batch and len(shapes) > 1:
            yield (
                f"{len(members):,} samples have {factor * width} x {factor * height} px, fewer than the {batch:,} of a "
                "batch: it holds them several times, and comes the more seldom"
            )


def make_order(config: TrainConfig, samples: Samples, seed: int, lap: int = 0, sweep: Sweep | None = None) -> Turns:
    """The order that the flags ask for: all samples of all caches once in an epoch, or a mix by weights.

    Args:
        lap: how often the samples have become others in the course of the run.
        sweep: how a window goes over the caches, if there is one: the same for all shapes.

    Raises SettingsError: a cache that has a weight would never be seen.
    """
    weights, prompts = config.samples.cache_weights, config.samples.sample_by == "prompt"
    check_weights(config, samples)
    whole = [_size(samples.select(samples.caches == number), prompts) for number in range(len(weights))]
    orders, rates, shapes = [], [], samples.by_shape()

    def order(part: Samples, stream: int, place: tuple[int, ...]) -> Order:
        groups, sort = part.prompts() if prompts else None, partial(sweep.sort, part, (seed, lap)) if sweep else None
        return Order(len(part.rows), part.views.shape[1], seed, groups, stream, place, sort)

    for shape, members in shapes.items():
        part = samples.select(members)
        place = (lap, *shape) if len(shapes) > 1 else (lap,) if lap else ()
        if not weights:
            orders.append(order(part, 0, place))
            rates.append(_size(part, prompts))
            continue
        parts = {number: part.select(part.caches == number) for number in np.unique(part.caches).tolist()}
        mixed = [weights[number] * (_size(one, prompts) / whole[number]) for number, one in parts.items()]
        length = len(members) if len(shapes) == 1 else max(len(members), FINE)
        shares = np.maximum(1, divide(mixed, length)).tolist()  # small as it may be, it is drawn
        orders.append(Mix([order(one, 1 + number, place) for number, one in parts.items()], shares, seed, place))
        rates.append(sum(mixed))
    return Turns(orders, list(shapes.values()), rates)


def _size(part: Samples, prompts: bool) -> int:
    """What is drawn evenly of some samples: each of them, or each prompt."""
    return len(np.unique(part.groups)) if prompts else len(part.rows)


def divide(weights: Sequence[float], places: int) -> np.ndarray:
    """Some number of places, divided by weight into whole numbers."""
    edges = np.round(np.cumsum(weights) / sum(weights) * places).astype(int)
    return np.diff(edges, prepend=0)


def check_weights(config: TrainConfig, samples: Samples) -> None:
    """Raise SettingsError where a cache that has a weight would never be seen."""
    weights = config.samples.cache_weights
    shares = divide(weights, len(samples.rows)).tolist() if weights else ()
    for number, (folder, share) in enumerate(zip(config.samples.cache, shares, strict=False)):
        there = int((samples.caches == number).sum())
        if not (share and there):
            raise SettingsError(
                f"--cache_weights {' '.join(f'{weight:g}' for weight in weights)}: {folder} would give {share:,} of "
                f"the {len(samples.rows):,} samples of an epoch, from {there:,} that are not held out: "
                "leave it out, or give it more weight"
            )
