"""Batches on the device: which samples come when, gathered from the cache by one background thread.

The samples of all epochs form one endless sequence, each epoch a permutation of the dataset, and every step takes
the next `batch size x processes x accumulation` of it. So no batch is ever partial, and a run that is resumed on
another number of processes goes on where it stopped: nothing in the epoch is lost or repeated.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..encode.cache import Cache
from ..encode.errors import CacheError
from ..encode.images import View
from ..encode.planner import NULL_PROMPT, text_key
from ..encode.reader import Reader
from .objective import Batch, Null

AHEAD = 4  # batches whose rows the disk is asked for in advance
RING = 3  # batches in memory: one in use, one ready, one being gathered


class Samples(NamedTuple):
    """The samples of a cache as columns."""

    rows: np.ndarray  # (N,)
    text_rows: np.ndarray  # (N,)
    views: np.ndarray  # (N, V): what is shown where the order draws a view: a flipped one only where that may be
    time_ids: np.ndarray  # (N, V, 6): original height and width, crop top and left, target height and width
    groups: np.ndarray  # (N,) number of the prompt that a sample belongs to
    numbers: np.ndarray  # (N,) where the cache's samples table has them

    def select(self, which: np.ndarray) -> "Samples":
        """Some of the samples, by mask or number."""
        return Samples(*(column[which] for column in self))

    def prompts(self) -> np.ndarray:
        """The prompt of each sample, numbered from 0 without gaps, (N,)."""
        return np.unique(self.groups, return_inverse=True)[1]

    def instructions(self, cache: Cache, count: int) -> list[str]:
        """The instructions of the first `count` samples."""
        return cache.samples()["instruction"].take(self.numbers[:count]).to_pylist()

    @classmethod
    def of(cls, cache: Cache, limit: int | None) -> "Samples":
        """All samples that are encoded, in the order of the dataset.

        Raises:
            CacheError: the encode was not finished, or no sample is usable.
        """
        table = cache.samples()
        status = table["status"].to_numpy(zero_copy_only=False)
        if pending := int((status == "pending").sum()):
            raise CacheError(
                f"{cache.folder} is not finished, {pending:,} of {len(table):,} samples are missing: "
                "run the same ip2p-encode again"
            )
        numbers = np.flatnonzero(status == "ok")[:limit]
        table = table.take(numbers)
        if len(table) == 0:
            raise CacheError(f"{cache.folder} holds no usable sample: `ip2p-cache info` lists the reasons")
        side = cache.manifest["encoding"]["resolution"]
        views, shape = [View.parse(name) for name in cache.views], (len(table), len(cache.views))
        unflipped = np.array([views.index(View(view.crop, flip=False)) for view in views])
        shown = np.where(table["flip"].to_numpy()[:, None], np.arange(len(views)), unflipped)
        sizes = [table[name].to_numpy()[:, None] for name in ("original_height", "original_width")]
        sizes += [
            table[name].combine_chunks().flatten().to_numpy().reshape(shape) for name in ("crop_top", "crop_left")
        ]
        sizes = [np.broadcast_to(size, shape) for size in (*sizes, side, side)]
        time_ids = np.stack(sizes, axis=2).astype(np.float32)
        text_rows = table["text_row"].to_numpy()
        prompts = zip(table["group"].to_pylist(), text_rows.tolist(), strict=True)
        names = [str(text_row) if group is None else f"group {group}" for group, text_row in prompts]
        groups = np.unique(names, return_inverse=True)[1]
        return cls(table["row"].to_numpy(), text_rows, shown, time_ids, groups, numbers)


class Order:
    """Which sample, and which view of it, stands at each position of the endless sequence.

    Args:
        samples: how many there are.
        views: of each sample.
        seed: decides everything, with the position.
        groups: (N,) numbers of prompts, to draw a prompt first and then one of its samples, as the original project
            does; so the samples of a prompt that has many come more seldom. Without it each sample comes once.
    """

    def __init__(self, samples: int, views: int, seed: int, groups: np.ndarray | None = None):
        self.samples, self.views, self.seed = samples, views, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._members = None if groups is None else np.argsort(groups, kind="stable")
        self._sizes = np.zeros(0, np.int64) if groups is None else np.bincount(groups)

    def __call__(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and views at positions `start` to `start + count`, (count,) each."""
        epochs, places = np.divmod(np.arange(start, start + count), self.samples)
        numbers, views = np.empty_like(places), np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            order, coins = self._epoch(epoch)
            numbers[here], views[here] = order[places[here]], coins[places[here]]
        return numbers, views

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            self._epochs = {known: value for known, value in self._epochs.items() if known >= epoch - 1}
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.samples) if self._members is None else self._by_prompt(rng, self._members)
            self._epochs[epoch] = order, rng.integers(0, self.views, self.samples)
        return self._epochs[epoch]

    def _by_prompt(self, rng: np.random.Generator, members: np.ndarray) -> np.ndarray:
        """As many positions as there are samples: all prompts in random order, again and again."""
        prompts = len(self._sizes)
        rounds = [rng.permutation(prompts) for _ in range(-(-self.samples // prompts))]
        drawn = np.concatenate(rounds)[: self.samples]
        first = self._sizes.cumsum() - self._sizes
        return members[first[drawn] + rng.integers(0, self._sizes[drawn])]


def null_conditioning(cache: Cache, reader: Reader, device: torch.device) -> Null:
    """The cached encoding of the empty instruction, which lies in text row 0."""
    record = next(record for unit, record in cache.commits().items() if unit.kind == "text" and unit.shard == 0)
    if record["keys"][0] != text_key(NULL_PROMPT):
        raise CacheError(f"{cache.folder} does not hold the empty instruction in text row 0: encode it anew")
    parts = {}
    for name in ("text", "pooled"):
        if array := reader.arrays.get(name):
            parts[name] = np.empty((1, *array.row_shape), np.float16)
            array.take(np.zeros(1, np.int64), parts[name])
    return Null(**{name: torch.from_numpy(part).to(device) for name, part in parts.items()})


def gather(reader: Reader, samples: Samples, numbers: np.ndarray, device: torch.device) -> Batch:
    """Some samples in their first view, for looking at outside of training."""
    chosen, views = samples.select(numbers), np.zeros(len(numbers), np.int64)
    slot = Slot(reader, len(numbers), device)
    batch = slot.fill(reader, chosen.rows, views, chosen.text_rows, chosen.time_ids[:, 0])
    slot.hand_over(batch)
    return batch


class Batches:
    """An endless iterator over `Batch`es on the device.

    A background thread gathers rows into a ring of (pinned) buffers and, on a GPU, copies them on a stream of its
    own. `waited` counts the seconds that training waited here.
    """

    def __init__(
        self,
        reader: Reader,
        samples: Samples,
        order: Order,
        device: torch.device,
        *,
        batch_size: int,
        start: int,
        stride: int,
    ):
        self._reader, self._samples, self._order, self._device = reader, samples, order, device
        self._batch_size, self._start, self._stride = batch_size, start, stride
        self.waited = 0.0
        self._free: queue.Queue[Slot | None] = queue.Queue()
        self._ready: queue.Queue[tuple[Batch, Slot] | Exception] = queue.Queue()
        self._in_use: Slot | None = None
        for _ in range(RING):
            self._free.put(Slot(reader, batch_size, device))
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._in_use is not None:  # on the CPU a batch is the buffer itself, so it is given back only now
            self._free.put(self._in_use)
        began = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, Exception):
            raise item
        batch, self._in_use = item
        self._in_use.hand_over(batch)
        return batch

    def close(self) -> None:
        """Stop the thread once it has filled the buffers that are free."""
        self._free.put(None)  # wakes it
        self._thread.join()

    def _work(self) -> None:
        try:
            ahead: deque[tuple[np.ndarray, ...]] = deque()  # rows that the disk was asked for
            for step in itertools.count():
                ahead.append(self._rows(step))
                self._reader.will_need(*ahead[-1][:3])
                if len(ahead) <= AHEAD:
                    continue
                slot = self._free.get()
                if slot is None:
                    return
                self._ready.put((slot.fill(self._reader, *ahead.popleft()), slot))
        except Exception as error:  # raised where the batch is waited for
            self._ready.put(error)

    def _rows(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        numbers, drawn = self._order(self._start + step * self._stride, self._batch_size)
        samples, views = self._samples, self._samples.views[numbers, drawn]
        return samples.rows[numbers], views, samples.text_rows[numbers], samples.time_ids[numbers, views]


class Slot:
    """The buffers of one batch in the ring."""

    def __init__(self, reader: Reader, batch_size: int, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = torch.cuda.Event() if self.stream else None
        shapes = {name: (batch_size, *array.row_shape) for name, array in reader.arrays.items()}
        self.buffers = {
            name: torch.empty(shape, dtype=torch.float16, pin_memory=self.stream is not None)
            for name, shape in shapes.items()
        }

    def fill(
        self, reader: Reader, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray, time_ids: np.ndarray
    ) -> Batch:
        """Gather a batch, and begin to copy it to the device."""
        if self.copied:
            self.copied.synchronize()  # the copy of the batch that was here before
        reader.take({name: buffer.numpy() for name, buffer in self.buffers.items()}, rows, views, text_rows)
        tensors = dict(self.buffers)
        if "pooled" in tensors:
            tensors["time_ids"] = torch.from_numpy(time_ids)
        if self.stream and self.copied:
            with torch.cuda.stream(self.stream):
                tensors = {name: part.to(self.device, non_blocking=True) for name, part in tensors.items()}
                self.copied.record(self.stream)
        return Batch(**tensors)

    def hand_over(self, batch: Batch) -> None:
        """Let the stream that trains wait for the copy, and own its memory."""
        if self.copied:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.copied)
            for part in batch:
                if part is not None:
                    part.record_stream(stream)
