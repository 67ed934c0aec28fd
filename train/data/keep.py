"""Which samples of each cache `--keep` leaves: one process asks, and tells the others."""

from collections.abc import Sequence

import numpy as np

from ...encode.base.console import say
from ...encode.base.errors import SettingsError
from ...encode.cache.commits import pc
from ...encode.cache.format import Cache
from ...encode.cache.keep import kept
from ..agree import agreed


def choose(caches: Sequence[Cache], condition: str | None) -> list[np.ndarray] | None:
    """The samples of each cache that a condition keeps, (all samples,) bool; None where there is no condition.

    Raises:
        SettingsError: it is none, names a column that a cache lacks, or keeps nothing of a cache; in all processes.
    """
    if condition is None:
        return None
    return agreed(lambda: [_of(cache, condition) for cache in caches])


def _of(cache: Cache, condition: str) -> np.ndarray:
    mask = kept(cache, condition)
    usable = pc.equal(cache.samples("status")["status"], "ok").to_numpy()
    left, there = int((mask & usable).sum()), int(usable.sum())
    if there and not left:
        raise SettingsError(f"--keep {condition}: that is true of none of the {there:,} samples of {cache.name}")
    say(f"--keep {condition}: {left:,} of {there:,} samples of {cache.name}")
    return mask
