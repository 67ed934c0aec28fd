"""Which sample, and which view of it, comes when: a function of the seed and the position alone."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ...encode.base.errors import SettingsError
from ..config import TrainConfig
from .samples import Samples


class Order:
    """An endless sequence of samples, each epoch a permutation of them.

    Args:
        samples: how many there are.
        views: sides of the coin that is tossed for each.
        seed: decides everything, with the position.
        groups: (N,) numbers of prompts, to draw a prompt first and then one of its samples, as the original project
            does; so the samples of a prompt that has many come more seldom. Without it each sample comes once.
        stream: number of the sequence, where several share a seed.
    """

    def __init__(self, samples: int, views: int, seed: int, groups: np.ndarray | None = None, stream: int = 0):
        self.samples, self.views, self.seed, self.stream = samples, views, seed, stream
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
        rng = np.random.default_rng([self.seed, epoch, self.stream])
        order = rng.permutation(self.samples) if self._members is None else self._by_prompt(rng, self._members)
        return np.stack([order, rng.integers(0, self.views, self.samples)])

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

    def __init__(self, orders: Sequence[Order], shares: Sequence[int], seed: int):
        super().__init__(sum(shares), 1, seed)
        self.orders, self.shares = orders, shares
        self._first = [*accumulate((order.samples for order in orders[:-1]), initial=0)]

    def _draw(self, epoch: int) -> np.ndarray:
        places = np.repeat(np.arange(len(self.orders)), self.shares)
        owners = np.random.default_rng([self.seed, epoch]).permutation(places)
        parts = [np.stack(order(epoch * share, share)) for order, share in zip(self.orders, self.shares, strict=True)]
        for part, first in zip(parts, self._first, strict=True):
            part[0] += first
        drawn = np.empty((2, self.samples), np.int64)
        drawn[:, np.argsort(owners, kind="stable")] = np.concatenate(parts, axis=1)
        return drawn


def make_order(config: TrainConfig, samples: Samples, seed: int) -> Order:
    """The order that the flags ask for: all samples of all caches once in an epoch, or a mix by weights.

    Raises SettingsError: a cache that has a weight would never be seen.
    """
    weights = config.samples.cache_weights

    def order(part: Samples, stream: int) -> Order:
        groups = part.prompts() if config.samples.sample_by == "prompt" else None
        return Order(len(part.rows), samples.views.shape[1], seed, groups, stream)

    if not weights:
        return order(samples, 0)
    parts = [samples.select(samples.caches == number) for number in range(len(weights))]
    edges = np.round(np.cumsum(weights) / sum(weights) * len(samples.rows)).astype(int)
    shares = np.diff(edges, prepend=0).tolist()
    for folder, part, share in zip(config.samples.cache, parts, shares, strict=True):
        if not (share and len(part.rows)):
            raise SettingsError(
                f"--cache_weights {' '.join(f'{weight:g}' for weight in weights)}: {folder} would give {share:,} of "
                f"the {len(samples.rows):,} samples of an epoch, from {len(part.rows):,} that are not held out: "
                "leave it out, or give it more weight"
            )
    return Mix([order(part, stream) for stream, part in enumerate(parts, start=1)], shares, seed)
