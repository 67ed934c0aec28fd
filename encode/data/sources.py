"""Where pairs come from: one interface for all kinds of datasets, and which kind the flags mean."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..base.errors import SourceError
from ..config import EncodeConfig
from . import presets


class Pair(NamedTuple):
    """One sample as it was found: image files as bytes, `None` where a side is missing."""

    original: bytes | None
    edited: bytes | None
    instruction: Any


class Rows(Protocol):
    """What a kind of dataset offers. It is copied into worker processes, so it holds no open files."""

    columns: tuple[str, ...]
    """Names of what a row consists of: original, edited, instruction, and maybe the inverse instruction."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> tuple[Any, ...]:
        """Both image files as bytes (None where one is missing), then the instructions, as they are."""
        ...

    def instructions(self) -> Iterable[tuple[Any, ...]]:
        """The instructions of all rows; no image is read."""
        ...

    def group(self, row: int, /) -> str | None:
        """The prompt that a row belongs to, if that is not its instruction."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images."""
        ...


class Source:
    """A dataset as a sequence of pairs with random access.

    A row may give several samples: one for each of its instructions with --prompt_choice all, and those of the
    reversed pair, with the inverse instruction, after them.

    Args:
        rows: the dataset.
        name: what the user calls it.
        config: says which instructions are taken, and how many samples.
    """

    def __init__(self, rows: Rows, name: str, config: EncodeConfig):
        self.name, self.columns = name, rows.columns
        self._rows, self._all = rows, config.dataset.prompt_choice == "all"
        self._latest: tuple[int, tuple[Any, ...]] = (-1, ())
        if self._all:
            counts = (sum(len(self._choices(value)) for value in row) for row in rows.instructions())
            self._ends = np.fromiter(counts, np.int64, len(rows)).cumsum()
            samples = int(self._ends[-1]) if len(rows) else 0
        else:
            samples = len(rows) * (len(rows.columns) - 2)
        self._length = min(samples, config.dataset.max_train_samples or samples)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row, sample = self._locate(index)
        if self._latest[0] != row:
            self._latest = row, self._rows[row]
        original, edited, *instructions = self._latest[1]
        pairs = [Pair(original, edited, text) for text in self._choices(instructions[0])]
        pairs += [Pair(edited, original, text) for value in instructions[1:] for text in self._choices(value)]
        return pairs[sample]

    def group(self, index: int) -> str | None:
        """The prompt that a sample belongs to, if that is not its instruction."""
        return self._rows.group(self._locate(index)[0])

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images."""
        parts = (self._rows.fingerprint(), self.columns, self._all, len(self))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _choices(self, value: Any) -> list[Any]:
        """The instructions of a row: an empty list counts as one that is missing, so that nothing vanishes."""
        if not isinstance(value, list):
            return [value]
        return (value if self._all else value[:1]) or [None]

    def _locate(self, index: int) -> tuple[int, int]:
        if not self._all:
            return divmod(index, len(self.columns) - 2)
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)


def open_source(config: EncodeConfig) -> Source:
    """Open the dataset that the flags name.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    name = config.dataset.dataset_name or str(config.dataset.train_data_dir)
    if presets.evaluation_only(name) and config.dataset.edited_image_column is None:
        raise SourceError(
            f"{name} is made for evaluation: it holds no edited images to learn from "
            "(--edited_image_column, if your copy has some)"
        )
    source = Source(_open_rows(config, name), name, config)
    if len(source) == 0:
        raise SourceError(f"{name} holds no samples")
    return source


def _open_rows(config: EncodeConfig, name: str) -> Rows:
    # Each imports what it needs only when it is meant.
    seeds = (Path(name) / "seeds.json").is_file()
    tars = f"{name}/*.tar" if any(Path(name).glob("*.tar")) else name
    in_tars = tars.endswith(".tar") or "{" in tars or "://" in tars
    if config.dataset.split and (seeds or in_tars):
        raise SourceError(f"{name} has no splits: leave out --split {config.dataset.split}")
    if seeds:
        from .seeds import open_seeds

        return open_seeds(config, Path(name))
    if in_tars:
        from .tars import open_tars

        return open_tars(config, tars)
    from .tables import open_table

    return open_table(config, name)
