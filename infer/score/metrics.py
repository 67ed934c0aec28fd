"""Scores edited pictures by the definitions of MagicBrush and of the InstructPix2Pix paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

# CLIP and DINO are imported where they are loaded: for PSNR alone nobody shall wait for them.
if TYPE_CHECKING:
    from ...encode.models.judge import Judge

EQUAL = 60.0  # dB of equal pictures: not infinite, or one of them would make every mean so


@dataclass(frozen=True)
class Edit:
    """An edited picture, and what it is compared with."""

    original: Image.Image
    edited: Image.Image
    target: Image.Image | None = None  # the dataset's own edit
    captions: tuple[str | None, str | None] = (None, None)  # of the original and of the target


def measure(judge: "Judge | None", edits: Sequence[Edit]) -> list[dict[str, float]]:
    """The scores of each edit; those that need what all of `edits` lack are left out, or a model that `judge` lacks.

    Against the target, as MagicBrush does (arXiv 2306.10012, section 4.1 and `evaluation/image_eval.py`):

    - `l1`, `l2`: mean absolute and squared difference of values from 0 to 1; `psnr`: the latter in dB.
    - `clip_i`, `dino`: cosine similarity of the two pictures' embeddings by CLIP and by DINO.

    Against the original and the captions: `clip_t`, `clip_direction` and `clip_image`, as `Judge.compare` defines them.
    """
    scores: dict[str, Sequence[float]] = {}
    targets = [edit.target for edit in edits if edit.target is not None]
    if targets:
        pairs = [(edit.edited, target) for edit, target in zip(edits, targets, strict=True)]
        scores["l1"], scores["l2"] = zip(*(distances(*pair) for pair in pairs), strict=True)
        scores["psnr"] = [psnr(*pair) for pair in pairs]
    if judge:
        scores |= _embedded(judge, edits, targets)
    return [dict(zip(scores, values, strict=True)) for values in zip(*scores.values(), strict=True)]


def _embedded(judge: "Judge", edits: Sequence[Edit], targets: Sequence[Image.Image]) -> dict[str, list[float]]:
    """Those of the scores that compare what CLIP and DINO make of pictures and captions."""
    scores = dict[str, list[float]]()
    edited = judge.see([edit.edited for edit in edits])
    if targets:
        scores["clip_i"] = judge.similarity(edited, judge.see(targets))
        if judge.dino:
            scores["dino"] = judge.similarity(judge.see_dino([edit.edited for edit in edits]), judge.see_dino(targets))
    compared = judge.compare(judge.see([edit.original for edit in edits]), edited, [edit.captions for edit in edits])
    told = {name: [value for value in values if value is not None] for name, values in compared.items()}
    return scores | {name: values for name, values in told.items() if values}


def distances(picture: Image.Image, target: Image.Image) -> tuple[float, float]:
    """L1 and L2: mean absolute and mean squared difference of two RGB pictures, of values from 0 to 1.

    A picture of another size is resized to the target's first, as MagicBrush's evaluation does.
    """
    picture = picture.resize(target.size, Image.Resampling.BICUBIC)
    difference = (np.asarray(picture, np.float64) - np.asarray(target, np.float64)) / 255
    return float(np.abs(difference).mean()), float(np.square(difference).mean())


def psnr(picture: Image.Image, target: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB pictures, at most `EQUAL`. Resizes as `distances`."""
    _, error = distances(picture, target)
    return min(EQUAL, -10 * math.log10(error)) if error else EQUAL
