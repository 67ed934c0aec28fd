"""What the demo, the longer recipe and comparisons share: the settings, and the commands from pictures to scores."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
STARTER = HERE / "starter"
AMX = bool(
    getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
)  # without it, a processor computes faster in float32


class Recipe(NamedTuple):
    """What is learned, from how many pairs, and how long."""

    kinds: tuple[str, ...]  # of edits
    scale: float  # pairs as they are drawn, as a multiple of `dataset.TRAIN`
    moved: float  # moved ones, as a multiple of `dataset.MOVED`
    steps: int  # of 16 pairs
    learning_rate: float


# Smaller batches learn more from the same pairs than larger ones, and a step of fewer is no cheaper by the pair.
BATCH = 16
# What keeps its shape is learned within minutes; what turns around, or is another person, is not.
DEMO = Recipe(("color", "hair", "skin tone"), 0.65, 0, 1500, 1.8e-3)
LONGER = Recipe(("color", "direction", "gender", "hair", "mirror", "skin tone"), 3, 3, 16000, 1.5e-3)


def run(title: str, *command: str | Path) -> None:
    """Show and run one command with this Python; leaves with its exit status if it fails."""
    words = [str(word) for word in command]
    shown = [os.path.relpath(word) if word.startswith(str(HERE)) else word for word in words]
    print(f"\n== {title}\n$ python {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    quiet = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # which show how a few small files are read
    status = subprocess.run([sys.executable, *words], env=quiet, check=False).returncode
    if status:
        raise SystemExit(status)
    print(f"-- {time.monotonic() - started:.0f} s", flush=True)


def make_pairs(recipe: Recipe, data: Path) -> None:
    """Draw the pairs into the folder `data`."""
    size = ("--scale", f"{recipe.scale:g}", "--moved", f"{recipe.moved:g}")
    run("A paired dataset from OpenMoji", HERE / "dataset.py", "--output", data, *size, "--kinds", *recipe.kinds)


def encode(data: Path, cache: Path, *flags: str | Path) -> None:
    """Encode the pairs; `flags` are further ones, of which the last one wins."""
    # No --random_flip: "make it face left" means another thing in a mirror.
    settings = ("--dataset_name", data, "--resolution", "64", "--encode_batch_size", "32", "--cache", cache)
    run("Encode it once", "-m", "ip2p.encode", "--pretrained_model_name_or_path", STARTER, *settings, *flags)


def train(recipe: Recipe, cache: Path, model: Path, seed: int, *flags: str | Path) -> None:
    """Train from the cache, or go on where this run was stopped."""
    settings = (
        *("--train_batch_size", f"{BATCH}", "--max_train_steps", f"{recipe.steps}"),
        *("--learning_rate", f"{recipe.learning_rate:g}", "--lr_scheduler", "cosine", "--lr_warmup_steps", "50"),
        *("--adam_beta2", "0.99", "--use_ema", "--edit_weight", "4", "--seed", f"{seed}", "--report_to", "none"),
        *("--resume_from_checkpoint", "auto"),
        *(("--mixed_precision", "bf16") if AMX else ()),
    )
    base = ("--pretrained_model_name_or_path", STARTER, "--cache", cache, "--output_dir", model)
    command = ("-m",) if AMX or "bf16" not in flags else (HERE / "emulated.py",)
    run("Train from the cache", *command, "ip2p.train", *base, *settings, *flags)


def edit(model: Path, data: Path, edits: Path, seed: int, *flags: str | Path) -> None:
    """Edit what is held out."""
    settings = ("--num_inference_steps", "4", "--image_guidance_scale", "1.2", "--guidance_scale", "1.75")
    places = ("--table", data, "--split", "test", "--output", edits, "--batch_size", "32", "--seed", f"{seed}")
    run("Edit held-out emoji", "-m", "ip2p.infer", "--model", model, *places, *settings, *flags)


def score(data: Path, edits: Path, output: Path) -> dict[str, dict[str, float]]:
    """Compare the edits with what was asked for: what `evaluate.scores` gives, which `output/scores.json` keeps."""
    run("Score the edits", HERE / "evaluate.py", "--data", data, "--edits", edits, "--output", output)
    return json.loads((output / "scores.json").read_text())
