"""Which samples a dataset has, and what of them is committed: joined by content, column by column.

Rows are given in the order of first appearance to the shards that have no commit record. So an encode that was
killed, whatever shards it had finished and whatever number of processes goes on, ends with the same arrays.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..base.files import content_key, content_keys
from .commits import Commit, Held, Unit, pc
from .format import SAMPLES, Cache

NULL_PROMPT = ""
SIZES = [name for name in SAMPLES.names if name.endswith(("_width", "_height"))]
STATES = pa.array(["pending", "ok", "quarantined"])


class Item(NamedTuple):
    """What is to be encoded into one row of images: columns of the samples table."""

    pair: str
    position: int
    key: str
    height: int
    width: int


class Rows(Mapping[int, Any]):
    """What is to be encoded into rows of a shard: an instruction into a row of text, an `Item` into one of images.

    Python objects are made of it where somebody looks: of a large dataset, each process looks at its share.
    """

    def __init__(self, rows: np.ndarray, samples: pa.Table, numbers: np.ndarray):
        self._rows, self._samples, self._numbers = rows, samples, numbers

    @cached_property
    def _content(self) -> dict[int, Any]:
        known = self._numbers >= 0  # the empty instruction is no sample's
        columns = self._samples.take(pa.array(self._numbers, mask=~known)).to_pydict().values()
        made = map(Item, *columns) if len(columns) > 1 else (text or NULL_PROMPT for text in next(iter(columns)))
        return dict(zip(self._rows.tolist(), made, strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.tolist())

    def __getitem__(self, row: int) -> Any:
        return self._content[row]


Work = tuple[list[Unit], Rows]  # units that share rows, and those rows
Keys = Callable[[], pa.Array]


def text_key(instruction: str) -> str:
    """Identity of an instruction."""
    return content_key(instruction.encode())


def text_keys(samples: pa.Table) -> pa.Array:
    """Identities of the instructions of all samples, (N,); of the empty one where that stands for a sample's."""
    parts = [pa.array([], pa.string())]
    for batch in samples.select(["instruction", "text_row"]).to_batches(max_chunksize=2**16):
        texts = pc.if_else(pc.equal(batch["text_row"], 0), NULL_PROMPT, batch["instruction"])
        parts.append(pa.array(content_keys(texts.cast(pa.binary()).to_pylist())))
    return pa.concat_arrays(parts)


def counts(samples: pa.Table) -> dict[str, int]:
    """Samples by status."""
    found = pc.value_counts(samples["status"])
    return dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True))


