"""Decodes pictures of any kind into the RGB that models see."""

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from ..encode.base.errors import EditError

Picture: TypeAlias = Image.Image | bytes | str | os.PathLike[str]


def open_picture(picture: Picture) -> Image.Image:
    """Decode a picture as people see it: turned by its EXIF orientation, RGB, transparency over white.

    Args:
        picture: a PIL image, the bytes of an image file, or a path.

    Raises:
        EditError: the file is missing, or holds no picture that can be decoded.
    """
    try:
        if isinstance(picture, (str, os.PathLike)):
            picture = Path(picture).read_bytes()
        image = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow clips 16-bit gray at 255 instead of scaling it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise EditError(f"not a picture that can be read: {error}") from error
