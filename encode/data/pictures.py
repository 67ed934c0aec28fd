"""Decodes pictures of any kind as people see them: upright, RGB, 8 bits, a background behind what is transparent."""

import io
import os
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..base.errors import ImageError

Picture: TypeAlias = Image.Image | bytes | str | os.PathLike[str]


def open_picture(picture: Picture, background: str = "white") -> Image.Image:
    """Decode a PIL image, the bytes of an image file or the file at a path as it is meant to be seen.

    That is its first frame, upright by its EXIF orientation, RGB, with `background` (in any of Pillow's notations)
    behind what is transparent. `format` tells the file's.

    Raises:
        ImageError: the file cannot be read, is empty, truncated or no image, has more than 8 bits where white is not
            known, or is so large that Pillow suspects a decompression bomb.
    """
    if isinstance(picture, str | os.PathLike):
        try:
            picture = Path(picture).read_bytes()
        except OSError as error:
            raise ImageError(f"{os.fspath(picture)} cannot be read: {error.strerror}") from None
    if not picture:
        raise ImageError("the image is empty")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
            image.load()
            seen = _rgb(image, background)
    except UnidentifiedImageError:  # whose text differs each time
        raise ImageError("the image cannot be decoded (not an image file)") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise ImageError(f"the image cannot be decoded ({str(error) or type(error).__name__})") from None
    seen.format = image.format
    return seen


def _rgb(image: Image.Image, background: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError("floating point pixels, expected 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray as 8-bit gray: Pillow would clip it to white, though it scales 16-bit color as is done here."""
    deep = np.asarray(image)
    if deep.min() < 0 or deep.max() > 65535:
        raise ImageError("32-bit pixels, expected 8 or 16 bits")
    gray = Image.fromarray((deep >> 8).astype(np.uint8))
    clear = image.info.get("transparency")  # the one value that stands for nothing there
    if clear is not None:
        gray.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    return gray
