"""Pairs that the `datasets` library opens: on the Hub, in local files, as a stream, or saved by `save_to_disk`."""

import contextlib
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

from ..base.errors import SourceError
from ..base.files import file_state
from ..config import EncodeConfig
from .columns import choose, kinds_of

READERS: dict[str, dict[str, Any]] = {
    ".arrow": {"path": "arrow"},
    ".csv": {"path": "csv", "keep_default_na": False},  # "None" is a word, and may be an instruction
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
GLANCE = 16  # rows that show what the columns hold


class Table:
    """Rows of a `datasets.Dataset`. Image files stay as they are, inside the table or beside it.

    Args:
        table: the dataset.
        columns: of originals, edited images, instructions, and maybe inverse instructions.
        folder: what the paths of images are relative to.
    """

    def __init__(self, table: datasets.Dataset, columns: tuple[str, ...], folder: Path):
        self.columns = columns
        self._folder = folder
        # As Arrow nothing is decoded: an Image is a struct of the file's bytes and its path.
        self._table: Any = table.select_columns(list(columns)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        values = self._table[row].to_pylist()[0]
        original, edited, *instructions = (values[column] for column in self.columns)
        return file_bytes(original, self._folder), file_bytes(edited, self._folder), *instructions

    def instructions(self) -> Iterator[tuple[Any, ...]]:
        """The instructions of all rows."""
        texts = list(self.columns[2:])
        for batch in self._table.select_columns(texts).iter(1000):
            yield from zip(*(batch[column].to_pylist() for column in texts), strict=True)

    def group(self, _row: int) -> None:
        """Every instruction is a prompt of its own."""

    def fingerprint(self) -> str:
        """`datasets` derives its own from the data; images that lie outside of that add size and time."""
        digest = hashlib.blake2b(self._table._fingerprint.encode(), digest_size=16)
        files = [file["filename"] for file in self._table.cache_files]
        for column in self.columns[:2]:
            for chunk in self._table.data.column(column).chunks:
                files += (os.path.join(self._folder, path) for path in _outside(chunk))
        for file in files:
            digest.update(file_state(file).encode())
        return digest.hexdigest()


def open_table(config: EncodeConfig, name: str) -> Table:
    """Open a Hub id, a local file or folder, or a folder with a file of metadata that names the images.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    path = _data_file(config, Path(name))
    if any((path / state).is_file() for state in ("state.json", "dataset_dict.json")):
        return _table(config, name, _load_from_disk(config, name), path)
    where: dict[str, Any] = {
        "path": name,
        "name": config.dataset.dataset_config_name,
        "revision": config.dataset.dataset_revision,
    }
    if path.is_file():
        where = {**READERS[path.suffix], "data_files": str(path)}
    where["cache_dir"] = str(config.model.cache_dir) if config.model.cache_dir else None
    folder = path.parent if path.is_file() else path
    with _explained(name):
        builder = datasets.load_dataset_builder(**where)
        split = config.dataset.split or _only_split(name, map(str, builder.as_streaming_dataset()))
    if config.dataset.streaming:
        return _keep_stream(config, name, where | {"split": split}, folder, builder)
    with _explained(name):
        loaded = datasets.load_dataset(**where, split=split)
    return _table(config, name, loaded, folder)


def _load_from_disk(config: EncodeConfig, name: str) -> Any:
    with _explained(name):
        saved = datasets.load_from_disk(name)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    split = config.dataset.split or _only_split(name, map(str, saved))
    if split not in saved:
        raise SourceError(f"{name} has no split {split}: choose one of {', '.join(map(str, saved))} with --split")
    return saved[split]


def _keep_stream(config: EncodeConfig, name: str, where: dict[str, Any], folder: Path, builder: Any) -> Table:
    """Read a stream into a local table, or open the table that an earlier run made of it."""
    with _explained(name):
        stream: Any = builder.as_streaming_dataset(split=where["split"])
        sample = next(stream.with_format("arrow").iter(GLANCE), pa.table({}))
    columns = choose(config, name, kinds_of(sample, folder))
    types = datasets.Features.from_arrow_schema(sample.select(columns).schema)
    # What these are decides whether the stream was kept before; the hash changes with the data.
    parts = {"where": where, "columns": columns, "folder": folder, "limit": config.dataset.max_train_samples}
    with _explained(name):
        kept = datasets.Dataset.from_generator(
            _stream,
            features=datasets.Features(types | dict.fromkeys(columns[:2], datasets.Value("binary"))),
            cache_dir=where["cache_dir"],
            gen_kwargs=parts | {"version": builder.hash},
            writer_batch_size=100,  # rows in memory
        )
    return Table(kept, columns, folder)


def _stream(
    where: dict[str, Any], columns: tuple[str, ...], folder: Path, limit: int | None, version: str
) -> Iterator[dict[str, Any]]:
    """The rows of a stream with the bytes of their images, read once from start to end."""
    stream: Any = datasets.load_dataset(**where, streaming=True)
    batches = stream.select_columns(list(columns)).with_format("arrow").iter(1)
    for batch in itertools.islice(batches, limit):
        row = batch.to_pylist()[0]
        yield row | {column: file_bytes(row[column], folder) for column in columns[:2]}


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


def _table(config: EncodeConfig, name: str, table: Any, folder: Path) -> Table:
    sample = table.with_format("arrow")[:GLANCE]
    return Table(table, choose(config, name, kinds_of(sample, folder)), folder)


def _data_file(config: EncodeConfig, path: Path) -> Path:
    """The file that lists the pairs of a folder, if it has one; else the path itself."""
    found = [path / name for name in METADATA if (path / name).is_file()]
    if len(found) > 1:
        raise SourceError(f"{path} has {' and '.join(file.name for file in found)}: expected one list of its pairs")
    if found and found[0].stat().st_size == 0:
        raise SourceError(f"{found[0]} is empty: expected a line for each pair, with both files and the instruction")
    if found:
        return found[0]
    if config.dataset.train_data_dir and not path.is_dir():
        raise SourceError(f"--train_data_dir {path} is not a folder")
    if config.dataset.train_data_dir:
        below = next((file.parent for name in METADATA for file in path.glob(f"*/{name}")), None)
        hint = f"give --train_data_dir {below}" if below else "a dataset's own folder goes to --dataset_name"
        raise SourceError(f"--train_data_dir {path} has no {', '.join(METADATA)} or seeds.json: {hint}")
    if path.is_file() and path.suffix not in READERS:
        raise SourceError(f"--dataset_name {path} is a file of no known kind: expected {', '.join(READERS)} or .tar")
    return path


def _only_split(name: str, splits: Iterable[str]) -> str:
    """The split that is meant without --split: train, or the only one there is."""
    names = list(splits)
    if "train" not in names and len(names) != 1:
        raise SourceError(f"{name} has no split train: choose one of {', '.join(names)} with --split")
    return "train" if "train" in names else names[0]


def _outside(images: pa.Array) -> list[str]:
    """Paths of the images of a column that are not in the table itself."""
    if pa.types.is_list(images.type) or pa.types.is_large_list(images.type):
        images = images.flatten()
    if pa.types.is_struct(images.type):
        images = images.filter(images.field("bytes").is_null()).field("path")
    strings = pa.types.is_string(images.type) or pa.types.is_large_string(images.type)
    return list(filter(None, images.to_pylist())) if strings else []


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """`datasets` raises some twenty kinds of errors, all of them about what the user named."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        raise SourceError(
            f"dataset {name} cannot be opened: {reason} "
            "(--dataset_name takes a Hub id, a folder or a file, --split one of its splits)"
        ) from None
