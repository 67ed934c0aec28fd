"""Which samples a dataset has, and what of them is committed: joined by content.

Rows are given in the order of first appearance to the shards that have no commit record. So an encode that was
killed, whatever shards it had finished and whatever number of processes goes on, ends with the same arrays.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from ..base.files import content_key
from .format import SAMPLES, Cache, Record, Unit

NULL_PROMPT = ""
SIZES = [name for name in SAMPLES.names if name.endswith(("_width", "_height"))]


class Item(NamedTuple):
    """What is to be encoded into one row of images."""

    pair: str
    position: int
    key: str
    height: int
    width: int


Rows = dict[int, Any]
"""What is to be encoded into rows of a shard: an instruction into a row of text, an `Item` into one of images."""
Work = tuple[list[Unit], Rows]
"""Units that share rows, and those rows."""


def text_key(instruction: str) -> str:
    """Identity of an instruction."""
    return content_key(instruction.encode())


def counts(samples: pa.Table) -> dict[str, int]:
    """Samples by status."""
    return dict(Counter(samples["status"].to_pylist()))


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What is committed of a cache.

    Attributes:
        commits: the records of all finished units.
        shard_rows: rows of one shard, by kind.
        views: how many views each pair has.
        texts: whether each instruction is cached; else the empty one stands for all.
    """

    commits: Mapping[Unit, Record]
    shard_rows: Mapping[str, int]
    views: int
    texts: bool = True

    @classmethod
    def of(cls, cache: Cache) -> "Ledger":
        """What is committed now; a `CacheError` where a record is damaged."""
        return cls(cache.commits(), cache.shard_rows, len(cache.views), cache.holds_text)

    def text_key(self, instruction: str) -> str:
        """Identity of what stands for an instruction in the text arrays."""
        return text_key(instruction if self.texts else NULL_PROMPT)

    def units(self, row: int, text_row: int) -> list[Unit]:
        """The units that hold a sample: its images in every view, then its text."""
        shard, text_shard = row // self.shard_rows["images"], text_row // self.shard_rows["text"]
        return [*(Unit("images", shard, view) for view in range(self.views)), Unit("text", text_shard)]

    def assign(self, samples: pa.Table, *, retry: bool = False) -> pa.Table:
        """Give each sample its row and text row: those that hold its content already, or free ones.

        Args:
            samples: the dataset as it was read, or an earlier plan of it.
            retry: give new rows to content that was quarantined.
        """
        columns = samples.to_pydict()
        # A row that nobody tried (no image, no instruction) is -1 and stays so: another try needs other data.
        tried = [reason is None or row >= 0 for reason, row in zip(columns["reason"], columns["row"], strict=True)]
        texts = list(map(self.text_key, columns["instruction"]))
        rows = self._rows("images", itertools.compress(columns["pair"], tried), retry)
        text_rows = self._rows("text", [text_key(NULL_PROMPT), *itertools.compress(texts, tried)], retry)
        columns["row"] = [rows[key] if try_ else -1 for key, try_ in zip(columns["pair"], tried, strict=True)]
        columns["text_row"] = [text_rows[key] if try_ else -1 for key, try_ in zip(texts, tried, strict=True)]
        return pa.Table.from_pydict(columns, schema=samples.schema)

    def _rows(self, kind: str, keys: Iterable[str], retry: bool) -> dict[str, int]:
        size, rows = self.shard_rows[kind], self._located(kind, retry)
        taken = {unit.shard for unit in self.commits if unit.kind == kind}
        free = (shard * size + i for shard in itertools.count() if shard not in taken for i in range(size))
        new = (key for key in dict.fromkeys(keys) if key not in rows)
        return rows | dict(zip(new, free, strict=False))

    def _located(self, kind: str, retry: bool) -> dict[str, int]:
        """Content that has a row: good where all views that are there hold it, bad where it was quarantined."""
        views: dict[int, list[Record]] = defaultdict(list)
        for unit in sorted(unit for unit in self.commits if unit.kind == kind):
            views[unit.shard].append(self.commits[unit])
        good: dict[str, int] = {}
        bad: dict[str, int] = {}
        for shard, records in sorted(views.items(), key=lambda item: len(item[1]), reverse=True):  # whole shards first
            first = shard * self.shard_rows[kind]
            reasons = {int(i) for record in records for i in record["quarantined"]}
            for i, keys in enumerate(zip(*(record["keys"] for record in records), strict=True)):
                if i in reasons:
                    bad[next(filter(None, keys))] = first + i
                elif keys[0] is not None and len(set(keys)) == 1:
                    good.setdefault(keys[0], first + i)
        return good if retry else bad | good

    def settle(self, samples: pa.Table) -> pa.Table:
        """Bring status, reason and sizes up to date with the commit records.

        A sample is `ok` when its text and all views of its images are committed and none of them was quarantined; then
        its source and crop sizes are known as well. It is `pending` while one is missing.
        """
        columns = samples.to_pydict()
        for n, (row, text_row) in enumerate(zip(columns["row"], columns["text_row"], strict=True)):
            if row < 0:
                continue
            keys = [columns["pair"][n]] * self.views + [self.text_key(columns["instruction"][n])]
            i, text_i = row % self.shard_rows["images"], text_row % self.shard_rows["text"]
            units = map(self.commits.get, self.units(row, text_row))
            held = zip(units, [i] * self.views + [text_i], keys, strict=True)
            records = [(record, at) for record, at, key in held if record and record["keys"][at] == key]
            reasons = [record["quarantined"][str(at)] for record, at in records if str(at) in record["quarantined"]]
            complete = len(records) == len(keys)
            columns["status"][n] = "quarantined" if reasons else "ok" if complete else "pending"
            columns["reason"][n] = reasons[0] if reasons else None
            if complete and not reasons:
                sizes = [record["sizes"][i] for record, _ in records[: self.views]]
                for name, value in zip(SIZES, sizes[0], strict=False):
                    columns[name][n] = value
                columns["crop_top"][n], columns["crop_left"][n] = map(list, list(zip(*sizes, strict=True))[-2:])
        return pa.Table.from_pydict(columns, schema=samples.schema)

    def missing(self, samples: pa.Table) -> Iterator[Work]:
        """What is still to be written."""
        texts: dict[int, Rows] = defaultdict(dict)
        images: dict[int, Rows] = defaultdict(dict)
        texts[0][0] = NULL_PROMPT
        columns = samples.select(["status", "row", "text_row", "instruction", *Item._fields]).to_pydict()
        for status, row, text_row, instruction, *item in zip(*columns.values(), strict=True):
            if status == "pending":
                texts[text_row // self.shard_rows["text"]].setdefault(text_row, instruction)
                images[row // self.shard_rows["images"]].setdefault(row, Item(*item))
        for kind, shards, views in (("text", texts, 1), ("images", images, self.views)):
            for shard, rows in sorted(shards.items()):
                units = [Unit(kind, shard, view) for view in range(views)]
                if absent := [unit for unit in units if unit not in self.commits]:
                    yield absent, rows
