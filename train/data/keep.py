"""Which samples of each cache `--keep` leaves: one process asks, and tells the others."""

from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ...encode.base.console import say
from ...encode.base.errors import Ip2pError, SettingsError
from ...encode.cache.format import Cache
from ...encode.cache.keep import kept


def choose(caches: Sequence[Cache], condition: str | None) -> list[np.ndarray] | None:
    """The samples of each cache that a condition keeps, (all samples,) bool; None where there is no condition.

    Raises:
        SettingsError: it is none, names a column that a cache lacks, or keeps nothing of a cache; in all processes.
    """
    if condition is None:
        return None
    told: list[list[np.ndarray] | Ip2pError] = [[]]
    if PartialState().is_main_process:
        try:
            told = [[_of(cache, condition) for cache in caches]]
        except Ip2pError as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], Ip2pError):
        raise told[0]
    return told[0]


def _of(cache: Cache, condition: str) -> np.ndarray:
    mask = kept(cache, condition)
    table = pq.read_table(cache.folder / "samples.parquet", columns=["status"])
    usable = table["status"].to_numpy(zero_copy_only=False) == "ok"
    left, there = int((mask & usable).sum()), int(usable.sum())
    if there and not left:
        raise SettingsError(f"--keep {condition}: that is true of none of the {there:,} samples of {cache.folder}")
    say(f"--keep {condition}: {left:,} of {there:,} samples of {cache.folder}")
    return mask