def with_columns(samples: pa.Table, **columns: Any) -> pa.Table:
    """The same samples with other values in some columns."""
    for name, values in columns.items():
        number = samples.column_names.index(name)
        samples = samples.set_column(number, samples.field(number), pc.cast(values, samples.field(number).type))
    return samples


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What is committed of a cache.

    Attributes:
        commits: the records of all finished units.
        shard_rows: rows of one shard, by kind.
        views: how many views each pair has.
    """

    commits: Mapping[Unit, Commit]
    shard_rows: Mapping[str, int]
    views: int

    @classmethod
    def of(cls, cache: Cache) -> "Ledger":
        """What is committed now; a `CacheError` where a record is damaged."""
        return cls(cache.commits(), cache.shard_rows, len(cache.views))

    def held(self, kind: str, view: int = 0) -> Held:
        """What is committed of one kind and view."""
        units = {unit.shard: commit for unit, commit in self.commits.items() if (unit.kind, unit.view) == (kind, view)}
        return Held(units, self.shard_rows[kind])

    def assign(self, samples: pa.Table, texts: Keys | None = None, *, retry: bool = False) -> pa.Table:
        """Give each sample its row and text row: those that hold its content already, or free ones.

        Args:
            samples: the dataset as it was read, or an earlier plan of it.
            texts: gives `text_keys` of them where these are wanted elsewhere, too; called when pairs have their rows.
            retry: give new rows to content that was quarantined.
        """
        # A row that nobody tried (no image, no instruction) is -1 and stays so: another try needs other data.
        tried = pc.or_(pc.is_null(samples["reason"]), pc.greater_equal(samples["row"], 0)).combine_chunks()
        row = self._rows("images", pc.if_else(tried, samples["pair"].combine_chunks(), None), retry)
        keys = pc.if_else(tried, texts() if texts else text_keys(samples), None)
        keys = pa.concat_arrays([pa.array([text_key(NULL_PROMPT)]), keys])  # which has row 0
        return with_columns(samples, row=row, text_row=self._rows("text", keys, retry)[1:])

    def _rows(self, kind: str, keys: pa.Array, retry: bool) -> pa.Array:
        """The row of each key, -1 where that is null."""
        distinct, size = keys.dictionary_encode(), self.shard_rows[kind]  # in the order of first appearance
        content, rows = self._located(kind, retry)
        found = pc.index_in(distinct.dictionary, content).fill_null(len(rows)).to_numpy()
        given = np.append(rows, -1)[found]
        new = given < 0
        taken = {unit.shard for unit in self.commits if unit.kind == kind}
        free = np.setdiff1d(np.arange(len(taken) + new.sum() // size + 1), list(taken))
        given[new] = (free[:, None] * size + np.arange(size)).ravel()[: new.sum()]
        return pa.array(np.append(given, -1)[distinct.indices.fill_null(len(given)).to_numpy()])

    def _located(self, kind: str, retry: bool) -> tuple[pa.Array, np.ndarray]:
        """Content that has a row, and that row: good where all views that are there hold it, bad where it was
        quarantined. Where content stands twice, the first one counts."""
        views: dict[int, list[Commit]] = defaultdict(list)
        for unit in sorted(unit for unit in self.commits if unit.kind == kind):
            views[unit.shard].append(self.commits[unit])
        shards = sorted(views.items(), key=lambda item: len(item[1]), reverse=True)  # whole shards first
        firsts = [shard * self.shard_rows[kind] for shard, _ in shards]
        keys = pa.concat_arrays([pa.array([], pa.string()), *(records[0].keys for _, records in shards)])
        rows = np.concatenate([np.zeros(0, np.int64), *(first + np.arange(self.shard_rows[kind]) for first in firsts)])
        good = keys.is_valid().to_numpy(zero_copy_only=False).copy()
        for view in range(1, len(shards[0][1]) if shards else 0):
            other = pa.concat_arrays([records[view].keys for _, records in shards if len(records) > view])
            same = pc.equal(keys[: len(other)], other).fill_null(False)
            good[: len(other)] &= same.to_numpy(zero_copy_only=False)
        bad: dict[str, int] = {}
        for number, (first, (_, records)) in enumerate(zip(firsts, shards, strict=True)):
            for row in sorted({row for record in records for row in record.quarantined}):
                bad[next(filter(None, (record.keys[row].as_py() for record in records)))] = first + row
                good[number * self.shard_rows[kind] + row] = False
        keys, rows = keys.filter(pa.array(good)), rows[good]
        if retry or not bad:
            return keys, rows
        return pa.concat_arrays([keys, pa.array(list(bad), pa.string())]), np.append(rows, list(bad.values()))

    def settle(self, samples: pa.Table, texts: pa.Array | None = None) -> pa.Table:
        """Bring status, reason and sizes up to date with the commit records.

        A sample is `ok` when its text and all views of its images are committed and none of them was quarantined; then
        its source and crop sizes are known as well. It is `pending` while one is missing. `texts` as for `assign`.
        """
        rows, text_rows = samples["row"].to_numpy(), samples["text_row"].to_numpy()
        texts = text_keys(samples) if texts is None else texts
        images = [self.held("images", view) for view in range(self.views)]
        whole, reason, places = rows >= 0, pa.nulls(len(rows), pa.string()), []
        parts = [*((held, rows, samples["pair"]) for held in images), (self.held("text"), text_rows, texts)]
        for held, at, keys in parts:
            place = held.places(at)
            same = pc.equal(held.keys.take(place), keys).fill_null(False)
            whole &= same.to_numpy(zero_copy_only=False)
            places.append(pc.if_else(same, place, None))
            reason = pc.coalesce(reason, held.reasons.take(places[-1]))
        bad = reason.is_valid().to_numpy(zero_copy_only=False)
        ok, tried = whole & ~bad, pa.array(rows >= 0)
        status = pc.if_else(tried, STATES.take(pa.array(ok + 2 * bad)), samples["status"])
        samples = with_columns(samples, status=status, reason=pc.if_else(tried, reason, samples["reason"]))
        sizes = [held.sizes[:, place.filter(ok).to_numpy()] for held, place in zip(images, places, strict=False)]
        return _resized(samples, ok, sizes)

    def missing(self, samples: pa.Table) -> Iterator[Work]:
        """What is still to be written."""
        pending = np.flatnonzero(pc.equal(samples["status"], "pending").to_numpy())
        rows, first = np.unique(np.append(0, samples["text_row"].to_numpy()[pending]), return_index=True)
        yield from self._absent("text", rows, samples.select(["instruction"]), np.append(-1, pending)[first])
        rows, first = np.unique(samples["row"].to_numpy()[pending], return_index=True)
        yield from self._absent("images", rows, samples.select(Item._fields), pending[first])

    def _absent(self, kind: str, rows: np.ndarray, samples: pa.Table, numbers: np.ndarray) -> Iterator[Work]:
        """The units without a record that `rows` lie in, which ascend; `numbers` say whose content they hold."""
        shards, starts = np.unique(rows // self.shard_rows[kind], return_index=True)
        for shard, (start, stop) in zip(shards.tolist(), pairwise([*starts.tolist(), len(rows)]), strict=True):
            units = [Unit(kind, shard, view) for view in range(self.views if kind == "images" else 1)]
            if absent := [unit for unit in units if unit not in self.commits]:
                yield absent, Rows(rows[start:stop], samples, numbers[start:stop])


def _resized(samples: pa.Table, ok: np.ndarray, sizes: list[np.ndarray]) -> pa.Table:
    """The samples with the sizes, by view (6 or 8, n), of those n that are `ok`; the others keep what they have."""
    known = dict(zip([*SIZES, "crop_top", "crop_left", "height", "width"], sizes[0], strict=False))
    ends = pa.array(np.arange(0, ok.sum() * len(sizes) + 1, len(sizes)), pa.int32())
    for name, number in (("crop_top", 4), ("crop_left", 5)):
        known[name] = pa.ListArray.from_arrays(ends, np.stack([size[number] for size in sizes], axis=1).ravel())
    order = np.arange(len(samples))
    order[ok] = len(samples) + np.arange(ok.sum())
    merged = pa.concat_tables([old := samples.select(list(known)), pa.table(known, old.schema)]).take(order)
    return with_columns(samples, **dict(zip(known, merged.columns, strict=True)))
