"""Measures how close one picture is to another."""

import math

import numpy as np
from PIL import Image


def psnr(picture: Image.Image, target: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures; infinite for equal ones.

    A picture of another size is resized to the target's first, as MagicBrush's evaluation does.
    """
    picture = picture.resize(target.size, Image.Resampling.LANCZOS)
    error = np.mean((np.asarray(picture, np.float64) - np.asarray(target, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
