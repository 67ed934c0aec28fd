"""The planner as it was before it worked on columns, at commit 005a64b: what today's must equal, row by row."""

import itertools
import re
from collections import defaultdict
from typing import Any

import pyarrow as pa

from ip2p.encode.cache.commits import Unit
from ip2p.encode.cache.format import SAMPLES
from ip2p.encode.cache.samples import NULL_PROMPT, SIZES, Item, text_key

Records = dict[Unit, dict[str, Any]]
Shards = dict[str, int]


def assign(records: Records, size: Shards, samples: pa.Table, *, retry: bool) -> pa.Table:
    """Give each sample its rows."""
    columns = samples.to_pydict()
    tried = [reason is None or row >= 0 for reason, row in zip(columns["reason"], columns["row"], strict=True)]
    texts = list(map(text_key, columns["instruction"]))
    rows = _rows(records, size, "images", itertools.compress(columns["pair"], tried), retry)
    text_rows = _rows(records, size, "text", [text_key(NULL_PROMPT), *itertools.compress(texts, tried)], retry)
    columns["row"] = [rows[key] if try_ else -1 for key, try_ in zip(columns["pair"], tried, strict=True)]
    columns["text_row"] = [text_rows[key] if try_ else -1 for key, try_ in zip(texts, tried, strict=True)]
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def _rows(records: Records, size: Shards, kind: str, keys: Any, retry: bool) -> dict[str, int]:
    rows = _located(records, size, kind, retry)
    taken = {unit.shard for unit in records if unit.kind == kind}
    free = (shard * size[kind] + i for shard in itertools.count() if shard not in taken for i in range(size[kind]))
    new = (key for key in dict.fromkeys(keys) if key not in rows)
    return rows | dict(zip(new, free, strict=False))


def _located(records: Records, size: Shards, kind: str, retry: bool) -> dict[str, int]:
    views: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for unit in sorted(unit for unit in records if unit.kind == kind):
        views[unit.shard].append(records[unit])
    good: dict[str, int] = {}
    bad: dict[str, int] = {}
    for shard, held in sorted(views.items(), key=lambda item: len(item[1]), reverse=True):
        reasons = {int(i) for record in held for i in record["quarantined"]}
        for i, keys in enumerate(zip(*(record["keys"] for record in held), strict=True)):
            if i in reasons:
                bad[next(filter(None, keys))] = shard * size[kind] + i
            elif keys[0] is not None and len(set(keys)) == 1:
                good.setdefault(keys[0], shard * size[kind] + i)
    return good if retry else bad | good


def settle(records: Records, size: Shards, views: int, samples: pa.Table) -> pa.Table:
    """Bring status, reason and sizes up to date."""
    columns = samples.to_pydict()
    for n, (row, text_row) in enumerate(zip(columns["row"], columns["text_row"], strict=True)):
        if row < 0:
            continue
        keys = [columns["pair"][n]] * views + [text_key(columns["instruction"][n])]
        i, text_i = row % size["images"], text_row % size["text"]
        units = [
            *(Unit("images", row // size["images"], v) for v in range(views)),
            Unit("text", text_row // size["text"]),
        ]
        held = zip(map(records.get, units), [i] * views + [text_i], keys, strict=True)
        found = [(record, at) for record, at, key in held if record and record["keys"][at] == key]
        reasons = [record["quarantined"][str(at)] for record, at in found if str(at) in record["quarantined"]]
        complete = len(found) == len(keys)
        columns["status"][n] = "quarantined" if reasons else "ok" if complete else "pending"
        columns["reason"][n] = reasons[0] if reasons else None
        if complete and not reasons:
            sizes = [record["sizes"][i] for record, _ in found[:views]]
            for name, value in zip(SIZES, sizes[0], strict=False):
                columns[name][n] = value
            columns["crop_top"][n], columns["crop_left"][n] = map(list, list(zip(*sizes, strict=True))[-2:])
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def missing(records: Records, size: Shards, views: int, samples: pa.Table) -> list[tuple[list[Unit], dict[int, Any]]]:
    """What is still to be written."""
    texts: dict[int, dict[int, Any]] = defaultdict(dict)
    images: dict[int, dict[int, Any]] = defaultdict(dict)
    texts[0][0] = NULL_PROMPT
    columns = samples.select(["status", "row", "text_row", "instruction", *Item._fields]).to_pydict()
    for status, row, text_row, instruction, *item in zip(*columns.values(), strict=True):
        if status == "pending":
            texts[text_row // size["text"]][text_row] = instruction
            images[row // size["images"]].setdefault(row, tuple(item))
    work = []
    for kind, shards, count in (("text", texts, 1), ("images", images, views)):
        for shard, rows in sorted(shards.items()):
            if absent := [unit for unit in (Unit(kind, shard, v) for v in range(count)) if unit not in records]:
                work.append((absent, rows))
    return work


def flips(instructions: list[str], pattern: str) -> list[bool]:
    """Which samples may be shown flipped."""
    never = re.compile(pattern, re.IGNORECASE) if pattern not in ("none", "") else None
    return [not (never and never.search(instruction)) for instruction in instructions]
