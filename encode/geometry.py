"""One geometry for both images of a pair: from file bytes to square RGB arrays, in every view."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .base.errors import SettingsError
from .cache.format import View
from .data.pictures import open_picture

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this size spread any number of random crops evenly over the places where one can lie."""


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
        images = [open_picture(file or b"", self.background) for file in files]
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


def check_resolution(resolution: int, factor: int) -> None:
    """Refuse a resolution that the VAE cannot divide."""
    if resolution % factor:
        lower = resolution // factor * factor
        near = f"{lower} or {lower + factor}" if lower else str(factor)
        raise SettingsError(f"--resolution {resolution}: this VAE needs a multiple of {factor}, such as {near}")
