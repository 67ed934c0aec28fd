"""Rows that the `datasets` library opens: on the Hub, in local files, as a stream, or saved by `save_to_disk`."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError

from ..base.errors import SourceError, explained
from ..base.files import file_state
from ..config import Dataset
from .columns import IMAGES, ORIGINAL, Columns, Pick, Role, Rows, image_columns, kinds_of

READERS: dict[str, dict[str, Any]] = {
    ".arrow": {"path": "arrow"},
    ".csv": {"path": "csv", "keep_default_na": False},  # "None" is a word, and may be an instruction
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
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
        self._table: Any = table.select_columns(list(dict.fromkeys(columns.values()))).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        values = self._table[row]
        cells = [(role, values[self.columns[role]][0].as_py()) for role in roles]
        return tuple(file_bytes(cell, self._folder) if role.holds == IMAGES else cell for role, cell in cells)

    def texts(self, role: Role) -> Iterator[Any]:
        for batch in self._table.select_columns(self.columns[role]).iter(1000):
            yield from batch[self.columns[role]].to_pylist()

    def name(self, row: int) -> str | None:
        cell = self._table[row][self.columns[ORIGINAL]][0]
        cell = cell[0] if isinstance(cell, pa.ListScalar) and len(cell) else cell
        name = cell["path"].as_py() if isinstance(cell, pa.StructScalar) else cell.as_py()
        return name if isinstance(name, str) else None

    def fingerprint(self) -> str:
        """`datasets` derives its own from the data; images that lie outside of that add size and time."""
        digest = hashlib.blake2b(self._table._fingerprint.encode(), digest_size=16)
        files = [file["filename"] for file in self._table.cache_files]
        for column in image_columns(self.columns):
            for chunk in self._table.data.column(column).chunks:
                files += (os.path.join(self._folder, path) for path in _outside(chunk))
        for file in files:
            digest.update(file_state(file).encode())
        return digest.hexdigest()


def open_table(dataset: Dataset, name: str, pick: Pick, cache_dir: Path | None, default_split: str | None) -> Table:
    """Open a Hub id, a local file or folder, or a folder with a file of metadata that names the images.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    hint = " (expected a Hub id, a folder or a file; --split takes one of its splits)"
    with explained(SourceError, f"dataset {name} cannot be opened", hint=hint):  # `datasets` raises some twenty kinds
        try:
            return _open(dataset, name, pick, cache_dir, default_split)
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None


def _open(dataset: Dataset, name: str, pick: Pick, cache_dir: Path | None, default_split: str | None) -> Table:
    path = _data_file(dataset, Path(name))
    folder = path.parent if path.is_file() else path
    if any((path / state).is_file() for state in ("state.json", "dataset_dict.json")):
        table: Any = datasets.load_from_disk(name)
        if isinstance(table, dict):  # of splits
            split = dataset.split or _only_split(name, table, default_split)
            if split not in table:
                raise SourceError(f"{name} has no split {split}: choose one of {', '.join(table)} with --split")
            table = table[split]
    else:
        where: dict[str, Any] = {"path": name, "name": dataset.dataset_config_name}
        where["revision"] = dataset.dataset_revision
        if path.is_file():
            where = {**READERS[path.suffix.lower()], "data_files": str(path)}
        where["cache_dir"] = str(cache_dir) if cache_dir else None
        builder: Any = datasets.load_dataset_builder(**where)
        where["split"] = dataset.split or _only_split(name, builder.as_streaming_dataset(), default_split)
        if dataset.streaming:
            return _keep_stream(builder, where, pick, folder, dataset.max_train_samples)
        table = datasets.load_dataset(**where)
    return Table(table, pick(kinds_of(table.with_format("arrow")[:GLANCE], folder)), folder)


def _keep_stream(builder: Any, where: dict[str, Any], pick: Pick, folder: Path, limit: int | None) -> Table:
    """Read a stream into a local table, or open the table that an earlier run made of it."""
    stream = builder.as_streaming_dataset(split=where["split"])
    sample = next(stream.with_format("arrow").iter(GLANCE), pa.table({}))
    columns = pick(kinds_of(sample, folder))
    names, images = tuple(columns.values()), tuple(image_columns(columns))
    types = datasets.Features.from_arrow_schema(sample.select(names).schema)
    # What these are decides whether the stream was kept before; the hash changes with the data.
    parts = {"where": where, "names": names, "images": images, "folder": folder, "limit": limit}
    kept = datasets.Dataset.from_generator(
        _stream,
        features=datasets.Features(types | dict.fromkeys(images, datasets.Value("binary"))),
        cache_dir=where["cache_dir"],
        gen_kwargs=parts | {"state": builder.hash},
        writer_batch_size=100,  # rows in memory
    )
    return Table(kept, columns, folder)


def _stream(
    where: dict[str, Any], names: tuple[str, ...], images: tuple[str, ...], folder: Path, limit: int | None, state: str
) -> Iterator[dict[str, Any]]:
    """The rows of a stream with the bytes of their images, read once from start to end."""
    stream: Any = datasets.load_dataset(**where, streaming=True)
    batches = stream.select_columns(list(names)).with_format("arrow").iter(1)
    for batch in itertools.islice(batches, limit):
        row = batch.to_pylist()[0]
        yield row | {column: file_bytes(row[column], folder) for column in images}


def file_bytes(image: Any, folder: Path) -> bytes | None:
    """The file of an image as it is: given as bytes, as a path, as both, or as the first of a list of these."""
    if isinstance(image, list):
        image = image[0] if image else None
    if isinstance(image, dict):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if not isinstance(image, str):
        return image
    try:
        if "://" in image:  # in a stream
            with fsspec.open(image, "rb") as file:
                return file.read()  # type: ignore[union-attr]
        return (folder / image).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _data_file(dataset: Dataset, path: Path) -> Path:
    """The file that lists the pairs of a folder, if it has one; else the path itself."""
    found = [path / name for name in METADATA if (path / name).is_file()]
    if len(found) > 1:
        raise SourceError(f"{path} has {' and '.join(file.name for file in found)}: expected one list of its pairs")
    if found:
        if found[0].stat().st_size:
            return found[0]
        raise SourceError(f"{found[0]} is empty: expected a line for each pair, with both files and the instruction")
    if dataset.train_data_dir and not path.is_dir():
        raise SourceError(f"--train_data_dir {path} is not a folder")
    if dataset.train_data_dir:
        below = next((file.parent for name in METADATA for file in path.glob(f"*/{name}")), None)
        hint = f"give --train_data_dir {below}" if below else "a dataset's own folder goes to --dataset_name"
        raise SourceError(f"--train_data_dir {path} has no {', '.join(METADATA)} or seeds.json: {hint}")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise SourceError(f"{path} is a file of no known kind: expected {', '.join(READERS)} or .tar")
    return path


def _only_split(name: str, splits: Iterable[str], default: str | None) -> str:
    """The split that is meant without --split: the default, or the only one there is."""
    names = list(map(str, splits))
    if default in names or len(names) == 1:
        return default if default in names else names[0]
    lack = f"no split {default}" if default else "several splits"
    raise SourceError(f"{name} has {lack}: choose one of {', '.join(names)} with --split")


def _outside(images: pa.Array) -> list[str]:
    """Paths of the images of a column that are not in the table itself."""
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        images = images.flatten()
    if pa.types.is_struct(images.type):
        images = images.filter(images.field("bytes").is_null()).field("path")
    strings = pa.types.is_string(images.type) or pa.types.is_large_string(images.type)
    return list(filter(None, images.to_pylist())) if strings else []
