"""The pairs that the rows of a dataset give, whatever kind of dataset it is."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from .columns import EDITED, ORIGINAL, TEXT, Columns, Role


class Pair(NamedTuple):
    """One sample as it was found: image files as bytes, `None` where a side is missing."""

    original: bytes | None
    edited: bytes | None
    instruction: Any


class Rows(Protocol):
    """What every kind of dataset offers. It is copied into worker processes, so it holds no open files."""

    columns: Columns
    """The column of each role that has one, in the order in which the roles were asked for."""

    def __len__(self) -> int: ...

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        """What a row holds in these roles: image files as bytes (None where one is missing), texts as they are."""
        ...

    def texts(self, role: Role) -> Iterable[Any]:
        """What all rows hold in a role of text; no image is read."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images."""
        ...

    def name(self, row: int) -> str | None:
        """The path of the original image's own file, if it has one."""
        return None

    def group(self, row: int) -> str | None:
        """The prompt that a row belongs to, if that is not its instruction."""
        return None


def texts_of(value: Any, *, every: bool = False) -> list[Any]:
    """The texts of a cell that is one or lists some: the first, or every one.

    An empty list counts as one text that is missing, so that nothing vanishes.
    """
    if not isinstance(value, list):
        return [value]
    return (value if every else value[:1]) or [None]


class Pairs:
    """A dataset as a sequence of pairs with random access.

    A row may give several samples: one for each of its instructions, if every one counts, and those of the reversed
    pair, with the inverse instruction, after them.

    Args:
        rows: the dataset, with columns of originals, edited images, instructions, and maybe inverse instructions.
        name: what the user calls it.
        every: whether each instruction of a list makes a sample, or the first alone.
        limit: how many samples are used, from the first on; default: all.
    """

    def __init__(self, rows: Rows, name: str, *, every: bool = False, limit: int | None = None):
        self.name, self.columns = name, tuple(rows.columns.values())
        self._rows, self._every = rows, every
        self._texts = [role for role in rows.columns if role.holds == TEXT]
        self._latest: tuple[int, tuple[Any, ...]] = (-1, ())
        samples = len(rows) * len(self._texts)
        if every:
            values = zip(*map(rows.texts, self._texts), strict=True)
            counts = (sum(len(texts_of(value, every=True)) for value in row) for row in values)
            self._ends = np.fromiter(counts, np.int64, len(rows)).cumsum()
            samples = int(self._ends[-1]) if len(rows) else 0
        self._length = min(samples, limit or samples)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row, sample = self._locate(index)
        if self._latest[0] != row:
            self._latest = row, self._rows.read(row, ORIGINAL, EDITED, *self._texts)
        original, edited, prompts, *inverse = self._latest[1]
        pairs = [Pair(original, edited, text) for text in texts_of(prompts, every=self._every)]
        pairs += [Pair(edited, original, text) for value in inverse for text in texts_of(value, every=self._every)]
        return pairs[sample]

    def group(self, index: int) -> str | None:
        """The prompt that a sample belongs to, if that is not its instruction."""
        return self._rows.group(self._locate(index)[0])

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images."""
        parts = (self._rows.fingerprint(), self.columns, self._every, len(self))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _locate(self, index: int) -> tuple[int, int]:
        if not self._every:
            return divmod(index, len(self._texts))
        row = int(np.searchsorted(self._ends, index, side="right"))
        return row, index - (int(self._ends[row - 1]) if row else 0)
