"""Masks: where a picture may change while it is edited. Outside nothing does; the seam lies inside."""

from typing import TypeAlias

import numpy as np
from PIL import Image

from ...encode.data.pictures import Picture, open_mask

Mask: TypeAlias = Picture | np.ndarray
"""A picture that is white or transparent where the edit may be (see `open_mask`), or the share of each pixel."""
Masks: TypeAlias = Mask | list[Mask | None] | tuple[Mask | None, ...] | None
"""One for all pictures, or one for each; None where all of a picture may change."""


def read_mask(mask: Mask, size: tuple[int, int]) -> np.ndarray:
    """The share of each pixel that may change, float32 (height, width), for a picture of `size` (width, height).

    Raises:
        EditError: it cannot be read.
    """
    shares = mask if isinstance(mask, np.ndarray) else open_mask(mask)
    if shares.shape != size[::-1]:
        shares = np.asarray(Image.fromarray(shares).resize(size, Image.Resampling.BOX))
    return shares


def paste(picture: Image.Image, edited: Image.Image, shares: np.ndarray, seam: int) -> Image.Image:
    """The edit where it may be, else the picture, byte for byte; both mix along the edge, on `seam` pixels inside."""
    inner, weights = shares, shares.copy()
    for _ in range(1, seam):
        for _axis in range(2):  # the least of each pixel and its eight neighbors
            padded = np.pad(inner, ((1, 1), (0, 0)), mode="edge")
            inner = np.minimum(np.minimum(padded[:-2], inner), padded[2:]).T
        weights += inner
    mixed = np.asarray(picture) + (weights / seam)[..., None] * (np.asarray(edited, np.float32) - np.asarray(picture))
    return Image.fromarray(mixed.round().astype(np.uint8))
