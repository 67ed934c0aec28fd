"""Checks every byte of a cache, names what is wrong, and drops what is torn, so that `ip2p-encode` makes it again."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import zarr

from ..base.console import bar
from ..base.errors import CacheError
from ..base.files import IRREPLACEABLE, UNFINISHED, file_record, read_record
from ..base.system import cores
from ..cache.commits import Commit, Unit, unit_of
from ..cache.format import SAMPLES, Cache, wrong_size
from ..cache.samples import NULL_PROMPT, Ledger, counts, text_key
from ..cache.shapes import misfit
from ..cache.tables import is_sealed
from ..cache.writer import write_state
from ..planning.index import WAITING

SMALL = re.compile(r"(samples|units)\.parquet|data\.zarr/(.*/)?zarr\.json")
DAMAGED = "is damaged (its checksum differs from what was written)"
Records = Mapping[Unit, Commit]


class Finding(NamedTuple):
    """Something that is wrong in a cache, and what would have to go so that `ip2p-encode` makes it again."""

    path: str  # inside the cache folder
    problem: str
    unit: Unit | None = None  # to be dropped as a whole
    drop: bool = False  # this file alone; never a table that is whole by its own seal: it has the columns that are kept
    by_hand: bool = False  # the problem says what mends it, and nothing else does


def verify(folder: Path) -> list[Finding]:
    """Everything that is wrong in a cache; it may be damaged in any way.

    Raises:
        CacheError: no cache there, or one of another format.
    """
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    files = {path for path in files if not path.startswith(WAITING)}  # of an encode that is yet to go on
    try:
        whole = "format" in read_record(folder / "manifest.json")
    except CacheError:
        whole = False
    cache = Cache.open(folder) if whole or not any(map(unit_of, files)) else None  # `open` says where there is none
    if cache:
        problems = ((path, _difference(folder / path, file)) for path, file in cache.manifest["files"].items())
        findings = [Finding(path, why, drop=not is_sealed(folder / path)) for path, why in problems if why]
    else:
        findings = [Finding("manifest.json", f"is missing or damaged: {IRREPLACEABLE}", by_hand=True)]
    if cache and not findings and (why := misfit(cache)):
        findings = [Finding("manifest.json", why, by_hand=True)]
    sound = cache if not findings else None
    records, damaged = _read_records(folder, files)
    known = {finding.unit for finding in damaged}
    findings += damaged + _shards(folder, records, sound)
    if sound:
        findings += [*_samples(sound, records, known), *_list(sound, records)]
    return [*findings, *_strays(files, cache, records, known)]


def repair(folder: Path, findings: Sequence[Finding]) -> list[str]:
    """Delete torn units and damaged files as far as `ip2p-encode` can make them again; returns their paths.

    The samples whose numbers are gone become pending, so that no training takes them for encoded.
    """
    if not findings:
        return []
    units = {finding.unit for finding in findings if finding.unit}
    alone = {finding.path for finding in findings if finding.drop}
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    # Records first: a unit without its record does not exist, whenever this is interrupted.
    dropped = sorted(path for path in paths if path in alone or unit_of(path) in units)
    for path in dropped:
        (folder / path).unlink()
    try:
        cache = Cache.open(folder)
        cache.check_files()
        ledger = Ledger.of(cache)
    except CacheError:
        return dropped  # ip2p-encode builds the samples anew; until then no training opens this cache
    write_state(folder, cache.manifest, ledger.settle(cache.samples()), ledger.commits)
    return dropped


def _difference(file: Path, expected: Mapping[str, Any]) -> str | None:
    """How a file differs from the size and checksum that were recorded for it."""
    return wrong_size(file, expected) or (None if file_record(file) == expected else DAMAGED)


def _read_records(folder: Path, files: Iterable[str]) -> tuple[dict[Unit, Commit], list[Finding]]:
    """All commit records that are whole, and what is wrong with the others."""
    records: dict[Unit, Commit] = {}
    damaged = []
    for path, unit in sorted((path, unit) for path in files if path.startswith("commits/") and (unit := unit_of(path))):
        try:
            record = read_record(folder / path)
        except CacheError:
            damaged.append(Finding(path, DAMAGED, unit))
            continue
        if [record.get(name) for name in ("kind", "shard", "view")] != [unit.kind, unit.shard, unit.view]:
            damaged.append(Finding(path, "is the record of another unit", unit))
            continue
        try:
            records[unit] = Commit.of(record, "it")
        except CacheError as error:
            damaged.append(Finding(path, str(error), unit))
    return records, damaged


def _shards(folder: Path, records: Records, cache: Cache | None) -> list[Finding]:
    """Compare all shards with their records; their numbers too where the metadata is sound (`cache`)."""
    arrays = {kind: cache.arrays(kind) if cache else {} for kind in ("images", "text")}
    findings: list[Finding] = []

    def check(unit: Unit) -> tuple[int, list[Finding]]:
        files = records[unit].files
        compared = ((path, _difference(folder / path, file)) for path, file in files.items())
        found = [Finding(path, problem, unit) for path, problem in compared if problem]
        if cache and not found:
            found += _scan(cache, unit, records[unit], arrays[unit.kind])
        return sum(file["bytes"] for file in files.values()), found

    total = sum(file["bytes"] for record in records.values() for file in record.files.values())
    with ThreadPoolExecutor(cores()) as pool, bar(None, "verify", "B", total=total) as progress:
        for size, found in pool.map(check, sorted(records)):
            findings += found
            progress.update(size)
    return findings


def _scan(cache: Cache, unit: Unit, record: Commit, arrays: Mapping[str, zarr.Array]) -> Iterator[Finding]:
    """Rows that were encoded must be finite, all others NaN."""
    paths = {name: cache.shard_path(name, unit, array.ndim) for name, array in arrays.items()}
    if set(paths.values()) != record.files.keys():
        yield Finding(f"commits/{unit.name}.json", f"does not name the shards of {', '.join(arrays)}", unit)
        return
    first = unit.shard * cache.shard_rows[unit.kind]
    keys = record.keys.is_valid().to_numpy(zero_copy_only=False).copy()
    keys[list(record.quarantined)] = False
    for name, array in arrays.items():
        rows = slice(first, first + len(keys))
        values = np.asarray(array[rows, unit.view] if unit.kind == "images" else array[rows])
        values = values.reshape(len(values), -1)
        encoded = keys[: len(values)]
        bad = np.where(encoded, ~np.isfinite(values).all(1), ~np.isnan(values).all(1))
        if bad.any():
            row = int(bad.argmax())
            problem = "is not finite" if encoded[row] else "holds numbers, but nothing was encoded there"
            yield Finding(paths[name], f"row {first + row} {problem} ({bad.sum():,} such rows)", unit)


def _samples(cache: Cache, records: Records, known: set[Unit | None]) -> Iterator[Finding]:
    """Compare the table of samples with the records; `known` units were named already."""
    samples, manifest = cache.samples().select(SAMPLES.names), cache.manifest  # no record has what is kept beside these
    ledger = Ledger(records, manifest["shard_rows"], len(manifest["views"]))
    settled, status = ledger.settle(samples), counts(samples)
    if status != manifest["counts"]:
        yield Finding("manifest.json", f"counts {manifest['counts']}, samples.parquet holds {status}")
    if pending := status.get("pending", 0):
        yield Finding("samples.parquet", f"{pending:,} samples are not encoded yet: run the same ip2p-encode again")
    state = np.array(samples["status"].to_pylist())
    looked_at = state != "pending"
    for kind, column, views in (("images", "row", ledger.views), ("text", "text_row", 1)):
        shards = samples[column].to_numpy() // ledger.shard_rows[kind]
        for unit in (
            Unit(kind, shard, view) for shard in np.unique(shards[shards >= 0]).tolist() for view in range(views)
        ):
            if unit not in records:
                looked_at &= shards != unit.shard
                count = ((shards == unit.shard) & (state == "ok")).sum()
                if count and unit not in known:
                    yield Finding(f"commits/{unit.name}.json", f"is missing: {count:,} samples need it", unit)
    if different := [number for number in _different(samples, settled) if looked_at[number]]:
        one = f"sample {samples['key'][different[0]]} differs from what its commit records say "
        one += f"({len(different):,} such samples)"
        yield Finding("samples.parquet", one)
    null = records.get(Unit("text", 0))
    if null and (null.keys[0].as_py() != text_key(NULL_PROMPT) or 0 in null.quarantined):
        yield Finding("commits/text-000000.json", "does not hold the empty instruction in row 0", Unit("text", 0))


def _different(a: pa.Table, b: pa.Table) -> list[int]:
    """Numbers of the rows in which two tables of the same columns differ."""
    pairs = ((x.to_pylist(), y.to_pylist()) for x, y in zip(a.columns, b.columns, strict=True) if not x.equals(y))
    return sorted({n for both in pairs for n, (x, y) in enumerate(zip(*both, strict=True)) if x != y})


def _list(cache: Cache, records: Records) -> Iterator[Finding]:
    """Compare the list of shards with the records, which win where they differ."""
    try:
        listed = cache.shards()  # in format 1 the records themselves
    except CacheError as error:
        yield Finding("units.parquet", str(error))
        return
    named = {path: file for record in records.values() for path, file in record.files.items()}
    if wrong := sorted(path for path in listed | named if listed.get(path) != named.get(path)):
        yield Finding("units.parquet", f"differs from the commit records in {len(wrong):,} shards ({wrong[0]}, …)")


def _strays(files: Iterable[str], cache: Cache | None, records: Records, known: set[Unit | None]) -> Iterator[Finding]:
    """Files that no record speaks of."""
    expected = {".lock", "manifest.json", *(f"commits/{unit.name}.json" for unit in records)}
    expected |= {path for record in records.values() for path in record.files}
    expected |= set(cache.manifest["files"] if cache else filter(SMALL.fullmatch, files))
    for path in sorted(set(files) - expected):
        unit = unit_of(path)
        if UNFINISHED.fullmatch(path.rpartition("/")[2]):
            yield Finding(path, "was left by a process that was killed", drop=True)
        elif unit is None or unit in records:
            yield Finding(path, "is no part of the cache: move it away", by_hand=True)
        elif unit not in known:
            yield Finding(path, f"has no commit record (commits/{unit.name}.json)", unit)
