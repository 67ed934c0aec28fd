"""Decodes pictures of any kind as people see them: upright, RGB, 8 bits, a background behind what is transparent."""

import contextlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..base.errors import ImageError, SampleError

Picture: TypeAlias = Image.Image | bytes | str | os.PathLike[str]
UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {number: Image.Transpose[turn] for number, turn in enumerate(UPRIGHT.split(), 2)}
"""What makes a picture upright, by its orientation in EXIF."""
SIDEWAYS = {turn for number, turn in TURNS.items() if number > 4}
"""Those that make its width its height."""
WHITE_IS_KNOWN = ("PNG", "PPM")
"""Formats whose gray of more than 8 bits Pillow gives as 16 bits, whatever its mode."""


def read_file(path: str | os.PathLike[str]) -> bytes | None:
    """The content of a file of a sample; None where there is no file.

    Raises:
        SampleError: it cannot be read, or no file can have that name.
    """
    try:
        # Not a pipe or a device, from which reading may never end.
        return Path(path).read_bytes() if stat.S_ISREG(os.stat(path).st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise SampleError(f"a file cannot be read ({getattr(error, 'strerror', None) or error})") from None


def open_picture(picture: Picture, background: str = "white") -> Image.Image:
    """Decode a PIL image, the bytes of an image file or the file at a path as it is meant to be seen.

    That is its first frame, upright by its EXIF orientation, RGB, with `background` (in any of Pillow's notations)
    behind what is transparent, and nothing else that the file tells. `format` is the file's.

    Raises:
        ImageError: the file cannot be read, is empty, truncated or no image, has more than 8 bits where white is not
            known, or is so large that Pillow suspects a decompression bomb.
    """
    image = _eight_bits(picture)
    with _quiet(), _decoding():
        seen = _rgb(image, background)
    seen.info, seen.format = {}, image.format  # or its orientation would turn it once more, where it is opened again
    return seen


def open_mask(mask: Picture) -> np.ndarray:
    """Decode a mask as it is meant to be seen, float32 (height, width): the share of each pixel that is edited.

    If anything in it is transparent, that is edited, as far as it is; else what is white, as far as it is. Where
    nothing is brighter than 1 of 255, as segmentation tools write masks, 1 is white.

    Raises:
        ImageError: it cannot be decoded, as in `open_picture`.
    """
    try:
        image = _eight_bits(mask)
        with _quiet(), _decoding():
            alpha = np.asarray(image.convert("RGBA").getchannel("A")) if image.has_transparency_data else None
            gray = np.asarray(image.convert("L"))
    except ImageError as error:
        raise ImageError(f"mask: {error}") from None
    if alpha is not None and alpha.min() < 255:
        return (255 - alpha).astype(np.float32) / 255
    return gray.astype(np.float32) / (1 if gray.max() == 1 else 255)


def pooled(shares: np.ndarray, cells: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Means over the cells (rows, columns) of a part of an image (height, width), in which pixels count by their area.

    (Pillow's box filter takes pixels as a whole or not at all, by which cells of a few pixels are off by much.)

    Args:
        box: left, top, right, bottom as fractions of width and height.
    """
    weights = []
    for start, stop, pixels, count in zip(box[1::-1], box[:1:-1], shares.shape, cells, strict=True):
        edges = np.linspace(start, stop, count + 1)[:, None] * pixels
        areas = np.diff(np.clip(edges - np.arange(pixels), 0, 1), axis=0)  # (count, pixels)
        weights.append((areas / areas.sum(axis=1, keepdims=True)).astype(np.float32))
    return weights[0] @ shares @ weights[1].T


def _eight_bits(picture: Picture) -> Image.Image:
    """A picture upright and with at most 8 bits a channel, in any mode, with the format of its file."""
    if isinstance(picture, str | os.PathLike):
        try:
            picture = Path(picture).read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ImageError(f"{os.fspath(picture)} cannot be read: {why}") from None
    if not picture:
        raise ImageError("the image is empty")
    with _quiet():
        with _decoding():
            image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
            image.load()
        if 0 in image.size:
            raise ImageError("the image has no pixels")
        seen = _upright(image)
        if seen.mode.startswith("I"):
            seen = _shallow(seen, known=image.format in WHITE_IS_KNOWN)
        elif seen.mode == "F":
            raise ImageError("the image cannot be decoded (floating point pixels, expected 8 or 16 bits)")
    seen.format = image.format
    return seen


def header_size(file: bytes) -> tuple[int, int] | None:
    """Width and height of the picture in a file as its header tells them, upright; None if it tells none.

    Whoever decodes the file may find others, where its orientation stands behind the pixels or the header is wrong.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            image = Image.open(io.BytesIO(file))
        except Exception:  # as in `_decoding`
            return None
        width, height = image.size[::-1] if _turn(image) in SIDEWAYS else image.size
    return (width, height) if width and height else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what is odd in a file that can be decoded; one that may be a bomb cannot."""
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Around what Pillow does: its decoders raise whatever broken bytes lead them to."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:  # whose text differs each time
        raise ImageError("the image cannot be decoded (not an image file)") from None
    except Exception as error:
        raise ImageError(f"the image cannot be decoded ({str(error) or type(error).__name__})") from None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright, None where it is."""
    for orientation in (_orientation, _orientation_alone):
        with contextlib.suppress(Exception):  # as many kinds as there are ways to break EXIF; none costs a picture
            if (turn := TURNS.get(orientation(image) or 1)) is not None:
                return turn
    return None


def _orientation(image: Image.Image) -> Any:
    return image.getexif().get(ExifTags.Base.Orientation)


def _orientation_alone(image: Image.Image) -> int | None:
    """The same without a look at other tags, at the first of which that cannot be read Pillow ends."""
    exif = image.info["exif"].removeprefix(b"Exif\0\0")
    order = "<" if exif.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    tags = (struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * n) for n in range(count))
    return next((value for tag, *_, value in tags if tag == ExifTags.Base.Orientation), None)


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
    return image.convert("RGB")


def _shallow(image: Image.Image, *, known: bool) -> Image.Image:
    """Deep gray as 8-bit gray: Pillow would clip it to white, though it scales 16-bit color as is done here.

    Where white is not `known`, of 32 bits, the largest value tells whether 8 or 16 bits are meant.
    """
    deep = np.asarray(image)
    low, high = deep.min(initial=0), deep.max(initial=0)
    if low < 0 or high > 65535:
        found = f"32-bit pixels from {low} to {high}"
        raise ImageError(f"the image cannot be decoded ({found}, expected 8 or 16 bits)")
    shallow = image.mode == "I" and not known and high <= 255
    gray = Image.fromarray((deep if shallow else deep >> 8).astype(np.uint8))
    clear = image.info.get("transparency")  # the one value that stands for nothing there
    if clear is not None:
        gray.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return gray
