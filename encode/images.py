"""One geometry for both images of a pair: from file bytes to square RGB arrays, in every view."""

import dataclasses
import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this size spread any number of random crops evenly over the places where one can lie."""


class ImageError(ValueError):
    """An image that cannot be used, with the reason."""


class View(NamedTuple):
    """What is seen of a pair: which of its random crops, if there are any, and whether it is flipped."""

    crop: int | None
    flip: bool

    @classmethod
    def parse(cls, name: str) -> "View":
        """The view called plain, flip, crop0, crop0-flip, ..."""
        crop = name.removesuffix("-flip").removeprefix("crop")
        return cls(int(crop) if crop.isdecimal() else None, name.endswith("flip"))

    @property
    def name(self) -> str:
        if self.crop is None:
            return "flip" if self.flip else "plain"
        return f"crop{self.crop}" + ("-flip" if self.flip else "")


def view_names(crops: int | None, flip: bool) -> list[str]:
    """The views of a pair with some number of random crops, or none, and perhaps their flips."""
    return [View(crop, f).name for f in (False, True)[: 1 + flip] for crop in (range(crops) if crops else [None])]


def joined_views(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """All views of a cache that has `old` ones and is asked for `new` ones; each crop has its flip, or none has."""
    views = [View.parse(name) for name in (*old, *new)]
    crops = max((view.crop + 1 for view in views if view.crop is not None), default=None)
    return list(dict.fromkeys([*old, *view_names(crops, any(view.flip for view in views))]))


class Crop(NamedTuple):
    """The part of an image that becomes the square."""

    box: tuple[float, float, float, float]  # left, top, right, bottom as fractions of width and height
    top: int  # of the square in the resized original, in pixels; from the right edge on if it is flipped
    left: int


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How image files become squares.

    Attributes:
        resolution: side of the square in pixels.
        resize_mode: `squash` ignores the aspect ratio, as diffusers' train_instruct_pix2pix.py does; `center_crop`
            and `random_crop` fit the short side and crop along the long one.
        background: color that shows through transparent pixels, in any of Pillow's notations.
    """

    resolution: int
    resize_mode: str
    background: str

    @classmethod
    def of(cls, encoding: dict[str, Any]) -> "Geometry":
        """The geometry of a cache, from the part `encoding` of its manifest."""
        return cls(*(encoding[field.name] for field in dataclasses.fields(cls)))

    def read(
        self, files: Sequence[bytes | None], pair: str, views: Sequence[View]
    ) -> tuple[np.ndarray, list[tuple[int, ...]]]:
        """Decode both files of a pair and show them in some views.

        The crop is chosen on the original. The edited image, should it have another shape, is cropped at the same
        fractions of its sides: as if it were brought to the original's shape first.

        Returns:
            Pixels, uint8 (views, 2, 3, resolution, resolution); and for each view the original's width and height,
            the edited image's width and height, crop top and left.

        Raises:
            ImageError: a file is missing or cannot be decoded.
        """
        images = [decode(file or b"", self.background) for file in files]
        pixels = np.empty((len(views), len(images), 3, self.resolution, self.resolution), np.uint8)
        sizes = []
        for view, both in zip(views, pixels, strict=True):
            crop = self.crop(images[0].size, pair, view)
            for image, out in zip(images, both, strict=True):
                square = self.square(image, crop)
                out[:] = square[:, :, ::-1] if view.flip else square
            sizes.append((*images[0].size, *images[1].size, crop.top, crop.left))
        return pixels, sizes

    def crop(self, size: tuple[int, int], pair: str, view: View) -> Crop:
        """Where the square lies in an original of `size` (width, height): a function of the pair's identity."""
        if self.resize_mode == "squash":
            return Crop((0, 0, 1, 1), 0, 0)
        width, height = (max(self.resolution, round(side * self.resolution / min(size))) for side in size)
        spare = width + height - 2 * self.resolution  # of the long side: the short one fits
        start = spare // 2
        if view.crop is not None:
            start = int((int(pair[:16], 16) / 2**64 + view.crop * GOLDEN) % 1 * (spare + 1))
        left, top = (start, 0) if width > height else (0, start)
        box = left / width, top / height, (left + self.resolution) / width, (top + self.resolution) / height
        return Crop(box, top, width - self.resolution - left if view.flip else left)

    def square(self, image: Image.Image, crop: Crop) -> np.ndarray:
        """Resize a part of an image with Pillow's bicubic filter, uint8 (3, resolution, resolution).

        The same, up to rounding, as to resize the whole and crop it, without the memory for a long, thin image.
        """
        left, top, right, bottom = crop.box
        box = left * image.width, top * image.height, right * image.width, bottom * image.height
        pixels = np.asarray(image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC, box))
        return pixels.transpose(2, 0, 1)


def decode(data: bytes, background: str = "white") -> Image.Image:
    """Decode an image file as it is meant to be seen: its first frame, upright by its EXIF orientation, RGB.

    Raises:
        ImageError: empty, truncated, not an image, or so large that Pillow suspects a decompression bomb.
    """
    if not data:
        raise ImageError("the image is empty")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data))
            image.load()
            return _rgb(ImageOps.exif_transpose(image), background)
    except UnidentifiedImageError:  # whose text differs each time
        raise ImageError("the image cannot be decoded (not an image file)") from None
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise ImageError(f"the image cannot be decoded ({str(error) or type(error).__name__})") from None


def _rgb(image: Image.Image, background: str) -> Image.Image:
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
