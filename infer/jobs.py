"""Finds what to edit: pictures and prompts from files, folders, patterns, tables and datasets."""

import glob
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ..encode.base.errors import EditError, reason
from ..encode.config import Dataset
from ..encode.data.columns import AFTER, BEFORE, EDITED, ORIGINAL, PROMPT, Role, Rows
from ..encode.data.pairs import open_rows, texts_of
from .config import InferConfig


@dataclass(frozen=True)
class Job:
    """One picture to edit, read when its turn comes."""

    label: str  # what reports call it
    stem: str  # what its outputs are named after; unique among the jobs of a run
    prompt: str
    image: Callable[[], bytes]  # gives the bytes of an image file; raises EditError where there are none
    target: Callable[[], bytes] | None = None  # likewise
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
    named = zip(_unique(path.stem for path in paths), paths, strict=True)
    return [Job(str(path), stem, prompt, partial(_read_file, path), path=path) for stem, path in named]


def _pictures(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        endings = Image.registered_extensions()
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and file.is_file())
    else:
        # A file first: its name may hold brackets, which mean something in patterns.
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    if not found:
        raise EditError(f"--image {pattern}: no picture is there")
    return found


def _jobs_of_table(config: InferConfig, table: str, captions: tuple[str | None, str | None] | None) -> list[Job]:
    needed = [ORIGINAL] if config.inputs.prompt is not None else [ORIGINAL, PROMPT]
    wanted = [EDITED] if captions is None else [EDITED, BEFORE, AFTER]
    named = dict(zip((BEFORE, AFTER), captions or (), strict=False))
    # Without a default split: scores over pairs that were trained on would say nothing.
    dataset = Dataset(dataset_name=table, **vars(config.columns))
    rows = open_rows(dataset, None, needed, wanted, captions=named)
    names = map(rows.name, range(len(rows)))
    stems = _unique(Path(name).stem if name else f"{row:05d}" for row, name in enumerate(names))
    texts = zip(*(_texts(rows, role) for role in (PROMPT, BEFORE, AFTER)), strict=True)
    return [
        Job(
            label=f"row {row}",
            stem=stem,
            prompt=config.inputs.prompt or "" if prompt is None else prompt,
            image=partial(_read_cell, rows, row, ORIGINAL),
            target=partial(_read_cell, rows, row, EDITED) if EDITED in rows.columns else None,
            captions=(before, after),
        )
        for row, (stem, (prompt, before, after)) in enumerate(zip(stems, texts, strict=True))
    ]


def _texts(rows: Rows, role: Role) -> Iterable[str | None]:
    """For each row the first of its texts, empty where there is none; all None where there is no such column."""
    if role not in rows.columns:
        return [None] * len(rows)
    return (str(texts_of(value)[0] or "") for value in rows.texts(role))


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


def _read_cell(rows: Rows, row: int, role: Role) -> bytes:
    try:
        (content,) = rows.read(row, role)
    except OSError as error:
        raise EditError(f"the picture in column {rows.columns[role]} cannot be read: {reason(error)}") from None
    if content is None:
        name = rows.name(row) if role == ORIGINAL else None
        raise EditError(f"no picture in column {rows.columns[role]}" + (f": {name} is not there" if name else ""))
    return content


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EditError(f"{path} cannot be read: {error.strerror}") from None
