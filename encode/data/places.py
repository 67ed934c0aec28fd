"""What the name of a dataset means on this machine: a file, a list of pairs, tar files, a folder that is searched."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..base.errors import SettingsError, SourceError
from ..config import Dataset

READERS: dict[str, dict[str, Any]] = {
    ".arrow": {"path": "arrow"},
    ".csv": {"path": "csv", "keep_default_na": False},  # "None" is a word, and may be an instruction
    ".json": {"path": "json"},
    ".jsonl": {"path": "json"},
    ".parquet": {"path": "parquet"},
}
"""How `datasets` reads a file, by its ending in small letters."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SEEDS = "seeds.json"
SAVED = ("state.json", "dataset_dict.json")  # by `save_to_disk`


def name_of(dataset: Dataset) -> str:
    """What the user calls the dataset; of a url that names a place on this machine, its path."""
    name = dataset.dataset_name or str(dataset.train_data_dir)
    path = url2pathname(urlsplit(name).path) if name.startswith("file://") else ""
    return path if os.path.exists(path) else name


def in_tars(name: str) -> bool:
    """Whether a name means tar files: a file or a folder of some that is there, else a url or a pattern of such."""
    if os.path.isdir(name):
        return any(file.lower().endswith(".tar") for file in os.listdir(name))
    ending = r"\.tar$" if os.path.exists(name) else r"\.tar(?![\w.])"
    return bool(re.search(ending, name, re.IGNORECASE))


def in_seeds(name: str) -> bool:
    """Whether a name means a folder in the layout of timothybrooks/instruct-pix2pix."""
    return os.path.isfile(os.path.join(name, SEEDS))


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any(os.path.isfile(path / state) for state in SAVED)


def check_dataset(dataset: Dataset) -> None:
    """Raise SourceError for a path of this machine where nothing is; what may be an id on the Hub is none."""
    name = name_of(dataset)
    if dataset.train_data_dir and not os.path.isdir(name):
        raise SourceError(f"--train_data_dir {name} is not a folder")
    is_path = name.startswith(("/", ".", "~")) or Path(name).suffix.lower() in READERS
    if is_path and "://" not in name and not (os.path.exists(name) or in_tars(name)):
        raise SourceError(f"dataset {name} cannot be opened: nothing is there (expected a Hub id, a folder or a file)")


def data_file(dataset: Dataset, path: Path) -> Path:
    """The file that lists the pairs of a folder, if it has one; else the path itself.

    Raises:
        SourceError: nothing there can be read, or it is not clear what.
    """
    found = _listed(dataset, path)
    # What `datasets` puts in a place of such signs: of others in the name of a file it is told that they are letters.
    signs = r"::|[*?[]" if os.path.isdir(found) else "::"
    if os.path.exists(found) and (re.search(signs, str(found)) or os.path.expandvars(found) != str(found)):
        raise SourceError(f"{found}: the datasets library takes ::, *, ?, [ or $ in it for a pattern: rename it")
    return found


def _listed(dataset: Dataset, path: Path) -> Path:
    found = _lists(path)
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
        raise SourceError(f"--train_data_dir {path} has no {', '.join(METADATA)} or {SEEDS}: {hint}")
    if os.path.isfile(path) and path.suffix.lower() not in READERS:
        raise SourceError(f"{path} is a file of no known kind: expected {', '.join(READERS)} or .tar")
    return _only_file_in_capitals(path) or path


def reader_of_url(url: str) -> dict[str, Any]:
    """How `datasets` reads the file that a url names, by its ending; a `SourceError` where that says nothing."""
    ending = Path(urlsplit(url).path).suffix.lower()
    if ending not in READERS:
        kinds = f"expected one that ends in {', '.join(READERS)} or .tar; a dataset on the Hub is named OWNER/NAME"
        raise SourceError(f"{url} names no file of a known kind: {kinds}")
    return READERS[ending]


def check_place(dataset: Dataset, place: Path, flag: str, *, alone: bool = False) -> None:
    """Refuse a place for results where the next run would search for the dataset, and take them for a part of it.

    Args:
        alone: refuse one around the dataset as well, since nothing else may lie in it.

    Raises:
        SettingsError: the place is such a one.
    """
    name = name_of(dataset)
    path, data, results = Path(name), Path(name).resolve(), place.resolve()
    listed = _lists(path) or is_saved(path) or in_seeds(name) or in_tars(name)
    where = None
    if os.path.isdir(path) and not listed and results.is_relative_to(data):
        where = f"in the folder of the dataset {name}, where the next run would look for pairs"
    elif alone and os.path.exists(path) and data.is_relative_to(results):
        where = f"around the dataset {name}, and is to hold nothing else"
    if where:
        raise SettingsError(f"{flag} {place} lies {where}: name a place beside it")


def _lists(folder: Path) -> list[Path]:
    """The files of a folder that list its pairs, by their names."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ()
    return [folder / name for known in METADATA for name in names if name.lower() == known]


def _only_file_in_capitals(folder: Path) -> Path | None:
    """The only file of a folder, where its ending is in capitals, in which `datasets` does not look for it."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in READERS] if os.path.isdir(folder) else []
    capitals = [path for path in files if path.suffix not in READERS]
    if capitals and len(files) > 1:
        raise SourceError(f"{capitals[0]} would not be found in its folder: write its ending in small letters")
    return next(iter(capitals), None)
