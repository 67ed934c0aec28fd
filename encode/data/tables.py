"""Rows that the `datasets` library opens: on the Hub, in local files, as a stream, or saved by `save_to_disk`."""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from ..base.errors import SampleError, SourceError, explained
from ..base.files import file_state
from ..config import Dataset
from .cells import column_kinds, file_bytes, file_in, known_value, outside, value_of, values_of
from .columns import IMAGES, MASK, ORIGINAL, Columns, Pick, Role, Rows, image_columns
from .places import READERS, data_file, is_saved, reader_of_url

GLANCE = 16  # rows that show what the columns hold


class Table(Rows):
    """Rows of a `datasets.Dataset`. Image files stay as they are, inside the table or beside it.

    Args:
        table: the dataset.
        columns: the column of each role.
        folder: what the paths of images are relative to.
    """

    def __init__(self, table: datasets.Dataset, columns: Columns, folder: Path):
        self.columns, self._folder = columns, folder
        # As Arrow nothing is decoded: an Image is a struct of the file's bytes and its path.
        parts = [dict.fromkeys(c for role, c in columns.items() if role.beside == beside) for beside in (False, True)]
        self._tables: Any = [table.select_columns(list(part)).with_format("arrow") for part in parts]
        self._table = self._tables[False]  # of which alone the fingerprint is

    def __len__(self) -> int:
        return len(self._table)

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        values = {beside: self._tables[beside][row] for beside in {role.beside for role in roles}}
        cells = [(role, value_of(values[role.beside][self.columns[role]][0])) for role in roles]
        found = tuple(file_bytes(cell, self._folder) if role.holds == IMAGES else cell for role, cell in cells)
        for (role, cell), content in zip(cells, found, strict=True):
            if role is MASK and content is None and file_in(cell):  # a sample may be without, but not so
                raise SampleError("the mask is missing")
        return found

    def texts(self, role: Role) -> Iterator[Any]:
        for batch in self._tables[role.beside].select_columns(self.columns[role]).iter(1000):
            yield from values_of(batch[self.columns[role]])

    def name(self, row: int) -> str | None:
        cell = self._table[row][self.columns[ORIGINAL]][0]
        cell = cell[0] if isinstance(cell, pa.ListScalar) and len(cell) else cell
        cell = cell["path"] if isinstance(cell, pa.StructScalar) else cell
        name = file_in(known_value(cell))
        return name if isinstance(name, str) else None

    def fingerprint(self) -> str:
        """`datasets` derives its own from the data; images that lie outside of that add size and time."""
        digest = hashlib.blake2b(self._table._fingerprint.encode(), digest_size=16)
        files = [file["filename"] for file in self._table.cache_files]
        for column in image_columns(self.columns):
            for chunk in self._table.data.column(column).chunks:
                files += (os.path.join(self._folder, path) for path in outside(chunk))
        for file in files:
            digest.update(file_state(file))
        return digest.hexdigest()


def open_table(dataset: Dataset, name: str, pick: Pick, cache_dir: Path | None, default_split: str | None) -> Table:
    """Open a Hub id, a local file or folder, or a folder with a file of metadata that names the images.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    path = data_file(dataset, Path(name))
    folder = path.parent if os.path.isfile(path) else path
    if is_saved(path):
        with _opening(name):
            saved: Any = datasets.load_from_disk(name)
        table = _split(name, saved, dataset.split, default_split)
    else:
        where: dict[str, Any] = {"path": name, "name": dataset.dataset_config_name}
        where["revision"] = dataset.dataset_revision
        if os.path.isfile(path):
            where = {**READERS[path.suffix.lower()], "data_files": glob.escape(str(path))}
        elif "://" in name:
            where = {**reader_of_url(name), "data_files": name}
        where["cache_dir"] = str(cache_dir) if cache_dir else None
        place = str(path) if os.path.isfile(path) and not dataset.split else name
        with _opening(place):
            builder: Any = datasets.load_dataset_builder(**where)
            splits = list(map(str, builder.as_streaming_dataset()))
        where["split"] = dataset.split or _only_split(name, splits, default_split)
        if dataset.streaming:
            return _keep_stream(name, builder, where, pick, folder, dataset.max_train_samples)
        with _opening(place):
            table = datasets.load_dataset(**where)
    return Table(table, pick(_kinds(table.with_format("arrow")[:GLANCE], folder)), folder)


@contextlib.contextmanager
def _opening(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Around what `datasets` alone does, which raises some twenty kinds of errors."""
    hint = " (expected a Hub id, a folder or a file; --split takes one of its splits)"
    if os.path.isfile(name):
        hint = ": mend the file, of which all rows are read as one table"
    with explained(SourceError, f"dataset {name} cannot be opened", *errors, hint=hint):
        try:
            yield
        except Exception as error:
            if line := _malformed(Path(name)):  # readers count rows from 0, in a block of the file
                raise DatasetsError(line) from None
            raise error.__cause__ or error from None


