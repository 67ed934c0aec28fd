"""Which samples are trained on: those of each cache that `--keep` leaves, but for those that are held out."""

from collections.abc import Sequence

import numpy as np

from ...encode.base.errors import SettingsError
from ...encode.cache.format import Cache
from ...encode.cache.keep import some_kept
from ...encode.cached import Samples
from ..agree import agreed


def choose(caches: Sequence[Cache], condition: str | None) -> list[np.ndarray] | None:
    """The samples of each cache that a condition keeps, (all samples,) bool; None where there is no condition.

    One process asks, and tells the others.

    Raises:
        SettingsError: it is none, names a column that a cache lacks, or keeps nothing of a cache; in all processes.
    """
    if condition is None:
        return None
    return agreed(lambda: [some_kept(cache, condition) for cache in caches])


def hold_out(samples: Samples, count: int) -> tuple[Samples, Samples]:
    """Split off at least `count` samples that training never sees, by image pair, so that no pair is on both sides.

    Which they are depends on the identities of the pairs alone: the same ones after the dataset has grown by a little,
    and held out of every cache that holds them. Raises SettingsError: nothing is left to train on.
    """
    chosen = np.isin(samples.pairs, np.sort(samples.pairs)[:count])
    if chosen.all():
        found = f"--num_validation_samples {count} would hold out all of the {len(chosen):,} samples"
        raise SettingsError(f"{found}: take fewer")
    return samples.select(~chosen), samples.select(chosen)
