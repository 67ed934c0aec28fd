"""Finds what to edit: pictures and prompts from files, folders, patterns, tables and datasets."""

import glob
import itertools
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..encode.base.console import warn
from ..encode.base.errors import EditError, ImageError, SampleError
from ..encode.base.files import content_key, storable
from ..encode.config import Dataset
from ..encode.data.columns import AFTER, BEFORE, EDITED, MASK, ORIGINAL, PROMPT, Role, Rows, is_image_name
from ..encode.data.opening import open_rows
from ..encode.data.pairs import no_instruction, texts_of
from ..encode.data.pictures import open_mask
from .config import InferConfig

LONGEST = 223
"""Bytes of what outputs are named after; a file name has 255, and while it is written up to 32 more than this."""


@dataclass(frozen=True)
class Job:
    """One picture to edit, read when its turn comes."""

    label: str  # what reports call it
    stem: str  # what its outputs are named after; unique among the jobs of a run
    prompt: Any  # text, unless its row is a bad one
    image: Callable[[], bytes]  # gives the bytes of an image file; raises EditError where there are none
    target: Callable[[], bytes] | None = None  # likewise
    mask: Callable[[], bytes | None] | None = None  # likewise; where there is none, all of it may change
    path: Path | None = None  # the picture's own file, if it is one
    captions: tuple[str | None, str | None] = (None, None)  # of original and edited picture; None: no such column


def find_jobs(config: InferConfig, captions: tuple[str | None, str | None] | None = None) -> list[Job]:
    """List the jobs of a run, in a stable order.

    Args:
        captions: if captions are read, too: the columns of originals' and of edited pictures' captions, None where
            they have one of the usual names.

    Raises:
        EditError: nothing is there.
        SourceError: the table cannot be opened, or its columns are not told apart.
    """
    if config.inputs.table:
        return _jobs_of_table(config, config.inputs.table, captions)
    paths = [path for pattern in config.inputs.image for path in _pictures(pattern)]
    prompt = config.inputs.prompt or ""
    named = zip(_unique(map(_stem, paths)), paths, strict=True)
    mask = _mask_of_all(config)
    return [Job(str(path), stem, prompt, partial(_read_file, path), mask=mask, path=path) for stem, path in named]


def _pictures(pattern: str) -> list[Path]:
    if os.path.isdir(pattern):
        found = sorted(file for file in Path(pattern).iterdir() if is_image_name(file.name) and os.path.isfile(file))
    else:
        # A file first: its name may hold brackets, which mean something in patterns.
        names = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [Path(name) for name in names if not os.path.isdir(name)]
    if not found:
        raise EditError(f"--image {pattern}: no picture is there")
    return found


def _jobs_of_table(config: InferConfig, table: str, captions: tuple[str | None, str | None] | None) -> list[Job]:
    needed = [ORIGINAL, *([PROMPT] * (config.inputs.prompt is None)), *([MASK] * bool(config.columns.mask_column))]
    wanted = [EDITED] if captions is None else [EDITED, BEFORE, AFTER]
    named = dict(zip((BEFORE, AFTER), captions or (), strict=False))
    # Without a default split: scores over pairs that were trained on would say nothing.
    dataset = Dataset(dataset_name=table, **vars(config.columns))
    rows = open_rows(dataset, config.loading.cache_dir, needed, wanted, named=named)
    names = map(rows.name, range(len(rows)))
    stems = _unique(_stem(Path(name)) if name else f"{row:05d}" for row, name in enumerate(names))
    texts = zip(*(_texts(rows, role) for role in (PROMPT, BEFORE, AFTER)), strict=True)
    prompt = config.inputs.prompt
    return [
        Job(
            label=f"row {row}",
            stem=stem,
            prompt=text if prompt is None else prompt,
            image=partial(_read_cell, rows, row, ORIGINAL),
            target=partial(_read_cell, rows, row, EDITED) if EDITED in rows.columns else None,
            mask=partial(_read, rows, row, MASK) if MASK in rows.columns else _mask_of_all(config),
            captions=(_caption(before, rows, BEFORE), _caption(after, rows, AFTER)),
        )
        for row, (stem, (text, before, after)) in enumerate(zip(stems, texts, strict=True))
    ]


def _texts(rows: Rows, role: Role) -> Iterable[Any]:
    """For each row the first of its texts; None where there is none."""
    return (texts_of(value)[0] for value in rows.texts(role)) if role in rows.columns else [None] * len(rows)


def _caption(text: Any, rows: Rows, role: Role) -> str | None:
    """A caption, empty where it cannot be used; None where there is no such column."""
    return None if role not in rows.columns else "" if no_instruction(text) else text


def _stem(path: Path) -> str:
    """What outputs of a file are named after: its stem, if a file can be called so, and else what is left of that."""
    stem = re.sub(r'[\0<>:"|?*]' if sys.platform == "win32" else "\0", "_", path.stem)
    try:
        fits = len(os.fsencode(stem)) <= LONGEST
    except UnicodeEncodeError:
        fits = False
    content = storable(stem).encode()
    return stem if fits else f"{content[: LONGEST - 9].decode(errors='ignore')}-{content_key(content)[:8]}"


def _unique(stems: Iterable[str]) -> Iterator[str]:
    """Number stems that came before, ignoring case, as file systems may: a, a-2, a-3."""
    taken: set[str] = set()
    counters: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))
    for stem in stems:
        name = stem
        while name.lower() in taken:
            name = f"{stem}-{next(counters[stem.lower()])}"
        taken.add(name.lower())
        yield name


def _mask_of_all(config: InferConfig) -> Callable[[], bytes] | None:
    """What gives the mask of all pictures, if there is one; raises EditError where it is none."""
    if not config.inputs.mask:
        return None
    read = partial(_read_file, Path(config.inputs.mask))
    try:
        shares = open_mask(read())
    except ImageError as error:
        raise EditError(f"--mask {config.inputs.mask}: {error}") from None
    except EditError as error:
        raise EditError(f"--mask {error}") from None
    if not shares.any():
        warn(f"--mask {config.inputs.mask} is black all over: nothing may change (white, or transparent, is edited)")
    return read


def _read(rows: Rows, row: int, role: Role) -> bytes | None:
    try:
        (content,) = rows.read(row, role)
    except SampleError as error:
        raise EditError(f"the picture in column {rows.columns[role]} cannot be read: {error}") from None
    return content


def _read_cell(rows: Rows, row: int, role: Role) -> bytes:
    content = _read(rows, row, role)
    if content is None:
        name = rows.name(row) if role == ORIGINAL else None
        raise EditError(f"no picture in column {rows.columns[role]}" + (f": {name} is not there" if name else ""))
    return content


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EditError(f"{path} cannot be read: {error.strerror}") from None
