"""The pairs of a dataset: what its rows give, and which of it cannot be used."""

import contextlib
import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from ..base.errors import SourceError
from ..base.files import content_key, storable
from ..cache.commits import pc
from .columns import AFTER, BEFORE, EDITED, MASK, ORIGINAL, TEXT, VALUES, Role, Rows
from .messages import instruction_in, is_message

KEPT = {types.is_boolean: pa.bool_(), types.is_integer: pa.int64(), types.is_floating: pa.float64()}
KEPT |= {types.is_decimal: pa.float64(), types.is_string: pa.string(), types.is_null: pa.float64()}
"""What a column may be that is kept, and as what; one without any value might as well hold numbers."""


class Pair(NamedTuple):
    """One sample as it was found: image files as bytes, `None` where a side is missing."""

    original: bytes | None
    edited: bytes | None
    instruction: Any
    mask: bytes | None = None  # where the edit is; everywhere without one

    @property
    def key(self) -> str:
        """Identity of its files."""
        return content_key(self.original or b"", self.edited or b"", *(() if self.mask is None else (self.mask,)))


def unusable(pair: Pair) -> str | None:
    """Why a sample cannot even be tried, or None."""
    for side in ("original", "edited"):
        if getattr(pair, side) is None:
            return f"the {side} image is missing"
    why = no_instruction(pair.instruction)
    return why and f"the instruction {why}"


def no_instruction(value: Any) -> str | None:
    """Why a value cannot be an instruction, as the end of a sentence that begins with what it is; None if it can."""
    if not isinstance(value, str):
        return f"is {type(value).__name__}, expected text"
    if storable(value) != value:
        return "holds half a character (a lone surrogate)"
    return None if value.strip() else "is empty"


def texts_of(value: Any, *, every: bool = False) -> list[Any]:
    """The texts of a cell that is one or lists some: the first, or every one. A conversation has one, its first.

    An empty list counts as one text that is missing, so that nothing vanishes.
    """
    if isinstance(value, list) and any(map(is_message, value)):
        return [instruction_in(value)]
    return ((value if every else value[:1]) or [None]) if isinstance(value, list) else [value]


def keepable(values: list[Any]) -> pa.Array | None:
    """Values as they are kept; None where they cannot be."""
    with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
        found = pa.array(values)
        kind = next((to for is_, to in KEPT.items() if is_(found.type)), None)
        return found.cast(kind) if kind else None
    return None


class Pairs:
    """A dataset as a sequence of pairs with random access.

    A row may give several samples: one for each of its instructions, if every one counts, and those of the reversed
    pair, with the inverse instruction, after them.

    Attributes:
        masks: whether the dataset has a column of them.

    Args:
        rows: the dataset, with columns of originals, edited images, instructions, maybe inverse ones, maybe masks.
        name: what the user calls it.
        every: whether each instruction of a list makes a sample, or the first alone.
        limit: how many samples are used, from the first on; default: all.
    """

    def __init__(self, rows: Rows, name: str, *, every: bool = False, limit: int | None = None):
        self.name, self.columns = name, tuple(c for role, c in rows.columns.items() if not role.beside)
        self._rows, self._every, self.masks = rows, every, MASK in rows.columns
        self._texts = [role for role in rows.columns if role.holds == TEXT and not role.beside]
        self._latest: tuple[int, tuple[Any, ...]] = (-1, ())
        samples = len(rows) * len(self._texts)
        if every:
            values = zip(*map(rows.texts, self._texts), strict=True)
            counts = (len(texts_of(value, every=True)) for row in values for value in row)
            counts = np.fromiter(counts, np.int64, samples).reshape(len(rows), -1)
            self._ends, self._forward = counts.sum(axis=1).cumsum(), counts[:, 0]
            samples = int(self._ends[-1]) if len(rows) else 0
        self._length = min(samples, limit or samples)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < self._length:
            raise IndexError(index)
        row, sample = map(int, self._locate(index))
        if self._latest[0] != row:
            self._latest = row, self._rows.read(row, ORIGINAL, EDITED, *([MASK] * self.masks), *self._texts)
        original, edited, *rest = self._latest[1]
        mask = rest.pop(0) if self.masks else None
        prompts, *inverse = (texts_of(value, every=self._every) for value in rest)
        pairs = [Pair(original, edited, text, mask) for text in prompts]
        pairs += [Pair(edited, original, text, mask) for texts in inverse for text in texts]
        return pairs[sample]

    def group(self, index: int) -> str | None:
        """The prompt that a sample belongs to, if that is not its instruction."""
        return self._rows.group(int(self._locate(index)[0]))

    def kept(self) -> dict[str, pa.Array]:
        """What all rows hold in the columns that are kept, by name; no image is read for it.

        Raises:
            SourceError: a column holds something else than numbers, booleans or text, or several of these.
        """
        found = {}
        for role, column in self._rows.columns.items():
            if role.holds == VALUES:
                values = [storable(value) if isinstance(value, str) else value for value in self._rows.texts(role)]
                found[column] = keepable(values)
                if found[column] is None:
                    row = bisect_left(range(len(values)), True, key=lambda n: keepable(values[: n + 1]) is None)
                    holds = f"row {row} of {self.name} (the first is 0) holds {values[row]!r:.60}"
                    expected = f"expected {VALUES}, one of these in all rows, whole numbers of 64 bits"
                    raise SourceError(f"--keep_columns {column}: {holds}; {expected}: leave it out, or mend the column")
        return found

    def with_kept(self, samples: pa.Table, kept: Mapping[str, pa.Array]) -> pa.Table:
        """A table of samples with what `kept` has of their rows."""
        rows = self._locate(samples["position"].to_numpy())[0]
        for name, values in kept.items():
            samples = samples.drop_columns(name) if name in samples.column_names else samples
            samples = samples.append_column(name, values.take(pa.array(rows)))
        return samples

    def column(self, role: Role) -> str | None:
        """The column that plays a role, if there is one."""
        return self._rows.columns.get(role)

    def captions(self, positions: np.ndarray) -> list[pa.Array]:
        """Captions of the originals and of the edited images of samples, two of (N,) text; null where there is none.

        No image is read for them.
        """
        rows, sample = self._locate(positions)
        back = pa.array(sample >= (self._forward[rows] if self._every else 1))  # whose pair is reversed
        one, other = (self._captions(role).take(pa.array(rows)) for role in (BEFORE, AFTER))
        return [pc.if_else(back, other, one), pc.if_else(back, one, other)]

    def _captions(self, role: Role) -> pa.Array:
        """The captions of all rows in one role."""
        if role not in self._rows.columns:
            return pa.nulls(len(self._rows), pa.string())
        texts = (texts_of(value)[0] for value in self._rows.texts(role))
        return pa.array([None if no_instruction(text) else text for text in texts], pa.string())

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images."""
        parts = (self._rows.fingerprint(), self.columns, self._every, len(self))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _locate(self, index: Any) -> tuple[Any, Any]:
        """The rows of samples, and which of their row's samples they are."""
        if not self._every:
            return divmod(index, len(self._texts))
        row = np.searchsorted(self._ends, index, side="right")
        return row, index - np.where(row > 0, self._ends[row - 1], 0)
