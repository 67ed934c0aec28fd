"""Measures how close one picture is to another, pixel by pixel."""

import math

import numpy as np
from PIL import Image

EQUAL = 60.0  # dB of equal pictures: not infinite, or one of them would make every mean so


def distances(picture: Image.Image, target: Image.Image) -> tuple[float, float]:
    """L1 and L2: mean absolute and mean squared difference of two RGB pictures, of values from 0 to 1.

    A picture of another size is resized to the target's first, as MagicBrush's evaluation does (arXiv
    2306.10012).
    """
    picture = picture.resize(target.size, Image.Resampling.BICUBIC)
    difference = (np.asarray(picture, np.float64) - np.asarray(target, np.float64)) / 255
    return float(np.abs(difference).mean()), float(np.square(difference).mean())


def psnr(picture: Image.Image, target: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures, at most `EQUAL`. Resizes as `distances`."""
    _, error = distances(picture, target)
    return min(EQUAL, -10 * math.log10(error)) if error else EQUAL
