"""Batches on the device, gathered from the cache by one background thread.

The samples of all epochs form one endless sequence, or one for each shape, of which every batch takes the next `batch
size x processes`. So no batch is ever partial, and a run that is resumed on another number of processes goes on where
it stopped: nothing in the epoch is lost or repeated.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from ...encode.cache.format import ARRAYS
from ...encode.cache.reader import Reader
from ...encode.cache.shapes import shaped
from ...encode.cached import Samples
from ..objective import Batch, Null
from .text import Texts

AHEAD = 4  # batches whose rows the disk is asked for in advance
FURTHER = 64  # batches whose shards are fetched in advance, where a cache lies elsewhere
Rows = Iterator[tuple[Any, ...]]
RING = 3  # batches in memory: one in use, one ready, one being gathered


def null_conditioning(reader: Reader, device: torch.device) -> Null:
    """The cached encoding of the empty instruction, which lies in text row 0 of the first cache."""
    reader.require(np.zeros(0, np.int64), np.zeros(1, np.int64))
    arrays = {name: array for name, array in reader.arrays.items() if name in Null._fields}
    parts = {name: np.empty((1, *array.row_shape), np.float16) for name, array in arrays.items()}
    reader.take(parts, *[np.zeros(1, np.int64)] * 3)
    return Null(**{name: torch.from_numpy(part).to(device) for name, part in parts.items()})


def gather(
    reader: Reader, samples: Samples, numbers: np.ndarray, device: torch.device, texts: Texts | None = None
) -> Batch:
    """Some samples of one shape in their first view, for looking at outside of training."""
    slot = Slot(reader, len(numbers), device, texts)
    slot.fill(*samples.at(numbers, np.zeros(len(numbers), np.int64)), places=samples.places(numbers))
    return slot.hand_over()


class Batches:
    """An endless iterator over `Batch`es on the device.

    A background thread gathers rows into a ring of (pinned) buffers and, on a GPU, copies them on a stream of its
    own. `waited` counts the seconds that training waited here.

    Args:
        drawn: sample numbers and views of each batch, (batch_size,) each; endlessly.
        everywhere: those of all processes together, which share what is fetched of a cache that lies elsewhere.
        texts: embeds instructions, where the caches do not hold that.
    """

    def __init__(
        self,
        reader: Reader,
        samples: Samples,
        drawn: Iterator[tuple[np.ndarray, np.ndarray]],
        device: torch.device,
        *,
        batch_size: int,
        everywhere: Iterable[tuple[np.ndarray, np.ndarray]] = (),
        texts: Texts | None = None,
    ):
        self.waited = 0.0
        self._free: queue.Queue[Slot | None] = queue.Queue()
        self._ready: queue.Queue[Slot | Exception] = queue.Queue()
        self._in_use: Slot | None = None
        for _ in range(RING):
            self._free.put(Slot(reader, batch_size, device, texts))
        rows, expected = (
            ((*samples.at(which, samples.views[which, view]), samples.places(which)) for which, view in those)
            for those in (drawn, everywhere if reader.windows else ())
        )
        self._reader, given = reader, (reader, rows, expected, device)
        self._thread = threading.Thread(target=self._work, args=given, name="batches", daemon=True)
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
        self._in_use = item
        return item.hand_over()

    def close(self) -> None:
        """Stop the thread once it has filled the buffers that are free."""
        self._free.put(None)  # wakes it
        self._thread.join()
        self._reader.forget()

    def _work(self, reader: Reader, batches: Rows, expected: Rows, device: torch.device) -> None:
        try:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # or a thread begins on the first GPU, and takes memory there
            for rows in islice(expected, FURTHER):
                reader.expect(*rows[:3])
            ahead: deque[tuple[Any, ...]] = deque()  # rows that the disk was asked for
            taken = 0
            for rows in batches:
                ahead.append(rows)
                reader.will_need(*rows[:3])
                if len(ahead) <= AHEAD:
                    continue
                slot = self._free.get()
                if slot is None:
                    return
                size = len(ahead[0][0])
                slot.fill(*ahead.popleft())
                self._ready.put(slot)
                for rows in islice(expected, 1):
                    reader.expect(*rows[:3])
                    taken += 1
                    # Other processes may be that far behind, and need what this one had.
                    if taken > (RING + 2 if len(rows[0]) > size else 0):
                        reader.passed()
        except Exception as error:  # raised where the batch is waited for
            self._ready.put(error)


class Slot:
    """The buffers of one batch in the ring."""

    def __init__(self, reader: Reader, batch_size: int, device: torch.device, texts: Texts | None = None):
        self.reader, self.device, self.texts = reader, device, texts
        images = reader.arrays.keys() & set(ARRAYS["images"])
        self.flat = [name for name in images if len(reader.arrays[name].row_shape) == 2]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = torch.cuda.Event() if self.stream else None
        pinned = self.stream is not None
        self.buffers = {
            name: torch.empty(batch_size, *array.row_shape, dtype=torch.float16, pin_memory=pinned)
            for name, array in reader.arrays.items()
            if not (texts and name in Null._fields)
        }
        self.tensors: dict[str, torch.Tensor] = {}
        self.tokens: list[torch.Tensor] = []

    def fill(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        text_rows: np.ndarray,
        time_ids: np.ndarray,
        shape: tuple[int, int],
        places: tuple[list[int], list[int]],
    ) -> None:
        """Gather a batch of latents of one shape (height, width), and begin to copy it to the device."""
        if self.copied:
            self.copied.synchronize()  # the copy of the batch that was here before
        self.reader.take({name: buffer.numpy() for name, buffer in self.buffers.items()}, rows, views, text_rows)
        tensors, tokens = dict(self.buffers), self.texts.tokens(*places) if self.texts else []
        if "pooled" in self.reader.arrays:
            tensors["time_ids"] = torch.from_numpy(time_ids)
        if self.stream and self.copied:
            with torch.cuda.stream(self.stream):
                tensors = {name: part.to(self.device, non_blocking=True) for name, part in tensors.items()}
                tokens = [part.pin_memory().to(self.device, non_blocking=True) for part in tokens]
                self.copied.record(self.stream)
        else:
            tensors = {name: part.to(self.device) for name, part in tensors.items()}
            tokens = [part.to(self.device) for part in tokens]
        # Only here: whole buffers are copied at once, and what is seen of them is a view.
        self.tensors, self.tokens = tensors | {name: shaped(tensors[name], *shape) for name in self.flat}, tokens

    def hand_over(self) -> Batch:
        """The batch; the stream that trains waits for its copy, owns its memory, and embeds its texts."""
        if self.copied:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.copied)
            for part in (*self.tensors.values(), *self.tokens):
                part.record_stream(stream)
        return Batch(**self.tensors, **(self.texts.embed(self.tokens) if self.texts else {}))
