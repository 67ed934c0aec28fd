"""One geometry for both images of a pair: from file bytes to a square RGB array."""

import io

import numpy as np
from PIL import Image, ImageOps

BACKGROUND = "white"
"""What shows through transparent pixels. Part of the cache's identity."""


class ImageError(ValueError):
    """An image that cannot be used, with the reason."""


def decode(data: bytes) -> Image.Image:
    """Decode an image file as it is meant to be seen: upright by its EXIF orientation, RGB, over `BACKGROUND`.

    Raises:
        ImageError: empty, truncated, not an image, or so large that Pillow suspects a decompression bomb.
    """
    if not data:
        raise ImageError("the image is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"the image cannot be decoded ({error})") from None
    return _rgb(upright)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip it to white instead of scaling it
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, BACKGROUND), layer).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, resolution: int, resize_mode: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize to `resolution` with PIL's bicubic filter, as diffusers' train_instruct_pix2pix.py does.

    `squash` ignores the aspect ratio (diffusers' behavior); `center_crop` fits the short side and crops the middle.

    Returns:
        Pixels, uint8 (3, resolution, resolution), and the (top, left) of the crop in the resized image.
    """
    if resize_mode == "squash":
        size, top, left = (resolution, resolution), 0, 0
    else:
        scale = resolution / min(image.size)
        size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
        top, left = (size[1] - resolution) // 2, (size[0] - resolution) // 2
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))  # (height, width, 3)
    pixels = pixels[top : top + resolution, left : left + resolution]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), (top, left)
