"""One geometry for both images of a pair: from file bytes to RGB arrays of one of a few shapes, in every view."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .base.errors import SettingsError
from .cache.format import View
from .config import EncodeConfig
from .data.pictures import header_size, open_mask, open_picture, pooled

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this size spread any number of random crops evenly over the places where one can lie."""


class Shape(NamedTuple):
    """Sides of what is encoded, in pixels."""

    height: int
    width: int


class Crop(NamedTuple):
    """The part of an image that is shown."""

    box: tuple[float, float, float, float]  # left, top, right, bottom as fractions of width and height
    top: int  # of it in the resized original, in pixels; from the right edge on if it is flipped
    left: int


@functools.cache
def shapes(resolution: int, bucket_step: int | None) -> tuple[Shape, ...]:
    """The shapes that pictures may have, from tall to wide: the square alone without a step.

    For each side the longest other one, both multiples of the step, with no more pixels than the square and at most
    twice as long; none inside another.
    """
    if not bucket_step:
        return (Shape(resolution, resolution),)
    found: set[Shape] = set()
    for side in range(bucket_step, 2 * resolution + 1, bucket_step):
        other = min(resolution**2 // side, 2 * side) // bucket_step * bucket_step
        if 2 * other >= side:
            found |= {Shape(side, other), Shape(other, side)}
    inside = {a for a in found for b in found if a != b and a.height <= b.height and a.width <= b.width}
    return tuple(sorted(found - inside, reverse=True))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How image files become arrays of a few shapes.

    Attributes:
        resolution: side of the square in pixels; other shapes have no more pixels than that.
        resize_mode: `squash` ignores the aspect ratio, as diffusers' train_instruct_pix2pix.py does; `center_crop`
            and `random_crop` fit one side and crop along the other.
        background: color that shows through transparent pixels, in any of Pillow's notations.
        bucket_step: what sides of shapes are multiples of; None for squares alone.
    """

    resolution: int
    resize_mode: str
    background: str
    bucket_step: int | None = None

    @classmethod
    def of(cls, encoding: dict[str, Any]) -> "Geometry":
        """The geometry of a cache, from the part `encoding` of its manifest."""
        return cls(*(encoding.get(field.name) for field in dataclasses.fields(cls)))  # type: ignore[arg-type]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that pictures may have."""
        return shapes(self.resolution, self.bucket_step)

    def shape(self, size: tuple[int, int]) -> Shape:
        """The shape of nearest ratio to an original of `size` (width, height); of two, the taller one."""

        def distance(shape: Shape) -> float:  # the larger ratio over the smaller one, rounded alike on all machines
            a, b = size[0] * shape.height, size[1] * shape.width
            return max(a, b) / min(a, b)

        return min(self.shapes, key=distance)

    def planned(self, original: bytes) -> Shape:
        """The shape of a pair by the header of its original alone; that of one which tells no size does not matter."""
        found = len(self.shapes) > 1 and header_size(original)
        return self.shape(found or (1, 1))

    def cells(self, factor: int) -> tuple[int, ...]:
        """Sides of latents if all have one shape, else their largest number of cells; a VAE divides by the factor."""
        cells = [(shape.height // factor, shape.width // factor) for shape in self.shapes]
        return cells[0] if len(cells) == 1 else (max(height * width for height, width in cells),)

    def read(
        self, files: Sequence[bytes | None], pair: str, views: Sequence[View], shape: Shape | None = None
    ) -> tuple[np.ndarray, list[tuple[int, ...]]]:
        """Decode both files of a pair and show them in some views.

        The crop is chosen on the original. The edited image, should it have another shape, is cropped at the same
        fractions of its sides: as if it were brought to the original's shape first.

        Args:
            shape: what they become, which was chosen before. Default: the one nearest to the original.

        Returns:
            Pixels, uint8 (views, 2, 3, height, width); and for each view the original's width and height, the edited
            image's width and height, crop top and left; and where shapes are several, height and width.

        Raises:
            ImageError: a file is missing or cannot be decoded.
        """
        images = [open_picture(file or b"", self.background) for file in files]
        shape = shape or self.shape(images[0].size)
        pixels = np.empty((len(views), len(images), 3, *shape), np.uint8)
        sizes = []
        for view, both in zip(views, pixels, strict=True):
            crop = self.crop(images[0].size, shape, pair, view)
            for image, out in zip(images, both, strict=True):
                part = cut(image, shape, crop)
                out[:] = part[:, :, ::-1] if view.flip else part
            several = shape if len(self.shapes) > 1 else ()
            sizes.append((*images[0].size, *images[1].size, crop.top, crop.left, *several))
        return pixels, sizes

    def masks(
        self, mask: bytes | None, size: tuple[int, ...], pair: str, views: Sequence[View], shape: Shape, factor: int
    ) -> np.ndarray:
        """The share of each cell of a pair's latents that is edited, float16 (views, 1, height, width); 1 without mask.

        Args:
            size: width and height of the original, on which the crop is chosen; the mask may have others.
            factor: by which the VAE divides sides.

        Raises:
            ImageError: the mask cannot be decoded.
        """
        cells = shape.height // factor, shape.width // factor
        if mask is None:
            return np.ones((len(views), 1, *cells), np.float16)
        shares = open_mask(mask)
        boxes = (self.crop((size[0], size[1]), shape, pair, view).box for view in views)
        parts = [
            pooled(shares, cells, box)[:, :: -1 if view.flip else 1] for view, box in zip(views, boxes, strict=True)
        ]
        return np.stack(parts)[:, None].astype(np.float16)

    def crop(self, size: tuple[int, int], shape: Shape, pair: str, view: View) -> Crop:
        """Where a shape lies in an original of `size` (width, height): a function of the pair's identity."""
        if self.resize_mode == "squash":
            return Crop((0, 0, 1, 1), 0, 0)
        height, width = shape  # of the resized original, of which one side fits and the other may be longer
        wide = size[0] * height > size[1] * width
        if wide:
            width = max(width, round(size[0] * height / size[1]))
        else:
            height = max(height, round(size[1] * width / size[0]))
        spare = width + height - sum(shape)
        start = spare // 2
        if view.crop is not None:
            start = int((int(pair[:16], 16) / 2**64 + view.crop * GOLDEN) % 1 * (spare + 1))
        left, top = (start, 0) if wide else (0, start)
        box = left / width, top / height, (left + shape.width) / width, (top + shape.height) / height
        return Crop(box, top, width - shape.width - left if view.flip else left)


def cut(image: Image.Image, shape: Shape, crop: Crop) -> np.ndarray:
    """Resize a part of an image with Pillow's bicubic filter, uint8 (3, height, width).

    The same, up to rounding, as to resize the whole and crop it, without the memory for a long, thin image.
    """
    left, top, right, bottom = crop.box
    box = left * image.width, top * image.height, right * image.width, bottom * image.height
    pixels = np.asarray(image.resize((shape.width, shape.height), Image.Resampling.BICUBIC, box))
    return pixels.transpose(2, 0, 1)


def geometry_of(config: EncodeConfig) -> Geometry:
    """What the flags ask for."""
    pictures = config.pictures
    return Geometry(pictures.resolution, pictures.resizing, pictures.background, pictures.bucket_step)


def check_resolution(geometry: Geometry, factor: int) -> None:
    """Refuse a resolution that the VAE cannot divide, and steps that it, or the square, cannot be made of."""
    resolution, bucket_step = geometry.resolution, geometry.bucket_step
    if resolution % factor:
        raise SettingsError(f"--resolution {resolution}: this VAE needs a multiple of {_near(resolution, factor)}")
    if bucket_step and bucket_step % factor:
        raise SettingsError(f"--bucket_step {bucket_step}: this VAE needs a multiple of {_near(bucket_step, factor)}")
    if bucket_step and resolution % bucket_step:
        near = _near(resolution, bucket_step)
        raise SettingsError(f"--resolution {resolution}: --bucket_step needs a multiple of {near}")


def remarks(geometry: Geometry, factor: int, halvings: int) -> Iterator[str]:
    """What is said of several shapes: which they are, and whether a UNet that halves latents so often divides them."""
    if len(geometry.shapes) > 1:
        names = ", ".join(f"{shape.width} x {shape.height}" for shape in geometry.shapes)
        yield f"pictures get the nearest of {len(geometry.shapes)} shapes: {names} px"
    whole = factor * 2**halvings
    if geometry.bucket_step and geometry.bucket_step % whole:
        why = f"the UNet halves latents {halvings} times, and resizes inside what does not divide by {whole} px"
        yield f"--bucket_step {geometry.bucket_step}: {why}; a multiple of {whole} spares that"


def _near(side: int, factor: int) -> str:
    """A factor, and the multiples of it around a side."""
    lower = side // factor * factor
    return f"{factor}, such as " + (f"{lower} or {lower + factor}" if lower else str(factor))
