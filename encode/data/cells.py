"""Cells of Arrow tables: their values, the files that they name, and what a column may hold."""

import contextlib
import json
import textwrap
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.types as types

from ..base.errors import SampleError, explained, reason
from .columns import IMAGES, TEXT, kinds_of
from .pictures import read_file


def value_of(cell: pa.Scalar, *, parse: bool = True) -> Any:
    """What a cell holds; where the column is of JSON, since it holds several kinds, what that stands for, or its text.

    Raises:
        SampleError: text that is not UTF-8, or no JSON.
    """
    with explained(SampleError, "the table cannot be read"):
        value = cell.as_py()
    return _parsed(value, cell.type) if parse else value


def known_value(cell: pa.Scalar, *, parse: bool = True) -> Any:
    """The same, None where it cannot be read."""
    with contextlib.suppress(SampleError):
        return value_of(cell, parse=parse)
    return None


def values_of(cells: pa.Array | pa.ChunkedArray) -> list[Any]:
    """What all cells hold, None where one cannot be read."""
    if not _holds_json(cells.type):
        with contextlib.suppress(ValueError):  # of one among them; nearly always all are read at once
            return cells.to_pylist()
    return list(map(known_value, cells))


def column_kinds(column: pa.ChunkedArray, folder: Path) -> list[str]:
    """What a column may hold: by its values, or by its type where there are none; paths are relative to `folder`."""
    if found := kinds_of(values_of(column), folder):
        return found
    type_ = _of_lists(column.type)
    if is_struct(type_) or is_binary(type_):
        return [IMAGES]
    return [TEXT, IMAGES] if is_text(type_) else [str(type_)]


def file_in(image: Any) -> Any:
    """The file of an image that is given as bytes, as a path, as both, or as the first of a list of these."""
    while isinstance(image, list):
        image = image[0] if image else None
    if isinstance(image, dict) and {"bytes", "path"} <= image.keys():
        image = image["path"] if image["bytes"] is None else image["bytes"]
    return image


def file_bytes(image: Any, folder: Path) -> bytes | None:
    """The file of an image as it is; None where there is none.

    Raises:
        SampleError: it cannot be read, or what is there is no image.
    """
    file = file_in(image)
    if file is None or isinstance(file, bytes):
        return file
    if not isinstance(file, str):
        raise SampleError(f"the image is {type(file).__name__}, expected a file")
    if "://" not in file:
        return read_file(folder / file)
    try:
        with fsspec.open(file, "rb") as opened:  # in a stream
            return opened.read()  # type: ignore[union-attr]
    except FileNotFoundError:
        return None
    except Exception as error:  # each kind of place raises its own
        raise SampleError(f"a file cannot be fetched ({textwrap.shorten(reason(error), 200)})") from None


def outside(images: pa.Array) -> list[str]:
    """Paths of the images of a column that are not in the table itself."""
    while is_list(images.type):
        images = images.flatten()
    if is_binary(images.type) or (is_struct(images.type) and not images.field("bytes").null_count):
        return []
    if is_struct(images.type):
        images = images.filter(images.field("bytes").is_null())
    return [path for path in map(file_in, values_of(images)) if path and isinstance(path, str)]


def is_list(type_: pa.DataType) -> bool:
    """Whether cells are lists, of whichever kind."""
    return any(is_(type_) for is_ in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def is_struct(type_: pa.DataType) -> bool:
    """Whether cells are images as the `datasets` library holds them."""
    return types.is_struct(type_) and {"bytes", "path"} <= {field.name for field in type_}


def is_binary(type_: pa.DataType) -> bool:
    """Whether cells are bytes, of whichever kind."""
    kinds = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return any(is_(type_) for is_ in kinds)


def is_text(type_: pa.DataType) -> bool:
    """Whether cells are text, of whichever kind, or JSON."""
    kinds = types.is_string, types.is_large_string, types.is_string_view
    return isinstance(type_, pa.JsonType) or any(is_(type_) for is_ in kinds)


def _of_lists(type_: pa.DataType) -> pa.DataType:
    while is_list(type_):
        type_ = type_.value_type  # type: ignore[attr-defined]
    return type_


def _holds_json(type_: pa.DataType) -> bool:
    type_ = _of_lists(type_)
    return isinstance(type_, pa.JsonType) or (types.is_struct(type_) and any(_holds_json(part.type) for part in type_))


def _parsed(value: Any, type_: pa.DataType) -> Any:
    if isinstance(type_, pa.JsonType):
        with explained(SampleError, "the table holds JSON that cannot be read"):
            return value if value is None else json.loads(value)
    if isinstance(value, list):
        return [_parsed(each, type_.value_type) for each in value]  # type: ignore[attr-defined]
    if isinstance(value, dict) and types.is_struct(type_):
        return {part.name: _parsed(value[part.name], part.type) for part in type_}
    return value
