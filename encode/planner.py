"""Which sample goes where: joins a dataset with what the cache already holds, by content.

Rows are given in the order of first appearance to the shards that have no commit record. So an encode that was
killed, whatever shards it had finished and whatever number of processes goes on, ends with the same arrays.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .base.files import content_key
from .cache.format import SAMPLES, Unit
from .data.pairs import Pair, Pairs

Commits = Mapping[Unit, Mapping[str, Any]]
Rows = dict[int, Any]


class Item(NamedTuple):
    """What is to be encoded into one row of images."""

    pair: str
    position: int
    key: str


NULL_PROMPT = ""
SIZES = [name for name in SAMPLES.names if name.endswith(("_width", "_height"))]


def text_key(instruction: str) -> str:
    """Identity of an instruction."""
    return content_key(instruction.encode())


class _Keys(Dataset):
    """The identity of each sample, computed in worker processes."""

    def __init__(self, source: Pairs):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        pair = self.source[position]
        key = content_key(pair.original or b"", pair.edited or b"")
        instruction = pair.instruction if isinstance(pair.instruction, str) else repr(pair.instruction)
        reason = unusable(pair)
        return {
            "key": content_key(key.encode(), instruction.encode()),
            "pair": key,
            "position": position,
            "instruction": instruction,
            "group": self.source.group(position),
            "row": -1,
            "text_row": -1,
            "status": "quarantined" if reason else "pending",
            "reason": reason,
        }


def unusable(pair: Pair) -> str | None:
    """Why a sample cannot even be tried, or None."""
    for side in ("original", "edited"):
        if getattr(pair, side) is None:
            return f"the {side} image is missing"
    if not isinstance(pair.instruction, str):
        return f"the instruction is {type(pair.instruction).__name__}, expected text"
    return None if pair.instruction.strip() else "the instruction is empty"


def index(source: Pairs, workers: int, batch_size: int = 64) -> pa.Table:
    """Identify every sample of a dataset by reading it once; returns the samples table without rows."""
    loader = DataLoader(_Keys(source), batch_size=batch_size, num_workers=workers, collate_fn=list)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(source), desc="identify samples", unit="pair") as bar:
        for batch in loader:
            rows += batch
            bar.update(len(batch))
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def assign(samples: pa.Table, commits: Commits, shard_rows: Mapping[str, int], *, retry: bool = False) -> pa.Table:
    """Give each sample its row and text row: those that hold its content already, or free ones.

    Args:
        samples: the dataset as `index` describes it, or an earlier plan of it.
        commits: the records of all finished units.
        shard_rows: rows of one shard, by kind.
        retry: give new rows to content that was quarantined.
    """
    columns = samples.to_pydict()
    # A row that nobody tried (no image, no instruction) is -1 and stays so: another try needs other data.
    tried = [reason is None or row >= 0 for reason, row in zip(columns["reason"], columns["row"], strict=True)]
    texts = list(map(text_key, columns["instruction"]))
    rows = _assign(itertools.compress(columns["pair"], tried), "images", commits, shard_rows, retry)
    text_rows = _assign([text_key(NULL_PROMPT), *itertools.compress(texts, tried)], "text", commits, shard_rows, retry)
    columns["row"] = [rows[key] if try_ else -1 for key, try_ in zip(columns["pair"], tried, strict=True)]
    columns["text_row"] = [text_rows[key] if try_ else -1 for key, try_ in zip(texts, tried, strict=True)]
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def _assign(
    keys: Iterable[str], kind: str, commits: Commits, shard_rows: Mapping[str, int], retry: bool
) -> dict[str, int]:
    size = shard_rows[kind]
    rows = _located(kind, commits, size, retry)
    taken = {unit.shard for unit in commits if unit.kind == kind}
    free = (shard * size + i for shard in itertools.count() if shard not in taken for i in range(size))
    for key in keys:
        if key not in rows:
            rows[key] = next(free)
    return rows


def _located(kind: str, commits: Commits, shard_rows: int, retry: bool) -> dict[str, int]:
    """Content that has a row: good where all views that are there hold it, bad where it was quarantined."""
    views: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for unit in sorted(unit for unit in commits if unit.kind == kind):
        views[unit.shard].append(commits[unit])
    good: dict[str, int] = {}
    bad: dict[str, int] = {}
    for shard, records in sorted(views.items(), key=lambda item: len(item[1]), reverse=True):  # whole shards first
        reasons = {int(i) for record in records for i in record["quarantined"]}
        for i, keys in enumerate(zip(*(record["keys"] for record in records), strict=True)):
            if i in reasons:
                bad[next(filter(None, keys))] = shard * shard_rows + i
            elif keys[0] is not None and len(set(keys)) == 1:
                good.setdefault(keys[0], shard * shard_rows + i)
    return good if retry else bad | good


def mark_flips(samples: pa.Table, pattern: str) -> pa.Table:
    """Note which samples may be shown flipped: those whose instruction does not match `pattern`, if it is not none."""
    never = re.compile(pattern, re.IGNORECASE) if pattern not in ("none", "") else None
    flip = [not (never and never.search(instruction)) for instruction in samples["instruction"].to_pylist()]
    return samples.set_column(samples.column_names.index("flip"), "flip", pa.array(flip, pa.bool_()))


def settle(samples: pa.Table, commits: Commits, shard_rows: Mapping[str, int], views: int) -> pa.Table:
    """Bring status, reason and sizes up to date with the commit records.

    A sample is `ok` when its text and all views of its images are committed and none of them was quarantined; then
    its source and crop sizes are known as well. It is `pending` while one is missing.
    """
    columns = samples.to_pydict()
    for n, (row, text_row) in enumerate(zip(columns["row"], columns["text_row"], strict=True)):
        if row < 0:
            continue
        shard, i = divmod(row, shard_rows["images"])
        text_shard, text_i = divmod(text_row, shard_rows["text"])
        held = [(commits.get(Unit("images", shard, view)), i, columns["pair"][n]) for view in range(views)]
        held.append((commits.get(Unit("text", text_shard)), text_i, text_key(columns["instruction"][n])))
        records = [(record, at) for record, at, key in held if record and record["keys"][at] == key]
        reasons = [record["quarantined"][str(at)] for record, at in records if str(at) in record["quarantined"]]
        complete = len(records) == len(held)
        columns["status"][n] = "quarantined" if reasons else "ok" if complete else "pending"
        columns["reason"][n] = reasons[0] if reasons else None
        if complete and not reasons:
            sizes = [record["sizes"][i] for record, _ in records[:views]]
            for name, value in zip(SIZES, sizes[0], strict=False):
                columns[name][n] = value
            columns["crop_top"][n], columns["crop_left"][n] = map(list, list(zip(*sizes, strict=True))[-2:])
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def missing(
    samples: pa.Table, commits: Commits, shard_rows: Mapping[str, int], views: int
) -> Iterator[tuple[list[Unit], Rows]]:
    """What is still to be written: units that share rows, and those rows.

    A row of a text unit is an instruction, a row of images is an `Item`.
    """
    texts: dict[int, Rows] = defaultdict(dict)
    images: dict[int, Rows] = defaultdict(dict)
    texts[0][0] = NULL_PROMPT
    columns = samples.select(["status", "row", "text_row", "instruction", "pair", "position", "key"]).to_pydict()
    for status, row, text_row, instruction, *item in zip(*columns.values(), strict=True):
        if status == "pending":
            texts[text_row // shard_rows["text"]][text_row] = instruction
            images[row // shard_rows["images"]].setdefault(row, Item(*item))
    for shard, rows in sorted(texts.items()):
        if Unit("text", shard) not in commits:
            yield [Unit("text", shard)], rows
    for shard, rows in sorted(images.items()):
        units = [Unit("images", shard, view) for view in range(views)]
        if absent := [unit for unit in units if unit not in commits]:
            yield absent, rows
