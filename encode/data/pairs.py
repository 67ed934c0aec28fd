"""The pairs of a dataset: which kind of dataset a name means, opening it, and what its rows give."""

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from ..base.errors import SourceError, explained
from ..base.files import storable
from ..cache.format import SAMPLES
from ..config import Dataset
from .columns import EDITED, INVERSE, ORIGINAL, PROMPT, TEXT, VALUES, Role, Rows, choose, evaluation_only
from .places import in_seeds, in_tars, is_saved, name_of

NOT_THERE = {
    "split": "splits",
    "dataset_config_name": "configurations",
    "dataset_revision": "revisions",
    "streaming": "second way to be read",
}
"""Flags that cannot act on tar files, seeds.json and what `save_to_disk` wrote, and what these lack."""

KEPT = {types.is_boolean: pa.bool_(), types.is_integer: pa.int64(), types.is_floating: pa.float64()}
KEPT |= {types.is_decimal: pa.float64(), types.is_string: pa.string()}
"""What a column may be that is kept, and as what."""


class Pair(NamedTuple):
    """One sample as it was found: image files as bytes, `None` where a side is missing."""

    original: bytes | None
    edited: bytes | None
    instruction: Any


def open_pairs(dataset: Dataset, cache_dir: Path | None) -> "Pairs":
    """Open the pairs of images and instructions that the flags name, those of the split train unless one is named.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    needed = (ORIGINAL, EDITED, PROMPT, INVERSE) if dataset.reverse_pairs else (ORIGINAL, EDITED, PROMPT)
    kept = {Role("keep_columns", "values to keep", VALUES, name): name for name in dataset.keep_columns}
    if taken := [name for name in kept.values() if name.lower() in SAMPLES.names]:
        raise SourceError(f"--keep_columns {taken[0]}: the table of samples has a column of that name, rename this one")
    rows = open_rows(dataset, cache_dir, (*needed, *kept), named=kept, default_split="train")
    return Pairs(rows, name_of(dataset), every=dataset.prompt_choice == "all", limit=dataset.max_train_samples)


def open_rows(
    dataset: Dataset,
    cache_dir: Path | None,
    needed: Collection[Role],
    wanted: Collection[Role] = (),
    *,
    named: Mapping[Role, str | None] | None = None,
    default_split: str | None = None,
) -> Rows:
    """Open the dataset that the flags name, for encoding, editing and scoring alike.

    Args:
        cache_dir: where downloads are kept; default: where the `datasets` library keeps them.
        needed: roles that must have a column.
        wanted: roles that have one where the dataset offers it.
        named: columns that the user names beside those of `dataset`.
        default_split: the split where none is named and there are several; by default none is taken silently.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    name = name_of(dataset)
    if EDITED in needed and evaluation_only(name) and dataset.edited_image_column is None:
        raise SourceError(
            f"{name} is made for evaluation: it holds no edited images to learn from "
            "(--edited_image_column, if your copy has some)"
        )
    flags = {role: getattr(dataset, role.flag, None) for role in (*needed, *wanted)} | dict(named or {})
    pick = functools.partial(choose, flags, name, needed=needed, wanted=wanted)
    seeds, tars = in_seeds(name), in_tars(name)
    saved = is_saved(Path(name))
    for flag, what in NOT_THERE.items() if seeds or tars or saved else ():
        if getattr(dataset, flag) and not (saved and flag == "split"):
            raise SourceError(f"{name} has no {what}: leave out --{flag}")
    # Each kind imports what it needs only when it is meant.
    if seeds:
        from .seeds import Seeds

        rows = Seeds(Path(name), pick)
    elif tars:
        from .tars import Tars

        rows = Tars(name, pick, cache_dir)
    else:
        from .tables import open_table

        rows = open_table(dataset, name, pick, cache_dir, default_split)
    if len(rows) == 0:
        raise SourceError(f"{name} holds no samples")
    return rows


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
    """The texts of a cell that is one or lists some: the first, or every one.

    An empty list counts as one text that is missing, so that nothing vanishes.
    """
    return ((value if every else value[:1]) or [None]) if isinstance(value, list) else [value]


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
        self.name, self.columns = name, tuple(c for role, c in rows.columns.items() if role.holds != VALUES)
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
        row, sample = map(int, self._locate(index))
        if self._latest[0] != row:
            self._latest = row, self._rows.read(row, ORIGINAL, EDITED, *self._texts)
        original, edited, prompts, *inverse = self._latest[1]
        pairs = [Pair(original, edited, text) for text in texts_of(prompts, every=self._every)]
        pairs += [Pair(edited, original, text) for value in inverse for text in texts_of(value, every=self._every)]
        return pairs[sample]

    def group(self, index: int) -> str | None:
        """The prompt that a sample belongs to, if that is not its instruction."""
        return self._rows.group(int(self._locate(index)[0]))

    def with_kept(self, samples: pa.Table) -> pa.Table:
        """A table of samples with the columns that are kept of their rows.

        Raises:
            SourceError: a column holds something else than numbers, booleans or text, or several of these.
        """
        rows = self._locate(samples["position"].to_numpy())[0]
        for name, values in self._kept():
            samples = samples.drop_columns(name) if name in samples.column_names else samples
            samples = samples.append_column(name, values.take(pa.array(rows)))
        return samples

    def _kept(self) -> Iterator[tuple[str, pa.Array]]:
        """The columns that are kept, with what all rows hold there."""
        for role, column in self._rows.columns.items():
            if role.holds == VALUES:
                what, expected = f"column {column} of {self.name}", f"; expected {VALUES}"
                texts = [storable(text) if isinstance(text, str) else text for text in self._rows.texts(role)]
                with explained(SourceError, what, pa.ArrowException, OverflowError, hint=expected):
                    values = pa.array(texts)
                    kind = next((to for is_, to in KEPT.items() if is_(values.type)), None)
                    if kind is None:
                        raise SourceError(f"{what} holds {values.type}{expected}")
                    yield column, values.cast(kind)

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
