"""From missing units to committed ones: images are read in worker processes, encoded here, written beside that."""

import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .base.errors import ImageError, SampleError, SourceError
from .cache.format import Cache, View
from .cache.samples import Item, Work, text_key
from .cache.writer import UnitWriter
from .data.pairs import Pairs
from .geometry import Geometry, Shape
from .models.encoders import Encoders

T = TypeVar("T")
Begun = TypeVar("Begun")
Done = Callable[[int], object]
NOT_FINITE = "the encoding is not finite, in float32 either"


class Read(NamedTuple):
    """A pair whose files were read: its sizes, or the reason why it cannot be used."""

    row: int
    item: Item
    sizes: list[tuple[int, ...]]  # by view: original width and height, edited width and height, crop top and left
    reason: str | None
    masks: np.ndarray | None = None  # float16 (V, 1, h, w), if the cache has some


class _Images(Dataset):
    """The images of rows, read and resized in worker processes, (V, 2, 3, H, W) each, in the shape that is planned."""

    def __init__(self, source: Pairs, rows: Sequence[tuple[int, Item, list[View]]], cache: Cache):
        self.source, self.rows, self.geometry = source, rows, Geometry.of(cache.manifest["encoding"])
        self.masks, self.factor = "mask" in cache.arrays("images"), cache.factor

    def __getitem__(self, n: int) -> tuple[Read, np.ndarray | None]:
        row, item, views = self.rows[n]
        try:
            pair, shape, masks = self.source[item.position], Shape(item.height, item.width), None
            if pair.key != item.pair:
                raise ImageError("the files changed while the dataset was being encoded")
            pixels, sizes = self.geometry.read(pair[:2], item.pair, views, shape)
            if self.masks:
                masks = self.geometry.masks(pair.mask, sizes[0][:2], item.pair, views, shape, self.factor)
        except SampleError as error:
            return Read(row, item, [], str(error)), None
        return Read(row, item, sizes, None, masks), pixels


def _collate(batch: list[tuple[Read, np.ndarray | None]]) -> tuple[list[Read], torch.Tensor]:
    pixels = [pair for _, pair in batch if pair is not None]
    stacked = torch.from_numpy(np.concatenate(pixels, axis=1)) if pixels else torch.empty(0)  # (V, 2B, 3, H, W) uint8
    return [read for read, _ in batch], stacked


def quiet_worker(_: int) -> None:
    """Let the main process alone answer Ctrl-C, once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Pipeline:
    """Encodes units of a cache, whose arrays are large enough, one after the other.

    Args:
        batch_size: pairs in one batch of the VAE.
        workers: processes that read images.
        fail: stop at the first sample that cannot be encoded, instead of setting it aside.
    """

    def __init__(self, cache: Cache, encoders: Encoders, *, batch_size: int, workers: int, fail: bool):
        self.cache, self.encoders = cache, encoders
        self.batch_size, self.workers, self.fail = batch_size, workers, fail
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] = self._thread.submit(lambda: None)

    def run(self, work: Sequence[Work], source: Pairs, done: Done) -> None:
        """Encode and commit all of `work`; tells `done` how many more texts or pairs are."""
        with self._thread:
            self._encode_texts([item for item in work if item[0][0].kind == "text"], done)
            self._encode_images([item for item in work if item[0][0].kind == "images"], source, done)
            self._written.result()

    def _encode_texts(self, work: Sequence[Work], done: Done) -> None:
        size = 2 * self.batch_size
        batches = (batch for _, rows in work for batch in _batches(sorted(rows.items()), size))
        begun = one_behind((batch, self.encoders.embed([text for _, text in batch])) for batch in batches)
        for (unit,), rows in work:
            writer = UnitWriter(self.cache, unit)
            for _ in _batches(range(len(rows)), size):
                batch, finish = next(begun)
                text, pooled = finish()
                for n, (row, instruction) in enumerate(batch):
                    values = {"text": text[n].numpy()} | ({} if pooled is None else {"pooled": pooled[n].numpy()})
                    key, name = text_key(instruction), f"instruction {instruction!r}"
                    if not writer.put(row, key, values):
                        self._set_aside(row, key, name, NOT_FINITE, [writer])
                done(len(batch))
            self._commit([writer])

    def _encode_images(self, work: Sequence[Work], source: Pairs, done: Done) -> None:
        rows_in_order: list[tuple[int, Item, list[View]]] = []
        batches: list[list[list[int]]] = []  # of each work: a batch never crosses a unit, and is of one shape
        for units, rows in work:
            views = [View.parse(self.cache.views[unit.view]) for unit in units]
            shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
            for row, item in sorted(rows.items()):
                shapes[item.height, item.width].append(len(rows_in_order))
                rows_in_order.append((row, item, views))
            batches.append([list(batch) for rows in shapes.values() for batch in _batches(rows, self.batch_size)])
        loader = DataLoader(
            _Images(source, rows_in_order, self.cache),
            batch_sampler=list(chain.from_iterable(batches)),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.encoders.device.type == "cuda",
            worker_init_fn=quiet_worker,
        )
        begun = one_behind((reads, [self.encoders.moments(seen) for seen in pixels]) for reads, pixels in loader)
        for (units, _), those in zip(work, batches, strict=True):
            writers = [UnitWriter(self.cache, unit) for unit in units]
            for _ in those:
                reads, views = next(begun)
                self._take(reads, views, writers)
                done(len(reads))
            self._commit(writers)

    def _take(self, reads: list[Read], views: list[Callable[[], torch.Tensor]], writers: Sequence[UnitWriter]) -> None:
        """Take over a batch that was begun: what could not be read stands aside, the rest is waited for."""
        good = [read for read in reads if read.reason is None]
        for row, item, _, reason, _ in reads:
            if reason is not None:
                self._set_aside(row, item.pair, f"sample {item.key}", reason, writers)
        if not good:
            return
        for view, (writer, finish) in enumerate(zip(writers, views, strict=True)):
            moments = finish().unflatten(0, (len(good), 2)).numpy()  # (B, 2, 8, h, w)
            channels = moments.shape[2] // 2
            for (row, item, sizes, _, masks), (original, edited) in zip(good, moments, strict=True):
                values = {"original": original[:channels], "edited": edited}
                values |= {} if masks is None else {"mask": masks[view]}
                if not writer.put(row, item.pair, values, sizes[view]):
                    self._set_aside(row, item.pair, f"sample {item.key}", NOT_FINITE, [writer])

    def _set_aside(self, row: int, key: str, name: str, reason: str, writers: Iterable[UnitWriter]) -> None:
        if self.fail:
            raise SourceError(f"{name}: {reason} (--on_error quarantine would go on without it)")
        for writer in writers:
            writer.quarantine(row, key, reason)

    def _commit(self, writers: Sequence[UnitWriter]) -> None:
        """Write while the next unit is being encoded."""

        def commit() -> None:
            for writer in writers:
                writer.commit()

        self._written.result()
        self._written = self._thread.submit(commit)


def one_behind(begun: Iterable[Begun]) -> Iterator[Begun]:
    """Each batch once the next one is begun, so that the device has work while the numbers of this one are stored."""
    waiting: list[Begun] = []
    for batch in begun:
        yield from waiting
        waiting = [batch]
    yield from waiting


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
