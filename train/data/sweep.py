"""In which order a run goes through caches of which only a window is at hand: shard by shard, many of them at a time.

Each epoch all shards stand on a circle, in an order that is drawn anew, and the window goes round it once: a shard
comes in, its samples are scattered over the time that it stays, and it leaves. So an epoch is a permutation of its
samples, as any, drawn from seed and epoch; and there are no edges between blocks.
"""

from typing import NamedTuple

import numpy as np

from ...encode.base.console import say
from ...encode.base.errors import SettingsError
from ...encode.cache.format import ARRAYS
from ...encode.cache.reader import Reader
from ...encode.cache.window import at_least
from ...encode.cached import Samples

CIRCLE = 7  # a number that tells these draws from those of an order with the same seed


class Sweep(NamedTuple):
    """How a window goes over C caches."""

    firsts: np.ndarray  # (C,) row of the reader with which a cache begins
    rows: np.ndarray  # (C,) of a shard
    shards: np.ndarray  # (C,) that hold its pictures
    width: np.ndarray  # (C,) how many of them are at hand at once

    def sort(
        self, samples: Samples, seed: tuple[int, ...], drawn: np.ndarray, epoch: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Bring some of the samples, numbers that were drawn in random order, into the order of the window.

        Args:
            seed: decides on the circle with the epoch: the same for all that shall pass over the same shards together.
        """
        circle = np.random.default_rng([CIRCLE, *seed, epoch])
        places = np.concatenate([circle.permutation(count) / count for count in self.shards])
        caches = samples.caches[drawn]
        shards = (samples.rows[drawn] - self.firsts[caches]) // self.rows[caches]
        places = places[shards + (self.shards.cumsum() - self.shards)[caches]]
        stays = (self.width / self.shards)[caches] * rng.random(len(drawn))
        return drawn[np.argsort((places + stays) % 1, kind="stable")]


def described(sweep: Sweep | None) -> bytes:
    """What decides on an order beside the samples; nothing where there is no window."""
    return repr([*sweep.shards.tolist(), *sweep.width.tolist()]).encode() if sweep else b""


def sweep_over(reader: Reader, samples: Samples) -> Sweep | None:
    """How a reader's window goes over its caches, which is said; None where it holds them whole.

    Half of it is for one epoch: where an epoch ends, those of the next come in while its own go out.

    Raises:
        SettingsError: the window is too small for a single shard.
    """
    firsts = np.array(reader.first_rows["images"])
    rows = np.array([cache.shard_rows["images"] for cache in reader.caches])
    ends = np.append(firsts[1:], reader.rows["images"])
    shards = (ends - firsts) // rows
    found = [_width(reader, samples, number, count) for number, count in enumerate(shards.tolist())]
    width, least = (np.array(one) for one in zip(*found, strict=True))
    if not width.all():
        name, enough = reader.caches[least.argmax()].name, at_least(least.max())
        less = f"--window {reader.window:g}: two shards of {name} must fit in, with their texts"
        raise SettingsError(f"{less}: give at least --window {enough}")
    if (width == shards).all():
        return None
    for cache, count, there in zip(reader.caches, shards, width, strict=True):
        say(f"--window {reader.window:g}: {cache.name} is gone through with {there:,} of {count:,} shards at a time")
    return Sweep(firsts, rows, shards, width)


def _width(reader: Reader, samples: Samples, number: int, shards: int) -> tuple[int, float]:
    """How many shards of a cache's pictures may be at hand at once, with the texts that go with them.

    Beside that, the bytes of a window of all caches with which they were one at least.
    """
    cache, room = reader.caches[number], reader.budgets[number] / 2
    if reader.sizes[number] <= reader.budgets[number]:
        return shards, 0
    size = {kind: cache.shard_rows[kind] * reader.row_bytes(ARRAYS[kind]) for kind in ARRAYS}
    own = samples.select(samples.caches == number)
    images, texts = (
        (rows - reader.first_rows[kind][number]) // cache.shard_rows[kind]
        for kind, rows in (("images", own.rows), ("text", own.text_rows * reader.holds_text))
    )
    pairs, there = len(np.unique((images << 32) + texts)), len(np.unique(texts))
    picture, text = len(cache.views) * size["images"], pairs / shards * size["text"]
    # Each shard of pictures with shards of text of its own; or with few that most of them share.
    found = int(max(room / (picture + text), (room - there * size["text"]) / picture))
    least = max(2 * min(picture + text, picture + there * size["text"]), size["images"] + size["text"])  # or one row's
    least = min(least, reader.sizes[number])
    found = found if least <= reader.budgets[number] else 0
    return min(found, shards), least * sum(reader.sizes) / reader.sizes[number]
