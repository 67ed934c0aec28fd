"""Scores edits of held-out emoji: likeness to the true picture, and whether the instruction was followed."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from PIL import Image

from ip2p.encode.data.sheet import contact_sheet
from ip2p.infer.score.metrics import psnr
from openmoji import render

SEEN = 8  # of 255: by how much one of its colors differs where a pixel is changed


def ssim_distance(picture: Image.Image, target: Image.Image) -> float:
    """One minus the structural similarity of the gray pictures, over windows of 8 pixels: 0 for equal ones."""
    windows = [
        np.lib.stride_tricks.sliding_window_view(np.asarray(image.convert("L"), np.float64), (8, 8))
        for image in (picture, target)
    ]
    one, two = (window.mean((-2, -1)) for window in windows)
    variances = windows[0].var((-2, -1)) + windows[1].var((-2, -1))
    covariance = (windows[0] * windows[1]).mean((-2, -1)) - one * two
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * one * two + c1) * (2 * covariance + c2) / ((one**2 + two**2 + c1) * (variances + c2))
    return float(1 - similarity.mean())


def nearest(picture: Image.Image, candidates: Iterable[str]) -> str:
    """The key of that candidate whose picture is nearest in squared error over the pixels."""
    pixels = np.asarray(picture, np.float32)
    return min(candidates, key=lambda key: float(np.square(np.asarray(render(key, picture.width)) - pixels).mean()))


def apart(before: Image.Image, target: Image.Image, edited: Image.Image) -> dict[str, float]:
    """PSNR of an edited picture `inside` what the true edit changes, and `outside` it, over pixels of each."""
    pictures = np.stack([np.asarray(picture, np.int16) for picture in (before, target, edited)])
    changed = np.abs(pictures[0] - pictures[1]).max(2) > SEEN
    regions = {name: pictures[1:, where] for name, where in (("inside", changed), ("outside", ~changed))}
    return {
        name: psnr(*(Image.fromarray(pixels[None].astype(np.uint8)) for pixels in both))
        for name, both in regions.items()
        if both.size
    }


def measure(row: dict, edited: Image.Image) -> dict[str, float]:
    """What one edited picture scores; an instruction that asks for what is there is scored as `unchanged`."""
    before, target = row["input_image"].convert("RGB"), row["edited_image"].convert("RGB")
    if row["source"] == row["target"]:
        return {"unchanged": psnr(edited, before)}
    return {
        "psnr": psnr(edited, target),
        "psnr_original": psnr(before, target),
        **apart(before, target, edited),
        "distance": ssim_distance(edited, target),
        "distance_original": ssim_distance(before, target),
        "accuracy": float(nearest(edited, row["candidates"]) == row["target"]),
        "chance": 1 / len(row["candidates"]),
    }


def scores(rows: list[dict], edited: Sequence[Image.Image]) -> dict[str, dict[str, float]]:
    """Means of what `measure` gives, for each kind of edit and for all pairs together, with their number."""
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, picture in zip(rows, edited, strict=True):
        for name, value in measure(row, picture).items():
            found[row["kind"]][name].append(value)
            found["all"][name].append(value)
    return {
        kind: {name: float(np.mean(values)) for name, values in measured.items()} | {"pairs": len(measured["psnr"])}
        for kind, measured in sorted(found.items(), key=lambda item: (item[0] == "all", item[0]))
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """The scores as lines of text."""
    lines = ["            pairs  accuracy (chance)   PSNR (original)   1-SSIM (original)"]
    for kind, result in results.items():
        lines.append(
            "{kind:10} {pairs:6d}      {accuracy:.2f}   ({chance:.2f})   {psnr:4.1f}     ({psnr_original:4.1f})    "
            "{distance:.3f}    ({distance_original:.3f})".format(kind=kind, **result)
        )
    if "unchanged" in results["all"]:
        lines.append(f"asked for what is there already: {results['all']['unchanged']:.1f} dB from the original")
    return "\n".join(lines)


def sheet(rows: list[dict], edited: Sequence[Image.Image], each: int = 4) -> Image.Image:
    """A contact sheet of the first few pairs of each kind: original, edited, target."""
    strips = []
    for kind in sorted({row["kind"] for row in rows}):
        pairs = [(row, picture) for row, picture in zip(rows, edited, strict=True) if row["kind"] == kind]
        changed = [(row, picture) for row, picture in pairs if row["source"] != row["target"]]
        strips += [
            (row["edit_prompt"], (row["input_image"], picture, row["edited_image"])) for row, picture in changed[:each]
        ]
    return contact_sheet(strips, ("original", "edited", "target"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder that dataset.py wrote")
    parser.add_argument("--edits", type=Path, required=True, help="folder that ip2p-infer wrote: --split test of it")
    parser.add_argument("--output", type=Path, required=True, help="folder for scores.json and contact-sheet.png")
    args = parser.parse_args()
    rows: list[Any] = list(load_dataset(args.data, split="test"))
    edited = [Image.open(args.edits / f"{row:05d}.png") for row in range(len(rows))]
    results = scores(rows, edited)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "scores.json").write_text(json.dumps(results, indent=2) + "\n")
    picture = args.output / "contact-sheet.png"
    sheet(rows, edited).save(picture)
    print(table(results))


if __name__ == "__main__":
    main()
