"""A finished cache as a map-style dataset of PyTorch."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .base.errors import SettingsError, did_you_mean
from .cache.format import ARRAYS, Cache
from .cache.keep import some_kept
from .cache.reader import Reader
from .cache.shapes import shaped
from .cached import Samples

Item = dict[str, Any]  # of tensors and text


class CacheDataset(Dataset[Item]):
    """The usable samples of a cache, in the order of the dataset that was encoded.

    >>> dataset = CacheDataset("cache")
    >>> loader = DataLoader(dataset, batch_sampler=dataset.batches(16), num_workers=2)

    Each is a dict of what the cache holds of it, for latents of h x w cells:

        original    (4, h, w) float16: mean of the posterior of the original picture, unscaled
        edited      (8, h, w) float16: mean and log variance of that of the edited picture, unscaled
        mask        (1, h, w) float16: the share of each cell that is edited, if the cache has masks
        text        (77, d) float16: the instruction embedded, if the cache holds that
        pooled      (1280,) float16: for SDXL
        time_ids    (6,) float32: for SDXL the height and width of the original, top and left of the crop, and the
                    height and width of what is encoded, in pixels
        instruction the instruction itself
        view        name of the view: plain or crop0, crop1 …; flip, crop0-flip …

    Pictures of one sample are always of the same view. Random is that view alone, and only if none is named: one of all
    views of the cache is drawn for each access by PyTorch's generator, which `DataLoader` seeds anew in its workers for
    each epoch. A flipped view is shown unflipped where the instruction must not be flipped. What else training draws,
    such as latents of a posterior, is left to the loop: docs/python.md shows it.

    It can be pickled, for workers of any start method; each process maps the files for itself.

    Args:
        cache: its folder, or the opened cache.
        view: name of the view that is shown of each sample.
        keep: use only the samples of which this is true: a condition as that of `ip2p-train --keep`.

    Raises:
        CacheError: there is no cache, or it is unfinished, damaged, or without a usable sample.
        SettingsError: it has no such view; `keep` cannot be used, or keeps nothing.
    """

    def __init__(self, cache: str | Path | Cache, *, view: str | None = None, keep: str | None = None):
        self.cache = cache if isinstance(cache, Cache) else Cache.open(Path(cache))
        self.cache.check_files()
        if view and view not in self.cache.views:
            there = f"{self.cache.name} has {', '.join(self.cache.views)}{did_you_mean(view, self.cache.views)}"
            raise SettingsError(f"view {view}: {there}")
        kept = True if keep is None else some_kept(self.cache, keep)
        self._samples = Samples.of(self.cache, None, kept)
        self._instructions = self.cache.samples("instruction")["instruction"].combine_chunks()
        self._view = self.cache.views.index(view) if view else None
        self.reader.require(self._samples.rows, self._samples.text_rows)

    @cached_property
    def reader(self) -> Reader:
        """The mapped files."""
        return Reader(self.cache, masks=bool(self.cache.manifest.get("masks")))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "reader"}

    def __len__(self) -> int:
        return len(self._samples.rows)

    def __getitem__(self, number: int) -> Item:
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Item]:
        """Several samples, gathered at once: `DataLoader` asks for those of a batch."""
        which = np.asarray(numbers)
        drawn = torch.randint(self._samples.views.shape[1], (len(which),)).numpy() if self._view is None else self._view
        views, time_ids = self._samples.views[which, drawn], self._samples.time_ids[which, drawn]
        parts = self._take(self._samples.rows[which], views, self._samples.text_rows[which])
        items = []
        for place, number in enumerate(which.tolist()):
            shape = self._samples.shapes[number].tolist()
            item: Item = {
                name: shaped(part[place], *shape) if name in ARRAYS["images"] and part.ndim == 3 else part[place]
                for name, part in parts.items()
            }
            if "pooled" in self.reader.arrays:
                item["time_ids"] = torch.from_numpy(time_ids[place])
            item["instruction"] = self._instructions[int(self._samples.numbers[number])].as_py()
            items.append(item | {"view": self.cache.views[views[place]]})
        return items

    @property
    def null(self) -> dict[str, Tensor]:
        """The empty instruction embedded, for dropout: text (77, d), for SDXL pooled (1280,), float16."""
        self.reader.require(np.zeros(0, np.int64), np.zeros(1, np.int64))
        first = np.zeros(1, np.int64)
        return {name: part[0] for name, part in self._take(first, first, first, ARRAYS["text"]).items()}

    def batches(self, size: int) -> "ShapeBatches":
        """The numbers of all samples in random order, `size` at once, for `DataLoader(batch_sampler=…)`.

        Those of a batch have one shape, and the last batch of each shape may be smaller. The order of an epoch is drawn
        by PyTorch's generator.
        """
        return ShapeBatches(self._samples.by_shape().values(), size)

    def _take(
        self, rows: np.ndarray, views: np.ndarray, text_rows: np.ndarray, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Rows of some arrays, by default of those that samples have, by name: (B, ...) float16."""
        known = self.reader.arrays
        there = names or (*ARRAYS["images"], *(ARRAYS["text"] if self.cache.holds_text else ()))
        parts = {name: np.empty((len(rows), *known[name].row_shape), np.float16) for name in there if name in known}
        self.reader.take(parts, rows, views, text_rows)
        return {name: torch.from_numpy(part) for name, part in parts.items()}


class ShapeBatches(Sampler[list[int]]):
    """Batches of sample numbers, given those of each shape: see `CacheDataset.batches`."""

    def __init__(self, members: Iterable[np.ndarray], size: int):
        self._members, self._size = [torch.from_numpy(some) for some in members], size

    def __len__(self) -> int:
        return sum(-(-len(some) // self._size) for some in self._members)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = (some[torch.randperm(len(some))] for some in self._members)
        batches = [batch for some in shuffled for batch in some.split(self._size)]
        return (batches[number].tolist() for number in torch.randperm(len(batches)).tolist())
