"""Finds what to edit: pictures and prompts from files, folders, patterns, tables and datasets."""

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..encode.base.errors import EditError
from .config import InferConfig

if TYPE_CHECKING:
    from datasets import Dataset

# Columns of the datasets that people train with; the first of each is the name for tables made for editing.
ORIGINAL = (
    "image", "input_image", "original_image", "source_image", "source_img", "src_img", "input", "image_file",
)  # fmt: skip
PROMPT = ("prompt", "edit_prompt", "instruction", "edit", "edit_instruction")
EDITED = (
    "edited_image", "target", "target_img", "edited_img", "output_image", "output", "cartoonized_image",
    "edited_file",
)  # fmt: skip


# Captions of the pair, as scores need them.
ORIGINAL_CAPTION = ("original_prompt", "original_caption", "source_caption", "input_caption")
EDITED_CAPTION = ("edited_prompt", "edited_caption", "target_caption", "output_caption")


@dataclass(frozen=True)
class Job:
    """One picture to edit, read when its turn comes.

    Attributes:
        image, target: give the bytes of an image file, and raise EditError where there are none.
        label: what reports call it.
        stem: what its outputs are named after; unique among the jobs of a run.
        path: the picture's own file, if it is one.
        captions: of the original and of the edited picture; None where there is no such column.
    """

    label: str
    stem: str
    prompt: str
    image: Callable[[], bytes]
    target: Callable[[], bytes] | None = None
    path: Path | None = None
    captions: tuple[str | None, str | None] = (None, None)


def find_jobs(config: InferConfig, captions: tuple[str | None, str | None] = (None, None)) -> list[Job]:
    """List the jobs of a run, in a stable order.

    Args:
        captions: columns with captions of originals and of edited pictures, where they have other names than
            the usual ones.

    Raises:
        EditError: nothing is there, the table cannot be read, or its columns are not told apart.
    """
    if config.inputs.table:
        return _jobs_of_table(config, config.inputs.table, captions)
    paths = [path for pattern in config.inputs.image for path in _pictures(pattern)]
    stems = _unique(path.stem for path in paths)
    return [
        Job(str(path), stem, config.inputs.prompt or "", partial(_read_file, path), path=path)
        for path, stem in zip(paths, stems, strict=True)
    ]


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


def _jobs_of_table(config: InferConfig, table: str, captions: tuple[str | None, str | None]) -> list[Job]:
    import datasets

    rows, base = _open_table(table, config.columns.split)
    if len(rows) == 0:
        raise EditError(f"--table {table} has no rows")
    image = _column(rows, ORIGINAL, "original_image_column", config.columns.original_image_column)
    target = _optional_column(rows, EDITED, "edited_image_column", config.columns.edited_image_column)
    if config.inputs.prompt is not None:
        prompts = [config.inputs.prompt] * len(rows)
    else:
        prompts = list(rows[_column(rows, PROMPT, "edit_prompt_column", config.columns.edit_prompt_column)])
    befores = _captions(rows, ORIGINAL_CAPTION, "original_caption_column", captions[0])
    afters = _captions(rows, EDITED_CAPTION, "edited_caption_column", captions[1])
    for name in filter(None, (image, target)):
        if isinstance(rows.features[name], datasets.Image):  # as bytes: a broken one must not stop the others
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return [
        Job(
            label=f"row {index}",
            stem=stem,
            prompt="" if prompt is None else str(prompt),
            image=partial(_read_cell, rows, image, index, base),
            target=partial(_read_cell, rows, target, index, base) if target else None,
            captions=(before, after),
        )
        for index, (stem, prompt, before, after) in enumerate(
            zip(_unique(_stems(rows, image)), prompts, befores, afters, strict=True)
        )
    ]


def _open_table(table: str, split: str | None) -> tuple["Dataset", Path]:
    """The rows, and the folder that paths in them start from."""
    import datasets

    path = Path(table)
    readers = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_file() and path.suffix.lower() not in readers:
        raise EditError(f"--table {table}: expected {', '.join(readers)}, or a dataset's folder or Hub id")
    try:
        if path.is_file():
            reader = readers[path.suffix.lower()]
            return datasets.load_dataset(reader, data_files=str(path), split=split or "train"), path.parent
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(table)
            found = found[split] if split and isinstance(found, dict) else found
        else:
            found = datasets.load_dataset(table, split=split)
    except Exception as error:  # whatever malformed files lead the readers to
        raise EditError(f"--table {table} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if isinstance(found, dict):
        if len(found) > 1:
            names = ", ".join(map(str, found))
            raise EditError(f"--table {table} has the splits {names}: choose one with --split")
        (found,) = found.values()
    return found, path


def _column(rows: "Dataset", known: tuple[str, ...], flag: str, chosen: str | None) -> str:
    there = ", ".join(rows.column_names)
    if chosen is not None:
        if chosen not in rows.column_names:
            raise EditError(f"--{flag} {chosen}: no such column; there are {there}")
        return chosen
    found = [name for name in known if name in rows.column_names]
    if known[0] in found or len(found) == 1:
        return found[0]
    if found:
        raise EditError(f"give --{flag}: {' and '.join(found)} could both be meant")
    raise EditError(f"give --{flag}: none is known among the columns {there}")


def _optional_column(rows: "Dataset", known: tuple[str, ...], flag: str, chosen: str | None) -> str | None:
    there = chosen or not set(known).isdisjoint(rows.column_names)
    return _column(rows, known, flag, chosen) if there else None


def _captions(rows: "Dataset", known: tuple[str, ...], flag: str, chosen: str | None) -> list[str | None]:
    """One for each row, empty where the cell is; all None where there is no such column."""
    column = _optional_column(rows, known, flag, chosen)
    return [None] * len(rows) if column is None else [str(text or "") for text in rows[column]]


def _stems(rows: "Dataset", column: str) -> Iterator[str]:
    """File names without ending, where the cells are or hold paths; else row numbers."""
    from pyarrow import types

    chunks = rows.data.column(column).chunks  # Arrow's own: names are read without the pictures beside them
    if types.is_struct(chunks[0].type) and chunks[0].type.get_field_index("path") >= 0:
        chunks = [chunk.field("path") for chunk in chunks]
    text = types.is_string(chunks[0].type) or types.is_large_string(chunks[0].type)
    names = [name for chunk in chunks for name in chunk.to_pylist()] if text else [None] * len(rows)
    return (Path(name).stem if name else f"{index:05d}" for index, name in enumerate(names))


def _unique(stems: Iterable[str]) -> list[str]:
    """Number stems that came before, ignoring case, as file systems may: a, a-2, a-3."""
    taken: set[str] = set()
    counters: dict[str, Iterator[int]] = {}
    names: list[str] = []
    for stem in stems:
        name = stem
        while name.lower() in taken:
            name = f"{stem}-{next(counters.setdefault(stem.lower(), itertools.count(2)))}"
        taken.add(name.lower())
        names.append(name)
    return names


def _read_cell(rows: "Dataset", column: str, index: int, base: Path) -> bytes:
    cell: Any = rows[column][index]
    if isinstance(cell, dict):  # an Image of datasets: bytes, or a path to them
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str) and cell:
        return _read_file(base / cell)
    if not isinstance(cell, bytes):
        raise EditError(f"no picture in column {column}")
    return cell


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EditError(f"{path} cannot be read: {error.strerror}") from None
