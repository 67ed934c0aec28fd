"""Drops what is torn in a cache, so that `ip2p-encode` makes it again."""

from collections.abc import Sequence
from pathlib import Path

from ..base.errors import CacheError
from ..cache.format import Cache
from ..cache.samples import Ledger
from ..cache.writer import write_state
from .verify import Finding, unit_of


def repair(folder: Path, findings: Sequence[Finding]) -> list[str]:
    """Delete torn units and damaged files as far as `ip2p-encode` can make them again; returns their paths.

    The samples whose numbers are gone become pending, so that no training takes them for encoded.
    """
    if not findings:
        return []
    units = {finding.unit for finding in findings if finding.unit}
    dropped = {finding.path for finding in findings if finding.drop}
    for path in folder.rglob("*"):
        if unit_of(name := path.relative_to(folder).as_posix()) in units and path.is_file():
            dropped.add(name)
    # Records first: a unit without its record does not exist, whenever this is interrupted.
    there = sorted(path for path in dropped if (folder / path).exists())
    for path in there:
        (folder / path).unlink()
    _settle(folder)
    return there


def _settle(folder: Path) -> None:
    """Bring samples and manifest up to date with the records that are left, if both are sound."""
    try:
        cache = Cache.open(folder)
        cache.check_files()
        ledger = Ledger.of(cache)
    except CacheError:
        return  # ip2p-encode builds the samples anew; until then no training opens this cache
    write_state(folder, cache.manifest, ledger.settle(cache.samples()))