def _malformed(file: Path) -> str | None:
    """The first line of a JSONL file that is none, by its number from 1, and what is wrong with it."""
    if file.suffix.lower() != ".jsonl" or not file.is_file():
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line) if line.strip() else {}
            except ValueError as error:
                return f"line {number} is no JSON: {error}"
            if not isinstance(found, dict):
                return f"line {number} holds a {type(found).__name__}, expected an object: {{column: value, …}}"
    return None


def _kinds(sample: pa.Table, folder: Path) -> dict[str, list[str]]:
    return {column: column_kinds(sample[column], folder) for column in sample.column_names}


def _split(name: str, saved: Any, split: str | None, default: str | None) -> datasets.Dataset:
    """The split, or the slices of some, of what was saved: a single one keeps the name it came by, or is train."""
    tables = saved if isinstance(saved, dict) else {re.split(r"[\[+]", str(saved.split or "train"))[0]: saved}
    split = split or _only_split(name, tables, default)
    if split in tables:
        return tables[split]
    sizes = {part: len(table) for part, table in tables.items()}
    try:
        wanted = datasets.ReadInstruction.from_spec("+".join(tables) if split == "all" else split).to_absolute(sizes)
    except (ValueError, AssertionError):
        choice = f"choose one of {', '.join(tables)} with --split, or a part such as {next(iter(tables))}[:100]"
        raise SourceError(f"{name} has no split {split}: {choice}") from None
    return datasets.concatenate_datasets([tables[part.splitname].select(range(part.from_, part.to)) for part in wanted])


def _keep_stream(name: str, builder: Any, where: dict[str, Any], pick: Pick, folder: Path, limit: int | None) -> Table:
    """Read a stream into a local table, or open the table that an earlier run made of it."""
    with _opening(name):
        stream = builder.as_streaming_dataset(split=where["split"])
        sample = next(stream.with_format("arrow").iter(GLANCE), pa.table({}))
    columns = pick(_kinds(sample, folder))
    names, images = tuple(dict.fromkeys(columns.values())), tuple(image_columns(columns))
    types = datasets.Features.from_arrow_schema(sample.select(names).schema)
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    # What these are decides whether the stream was kept before; the hash changes with the data.
    parts = {"where": where, "names": names, "images": images, "folder": folder, "limit": limit}
    with _opening(name, OSError, pa.ArrowException, DatasetsError):  # not whatever our own `_stream` raises
        kept: Any = datasets.Dataset.from_generator(
            _stream,
            features=datasets.Features(types | dict.fromkeys(images, file)),
            cache_dir=where["cache_dir"],
            gen_kwargs=parts | {"state": builder.hash},
            writer_batch_size=100,  # rows in memory
        )
    return Table(kept, columns, folder)


def _stream(
    where: dict[str, Any], names: tuple[str, ...], images: tuple[str, ...], folder: Path, limit: int | None, state: str
) -> Iterator[dict[str, Any]]:
    """The rows of a stream with the bytes of their images, read once from start to end.

    An image that cannot be read now stays the path that it is: whoever reads the row then learns the reason.
    """
    opening = functools.partial(_opening, where.get("data_files", where["path"]))
    with opening():
        stream: Any = datasets.load_dataset(**where, streaming=True)
        batches = iter(stream.select_columns(list(names)).with_format("arrow").iter(1))
    for _ in itertools.count() if limit is None else range(limit):
        with opening():
            batch = next(batches, None)
        if batch is None:
            return
        row = {column: known_value(batch[column][0], parse=column in images) for column in names}
        yield row | {column: _kept(file_in(row[column]), folder) for column in images}


def _kept(file: Any, folder: Path) -> dict[str, Any]:
    """An image of a stream as the table keeps it: its bytes, or else the path at which it was not read."""
    content = None
    with contextlib.suppress(SampleError):
        content = file_bytes(file, folder)
    return {"bytes": content, "path": file if content is None and isinstance(file, str) else None}


def _only_split(name: str, splits: Iterable[str], default: str | None) -> str:
    """The split that is meant without --split: the default, or the only one there is."""
    names = list(map(str, splits))
    if default in names or len(names) == 1:
        return default if default in names else names[0]
    lack = f"no split {default}" if default else "several splits"
    raise SourceError(f"{name} has {lack}: choose one of {', '.join(names)} with --split")
