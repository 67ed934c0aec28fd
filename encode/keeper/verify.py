"""Checks every byte of a cache and names what is wrong."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import zarr

from ..base.console import bar
from ..base.errors import CacheError
from ..base.files import UNFINISHED, file_record, read_record
from ..cache.format import Cache, Record, Unit
from ..cache.samples import NULL_PROMPT, Ledger, counts, text_key

RECORD = re.compile(r"(?:images-v(\d+)|text)-(\d{6,})\.json")
SMALL = re.compile(r"samples\.parquet|data\.zarr/(.*/)?zarr\.json")
Records = Mapping[Unit, Record]


class Finding(NamedTuple):
    """Something that is wrong in a cache, and what would have to go so that `ip2p-encode` makes it again."""

    path: str  # inside the cache folder
    problem: str
    unit: Unit | None = None  # to be dropped as a whole
    drop: bool = False  # this file alone


def verify(folder: Path) -> list[Finding]:
    """Everything that is wrong in a cache; it may be damaged in any way.

    Raises:
        CacheError: no cache there, or one of another format.
    """
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    cache, findings = None, []
    try:
        whole = "format" in read_record(folder / "manifest.json")
    except CacheError:
        whole = False
    if not whole:
        if not any(map(unit_of, files)):
            Cache.open(folder)  # says that this is none
        findings.append(Finding("manifest.json", "is missing or damaged: delete it and pull a copy, or encode anew"))
    else:
        cache = Cache.open(folder)
        findings += _small_files(cache)
    sound = cache if not findings else None
    records, damaged = _read_records(folder, files)
    findings += damaged
    findings += _shards(folder, records, sound)
    if sound:
        findings += _samples(sound.samples(), sound.manifest, records, {finding.unit for finding in damaged})
    findings += _strays(files, cache, records, {finding.unit for finding in damaged})
    return findings


def unit_of(path: str) -> Unit | None:
    """The unit that a file belongs to, by its path inside the cache; None if to none."""
    match path.split("/"):
        case ["commits", name] if record := RECORD.fullmatch(name):
            view, shard = record.groups()
            return Unit("text" if view is None else "images", int(shard), int(view or 0))
        case ["data.zarr", "original" | "edited", "c", shard, view, *_] if shard.isdecimal() and view.isdecimal():
            return Unit("images", int(shard), int(view))
        case ["data.zarr", "text" | "pooled", "c", shard, *_] if shard.isdecimal():
            return Unit("text", int(shard))
    return None


def compare(file: Path, expected: Mapping[str, Any]) -> str | None:
    """How a file differs from the size and checksum that were recorded for it."""
    if not file.is_file():
        return "is missing"
    found = file_record(file)
    if found["bytes"] != expected["bytes"]:
        return f"has {found['bytes']:,} bytes, {expected['bytes']:,} were written"
    return None if found == expected else "is damaged (its checksum differs from what was written)"


def _small_files(cache: Cache) -> Iterator[Finding]:
    for path, expected in cache.manifest["files"].items():
        if problem := compare(cache.folder / path, expected):
            yield Finding(path, problem, drop=True)


def _read_records(folder: Path, files: Iterable[str]) -> tuple[dict[Unit, dict[str, Any]], list[Finding]]:
    """All commit records that are whole, and what is wrong with the others."""
    records, damaged = {}, []
    for path in sorted(path for path in files if path.startswith("commits/")):
        if not (unit := unit_of(path)):
            continue
        try:
            record = read_record(folder / path)
        except CacheError:
            damaged.append(Finding(path, "is damaged (its checksum differs from what was written)", unit))
            continue
        if [record.get(name) for name in ("kind", "shard", "view")] != [unit.kind, unit.shard, unit.view]:
            damaged.append(Finding(path, "is the record of another unit", unit))
        else:
            records[unit] = record
    return records, damaged


def _shards(folder: Path, records: Records, cache: Cache | None) -> list[Finding]:
    """Compare all shards with their records; their numbers too where the metadata is sound (`cache`)."""
    arrays = {kind: cache.arrays(kind) if cache else {} for kind in ("images", "text")}
    findings = []

    def check(unit: Unit) -> tuple[int, list[Finding]]:
        files = records[unit]["files"]
        torn = [Finding(path, what, unit) for path, record in files.items() if (what := compare(folder / path, record))]
        scanned = torn or (list(_scan(cache, unit, records[unit], arrays[unit.kind])) if cache else [])
        return sum(record["bytes"] for record in files.values()), scanned

    total = sum(file["bytes"] for record in records.values() for file in record["files"].values())
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        bar(None, "verify", "B", total=total) as progress,
    ):
        for size, found in pool.map(check, sorted(records)):
            findings += found
            progress.update(size)
    return findings


def _scan(cache: Cache, unit: Unit, record: Record, arrays: Mapping[str, zarr.Array]) -> Iterator[Finding]:
    """Rows that were encoded must be finite, all others NaN."""
    paths = {name: cache.shard_path(name, unit, array.ndim) for name, array in arrays.items()}
    if set(paths.values()) != record["files"].keys():
        yield Finding(f"commits/{unit.name}.json", f"does not name the shards of {', '.join(arrays)}", unit)
        return
    first = unit.shard * cache.shard_rows[unit.kind]
    keys = np.array([key is not None and str(n) not in record["quarantined"] for n, key in enumerate(record["keys"])])
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


def _samples(
    samples: pa.Table, manifest: Mapping[str, Any], records: Records, known: set[Unit | None]
) -> Iterator[Finding]:
    """Compare the table of samples with the records; `known` units were named already."""
    ledger = Ledger(records, manifest["shard_rows"], len(manifest["views"]))
    before, after, status = samples.to_pylist(), ledger.settle(samples).to_pylist(), counts(samples)
    if status != manifest["counts"]:
        yield Finding("manifest.json", f"counts {manifest['counts']}, samples.parquet holds {status}")
    if pending := status.get("pending", 0):
        yield Finding("samples.parquet", f"{pending:,} samples are not encoded yet: run the same ip2p-encode again")
    missing: Counter[Unit] = Counter()
    different: list[str] = []
    for old, new in zip(before, after, strict=True):
        if old["status"] == "pending":
            continue
        absent = [unit for unit in ledger.units(old["row"], old["text_row"]) if unit not in records]
        if old["status"] == "ok" and absent:
            missing.update(absent)
        elif old != new and not absent:
            different.append(old["key"])
    for unit, count in sorted(missing.items()):
        if unit not in known:
            yield Finding(f"commits/{unit.name}.json", f"is missing: {count:,} samples need it", unit)
    if different:
        one = f"sample {different[0]} differs from what its commit records say ({len(different):,} such samples)"
        yield Finding("samples.parquet", one)
    null = records.get(Unit("text", 0))
    if null and (null["keys"][0] != text_key(NULL_PROMPT) or "0" in null["quarantined"]):
        yield Finding("commits/text-000000.json", "does not hold the empty instruction in row 0", Unit("text", 0))


def _strays(files: Iterable[str], cache: Cache | None, records: Records, known: set[Unit | None]) -> Iterator[Finding]:
    """Files that no record speaks of."""
    expected = {".lock", "manifest.json", *(f"commits/{unit.name}.json" for unit in records)}
    expected |= {path for record in records.values() for path in record["files"]}
    expected |= set(cache.manifest["files"] if cache else filter(SMALL.fullmatch, files))
    for path in sorted(set(files) - expected):
        unit = unit_of(path)
        if UNFINISHED.fullmatch(path.rpartition("/")[2]):
            yield Finding(path, "was left by a process that was killed", drop=True)
        elif unit is None or unit in records:
            yield Finding(path, "is no part of the cache: move it away")
        elif unit not in known:
            yield Finding(path, f"has no commit record (commits/{unit.name}.json)", unit)
