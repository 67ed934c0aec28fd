"""Which columns hold original images, edited images and instructions: by flag, by preset, else by their names."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from accelerate import PartialState
from PIL import Image

from ..base.errors import SourceError
from ..config import EncodeConfig
from . import presets
from .presets import Preset

IMAGES, TEXT = "images", "string"
ENDING = re.compile(r"[._-](file_?name|file|path|image|img|jpe?g|png|webp|txt|json)$")


class Role(NamedTuple):
    """What a column may be needed for, and how it is recognized where neither flag nor preset names it."""

    flag: str
    what: str
    holds: str
    usual: str  # the default of diffusers' script
    names: frozenset[str]  # in lower case, without endings such as _image or .jpg


def _role(flag: str, what: str, holds: str, usual: str, names: str) -> Role:
    return Role(flag, what, holds, usual, frozenset(names.split()))


ROLES = (
    _role("original_image_column", "original images", IMAGES, "input_image", "original input source src before"),
    _role("edited_image_column", "edited images", IMAGES, "edited_image", "edited output target tgt after"),
    _role(
        "edit_prompt_column",
        "edit instructions",
        TEXT,
        "edit_prompt",
        "edit_prompt edit_instruction instruction prompt edit text txt",
    ),
    _role(
        "inverse_prompt_column",
        "instructions that lead back",
        TEXT,
        "inverse_edit",
        "inverse_edit inverse_edit_prompt inverse_prompt inverse_instruction inverse",
    ),
)


def choose(config: EncodeConfig, name: str, kinds: Mapping[str, str], preset: Preset | None = None) -> tuple[str, ...]:
    """The columns of originals, edited images, instructions, and with --reverse_pairs of the inverse ones.

    A flag wins, then the preset (of the name, unless one is given), then diffusers' default, then the only column
    that is called like that; what was guessed so is said.

    Args:
        name: the dataset.
        kinds: for each column what it holds: `IMAGES`, `TEXT` or anything else.

    Raises:
        SourceError: no such column, none or several that may be meant, or one that holds something else.
    """
    if not kinds:
        raise SourceError(f"{name} holds no samples")
    chosen, guessed = [], []
    roles = ROLES if config.dataset.reverse_pairs else ROLES[:3]
    known = preset or presets.find(name) or (None,) * len(ROLES)
    for role, usual in zip(roles, known, strict=False):
        column = getattr(config.dataset, role.flag) or next((c for c in (usual, role.usual) if c in kinds), None)
        if column is None:
            column = _guess(role, name, kinds)
            guessed.append(f"{role.what} in {column} (--{role.flag})")
        _check(role, column, name, kinds)
        chosen.append(column)
    if guessed:
        PartialState().print(f"{name}: found {', '.join(guessed)}")
    return tuple(chosen)


def kinds_of(sample: pa.Table, folder: Path) -> dict[str, str]:
    """What each column of a table holds.

    Args:
        sample: its first rows.
        folder: what paths are relative to.
    """
    return {column: _kind(sample[column].type, sample[column].to_pylist(), folder) for column in sample.column_names}


def is_image_name(name: str) -> bool:
    """Whether a file name ends as those of images do."""
    return Path(name).suffix.lower() in Image.registered_extensions()


def _guess(role: Role, name: str, kinds: Mapping[str, str]) -> str:
    found = [column for column, kind in kinds.items() if kind == role.holds and _stem(column) in role.names]
    if len(found) == 1:
        return found[0]
    how = f"may be in {_list(found)}" if found else "are in no column that is known by its name"
    raise SourceError(f"{name}: the {role.what} {how}; it has {_list(kinds)}: choose with --{role.flag}")


def _check(role: Role, column: str, name: str, kinds: Mapping[str, str]) -> None:
    if column not in kinds:
        near = difflib.get_close_matches(column, kinds, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise SourceError(f"{name} has no column {column}{hint}; it has {_list(kinds)}: choose with --{role.flag}")
    if kinds[column] != role.holds:
        fitting = _list(c for c, kind in kinds.items() if kind == role.holds)
        choice = f"choose from {fitting} with --{role.flag}" if fitting else "no column does"
        raise SourceError(f"column {column} of {name} holds {kinds[column]}, expected {role.holds}: {choice}")


def _stem(column: str) -> str:
    stem = column.lower()
    while (shorter := ENDING.sub("", stem)) != stem:
        stem = shorter
    return stem


def _kind(type_: pa.DataType, values: list, folder: Path) -> str:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return _kind(type_.value_type, [first for value in values if value for first in value[:1]], folder)
    if pa.types.is_struct(type_) and {"bytes", "path"} <= {field.name for field in type_}:
        return IMAGES
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return IMAGES
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
        return str(type_)
    value = next(filter(None, values), "")
    if is_image_name(value) or (folder / value).is_file():
        return "urls" if "://" in value else IMAGES if folder.is_dir() else "paths"
    return TEXT


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
