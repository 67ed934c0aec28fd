"""What settings of editing do for the demo's model, on held-out characters: intervals of guidance, and masks.

    python examples/openmoji/settings.py

edits what the demo holds out with guidance in some of the steps, and inside masks: where the true edit changes a
picture, and a little around. One table says how many passes of the UNet that takes and what it reaches; the accuracy is
that of the demo. Edits that were made before are kept, so whoever repeats the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
import statistics
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import load_dataset
from PIL import Image, ImageFilter

from evaluate import SEEN
from recipe import edit, score

INTERVALS = ((0.0, 1.0), (0.0, 0.8), (0.0, 0.5), (0.2, 1.0), (0.5, 1.0), (0.2, 0.8))
AROUND = 2  # pixels around what changes, which a mask leaves free, too
MEASURES = {"accuracy": 3, "psnr": 2, "inside": 2, "outside": 2, "unchanged": 2}  # with the digits that are shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("build/demo"), help="folder of the demo's model and data")
    parser.add_argument("--output", type=Path, default=Path("build/settings"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    data, masked = args.demo / "data", args.output / "data"
    if not masked.is_dir():
        with_masks(data, masked)
    settings: dict[str, tuple[Path, list[str], int]] = {}  # which pairs, how, and how many passes for each
    for low, high in INTERVALS:
        inside = round(high * args.steps) - round(low * args.steps)
        flags = ["--guidance_interval", f"{low:g}", f"{high:g}"]
        settings[f"guidance from {low:g} to {high:g}"] = data, flags, 3 * inside + args.steps - inside
    settings["guidance in no step"] = data, ["--guidance_scale", "1", "--image_guidance_scale", "1"], args.steps
    settings["inside masks"] = masked, ["--mask_column", "mask_image"], 3 * args.steps
    lines = [f"| {args.steps} steps | passes | {' | '.join(MEASURES)} |", "| --- " * (2 + len(MEASURES)) + "|"]
    for name, (pairs, flags, passes) in settings.items():
        found = []
        for seed in args.seeds:
            edits = args.output / f"{name.replace(' ', '-')}-{seed}"
            edit(args.demo / "model", pairs, edits, seed, "--num_inference_steps", f"{args.steps}", *flags)
            found.append(score(pairs, edits, edits / "scores")["all"])
        means = (f"{statistics.fmean(one[what] for one in found):.{digits}f}" for what, digits in MEASURES.items())
        lines.append(f"| {name} | {passes} | {' | '.join(means)} |")
    print("\n" + "\n".join(lines))


def with_masks(data: Path, masked: Path) -> None:
    """Copy the held-out pairs with masks, white where the true edit changes a picture, or all of it if nothing does."""
    test: Any = load_dataset(str(data), split="test")
    masks = []
    for row in test:
        before, target = (np.asarray(row[name].convert("RGB"), np.int16) for name in ("input_image", "edited_image"))
        changed = np.abs(before - target).max(2) > SEEN
        mask = Image.fromarray((255 * (changed if changed.any() else ~changed)).astype(np.uint8))
        file = io.BytesIO()
        mask.filter(ImageFilter.MaxFilter(2 * AROUND + 1)).save(file, "PNG")
        masks.append({"bytes": file.getvalue(), "path": None})
    masked.mkdir(parents=True)
    test.add_column("mask_image", masks).cast_column("mask_image", datasets.Image()).to_parquet(
        masked / "test-00000-of-00001.parquet"
    )


if __name__ == "__main__":
    main()
