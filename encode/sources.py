"""Where pairs come from: a dataset as a sequence of (original file, edited file, instruction)."""

import difflib
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from .config import EncodeConfig
from .errors import SourceError


class Pair(NamedTuple):
    """One sample as it was found: image files as bytes, `None` where a side is missing."""

    original: bytes | None
    edited: bytes | None
    instruction: Any


class Source:
    """A `datasets.Dataset` of pairs with random access. Images stay encoded until they are asked for."""

    def __init__(self, table: datasets.Dataset, columns: tuple[str, str, str], name: str):
        self.name = name
        self.columns = columns
        for column in columns[:2]:
            if not isinstance(table.features[column], datasets.Image):
                raise SourceError(
                    f"column {column} of {name} holds {_kind(table.features[column])}, expected images; "
                    f"images are in: {_list(_image_columns(table)) or 'no column'} "
                    "(--original_image_column, --edited_image_column)"
                )
            table = table.cast_column(column, datasets.Image(decode=False))
        self._table = table.select_columns(list(columns))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Pair:
        row = self._table[index]
        original, edited, instruction = (row[column] for column in self.columns)
        return Pair(_file_bytes(original), _file_bytes(edited), instruction)

    def fingerprint(self) -> str:
        """Changes whenever the data may have changed; found without reading the images.

        `datasets` derives its own from the Arrow files; images that lie outside of those add size and time.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self._table._fingerprint, len(self), self.columns)).encode())
        for column in self.columns[:2]:
            for path in self._table.data.column(column).combine_chunks().field("path"):
                if path.is_valid and os.path.isfile(path.as_py()):
                    status = os.stat(path.as_py())
                    digest.update(f"{path.as_py()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def open_source(config: EncodeConfig) -> Source:
    """Open the dataset that the flags name.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    table, name = _load(config)
    wanted = {
        "original_image_column": config.original_image_column or "input_image",
        "edited_image_column": config.edited_image_column or "edited_image",
        "edit_prompt_column": config.edit_prompt_column or "edit_prompt",
    }
    for flag, column in wanted.items():
        if column not in table.column_names:
            near = difflib.get_close_matches(column, table.column_names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise SourceError(
                f"{name} has no column {column}{hint}; it has {_list(table.column_names)}: choose with --{flag}"
            )
    if config.max_train_samples is not None:
        table = table.select(range(min(config.max_train_samples, len(table))))
    if len(table) == 0:
        raise SourceError(f"{name} holds no samples in split {config.split}")
    return Source(table, (*wanted.values(),), name)  # type: ignore[arg-type]


def _load(config: EncodeConfig) -> tuple[datasets.Dataset, str]:
    name = config.dataset_name or str(config.train_data_dir)
    options: dict[str, Any] = {"cache_dir": str(config.cache_dir) if config.cache_dir else None}
    try:
        if config.train_data_dir is not None:
            if not config.train_data_dir.is_dir():
                raise SourceError(f"--train_data_dir {name} is not a folder")
            return datasets.load_dataset("imagefolder", data_dir=name, split=config.split, **options), name
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            if isinstance(saved, datasets.DatasetDict) and config.split not in saved:
                raise SourceError(f"{name} has no split {config.split}: choose one of {_list(saved)} with --split")
            return saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved, name
        revision = config.dataset_revision
        loaded = datasets.load_dataset(
            name, config.dataset_config_name, split=config.split, revision=revision, **options
        )
        return loaded, name
    except SourceError:
        raise
    except Exception as error:  # `datasets` raises some twenty kinds, all of them about what the user named
        reason = str(error).strip().split("\n")[0]
        raise SourceError(
            f"dataset {name} cannot be opened: {reason} "
            "(--dataset_name takes a Hub id or a folder, --split one of its splits)"
        ) from None


def _file_bytes(image: dict[str, Any] | None) -> bytes | None:
    if image is None:
        return None
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except (OSError, TypeError):
        return None


def _image_columns(table: datasets.Dataset) -> list[str]:
    return [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _list(names: Any) -> str:
    return ", ".join(names)
