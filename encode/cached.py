"""The samples of one or more caches as columns."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .base.errors import CacheError
from .cache.commits import pc
from .cache.format import Cache, View
from .cache.reader import Reader
from .cache.remote import completed
from .cache.samples import counts, with_columns
from .cache.tables import packed_keys

SIZE, CROPS, SHAPE = ("original_height", "original_width"), ("crop_top", "crop_left"), ("height", "width")


class Samples(NamedTuple):
    """N samples, each known by its rows in a `Reader`; V is how many sides the coin for the view has."""

    rows: np.ndarray  # (N,)
    text_rows: np.ndarray  # (N,)
    views: np.ndarray  # (N, V): what is shown where the order draws a view: a flipped one only where that may be
    time_ids: np.ndarray  # (N, V, 6): original height and width, crop top and left, target height and width
    shapes: np.ndarray  # (N, 2): height and width of the latents
    groups: np.ndarray  # (N,) number of the prompt that a sample belongs to
    pairs: np.ndarray  # (N,) identity of the image pair, the same in every cache
    caches: np.ndarray  # (N,) number of the cache
    numbers: np.ndarray  # (N,) where that cache's samples table has them

    def select(self, which: np.ndarray) -> "Samples":
        """Some of the samples, by mask or number."""
        return Samples(*(column[which] for column in self))

    def places(self, numbers: np.ndarray) -> tuple[list[int], list[int]]:
        """The caches of some samples, and where their samples tables have them."""
        return self.caches[numbers].tolist(), self.numbers[numbers].tolist()

    def at(self, numbers: np.ndarray, views: np.ndarray) -> tuple[Any, ...]:
        """Where a `Reader` has some samples of one shape in some views: rows, views, text rows; time ids; the shape."""
        shape = tuple(self.shapes[numbers[0]].tolist())
        return self.rows[numbers], views, self.text_rows[numbers], self.time_ids[numbers, views], shape

    def by_shape(self) -> dict[tuple[int, int], np.ndarray]:
        """The numbers of the samples of each shape, by height and width of its latents."""
        height, width = self.shapes.T
        found, owners = np.unique((height << 32) + width, return_inverse=True)
        return {divmod(shape, 2**32): np.flatnonzero(owners == n) for n, shape in enumerate(found.tolist())}

    def spread(self, count: int) -> "Samples":
        """So many of the samples, from all over, or all that there are; always the same ones."""
        there = len(self.rows)
        count = min(count, there)
        return self.select(np.arange(count) * there // max(1, count))

    def prompts(self) -> np.ndarray:
        """The prompt of each sample, numbered from 0 without gaps, (N,)."""
        return np.unique(self.groups, return_inverse=True)[1]

    def instructions(self, caches: Sequence[Cache]) -> list[str]:
        """The instruction of each sample."""
        return self.values(caches, "instruction")

    def values(self, caches: Sequence[Cache], column: str) -> list[Any]:
        """What a column of the caches' samples tables holds of each sample."""
        tables = {cache: caches[cache].samples(column)[column] for cache in np.unique(self.caches).tolist()}
        places = zip(self.caches.tolist(), self.numbers.tolist(), strict=True)
        return [tables[cache][number].as_py() for cache, number in places]

    @classmethod
    def of(cls, cache: Cache, limit: int | None, kept: np.ndarray | bool = True) -> "Samples":
        """All samples of a cache that are encoded, in the order of the dataset, or the first `limit` of them.

        Of them, only the `kept` ones count, (all samples,) bool.

        Raises CacheError: the encode was not finished, or no sample is usable.
        """
        text = () if cache.holds_text else ("instruction",)
        table = cache.samples("status", "pair", "group", "row", "text_row", "flip", *SIZE, *CROPS, *SHAPE, *text)
        if text:  # which has no rows: they are numbered as if it had
            texts = table["instruction"].combine_chunks().dictionary_encode().indices
            table = with_columns(table, text_row=pc.add(texts, 1))
        if pending := counts(table).get("pending", 0):
            raise CacheError(
                f"{cache.name} is not finished, {pending:,} of {len(table):,} samples are missing: {completed(cache)}"
            )
        numbers = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy() & kept)[:limit]
        table = table.take(numbers) if len(numbers) < len(table) else table
        if len(table) == 0:
            raise CacheError(f"{cache.name} holds no usable sample: `ip2p-cache info` lists the reasons")
        views, shape = [View.parse(name) for name in cache.views], (len(table), len(cache.views))
        unflipped = np.array([views.index(View(view.crop, flip=False)) for view in views])
        shown = np.where(table["flip"].to_numpy()[:, None], np.arange(len(views)), unflipped)
        sizes = [table[name].to_numpy()[:, None] for name in SIZE]
        crops = [table[name].combine_chunks().flatten().to_numpy() for name in CROPS]
        shapes = np.stack([table[name].to_numpy() for name in SHAPE], axis=1).astype(np.int64)
        sizes = [*sizes, *(crop.reshape(shape) for crop in crops), *shapes.T[:, :, None]]
        time_ids = np.empty((*shape, 6), np.float32)
        for number, size in enumerate(sizes):
            time_ids[:, :, number] = size
        pairs = np.frombuffer(packed_keys(table["pair"]), ">u8")[1::2].astype(np.uint64)  # 64 bits of a hash
        shapes = shapes // cache.factor
        caches, rows, text_rows = np.zeros(len(table), np.int64), table["row"].to_numpy(), table["text_row"].to_numpy()
        return cls(rows, text_rows, shown, time_ids, shapes, _groups(table), pairs, caches, numbers)

    @classmethod
    def of_all(cls, reader: Reader, limit: int | None, kept: Sequence[np.ndarray] | None = None) -> "Samples":
        """The samples of all caches of a reader, one cache after the other, each as in `of`.

        A prompt belongs to its cache: the same words elsewhere are another one. Where caches differ in their views,
        the coin gets as many sides as all of their numbers divide: it is fair among the views of each sample.
        """
        masks = kept or [True] * len(reader.caches)
        parts = [cls.of(cache, limit, mask) for cache, mask in zip(reader.caches, masks, strict=True)]
        sides, prompts = math.lcm(*(part.views.shape[1] for part in parts)), 0
        for number, part in enumerate(parts):
            wide = np.arange(sides) % part.views.shape[1]
            parts[number] = part._replace(
                rows=part.rows + reader.first_rows["images"][number],
                text_rows=part.text_rows + reader.first_rows["text"][number],
                views=part.views[:, wide],
                time_ids=part.time_ids[:, wide],
                groups=part.groups + prompts,
                caches=part.caches + number,
            )
            prompts += part.groups.max() + 1
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def _groups(table: pa.Table) -> np.ndarray:
    """Numbers of the prompts, in the order of their names: a sample's own group, or else its instruction."""
    names = table["text_row"]
    if table["group"].null_count < len(table):
        own = pc.binary_join_element_wise("group", table["group"], " ")
        names = pc.coalesce(own, names.cast(pa.string()))
    encoded = names.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary.cast(pa.string())).to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks[encoded.indices.to_numpy()]
