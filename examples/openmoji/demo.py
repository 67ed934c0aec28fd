"""Runs the three commands on OpenMoji, from the starter checkpoint to scores and a contact sheet: `make demo`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def run(title: str, *command: str | Path) -> None:
    """Show and run one command with this Python; leaves with its exit status if it fails."""
    words = [str(word) for word in command]
    print(f"\n== {title}\n$ python {shlex.join(words)}", flush=True)
    started = time.monotonic()
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}  # it warns of image processors that nobody asked for
    status = subprocess.run([sys.executable, *words], check=False, env=quiet).returncode
    if status:
        raise SystemExit(status)
    print(f"-- {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for everything")
    parser.add_argument("--pretrained_model_name_or_path", default=HERE / "starter", help="what to start from")
    parser.add_argument("--max_train_steps", default="1700")
    parser.add_argument("--train_batch_size", default="32")
    parser.add_argument("--learning_rate", default="2.5e-3")
    parser.add_argument("--scale", default="1", help="how many times 7,000 pairs to train on (default 1)")
    parser.add_argument("--moved", default="0", help="how many times 7,000 moved ones to add (default 0)")
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    data, cache, model = (args.output / name for name in ("data", "cache", "model"))
    started = time.monotonic()

    size = ("--scale", args.scale, "--moved", args.moved)
    run("A paired dataset from OpenMoji", HERE / "dataset.py", "--output", data, *size)
    base = ("--pretrained_model_name_or_path", args.pretrained_model_name_or_path)
    # No --random_flip: "make it face left" means another thing in a mirror.
    encode = ("--dataset_name", data, "--resolution", "64", "--encode_batch_size", "32", "--cache", cache)
    run("Encode it once", "-m", "ip2p.encode", *base, *encode)
    settings = (
        *("--train_batch_size", args.train_batch_size, "--max_train_steps", args.max_train_steps),
        *("--learning_rate", args.learning_rate, "--lr_scheduler", "cosine", "--lr_warmup_steps", "50"),
        *("--adam_beta2", "0.99", "--use_ema", "--seed", args.seed, "--report_to", "none"),
        *(("--mixed_precision", "bf16") if torch.cpu.get_capabilities().get("amx_bf16") else ()),
    )
    run("Train from the cache", "-m", "ip2p.train", *base, "--cache", cache, "--output_dir", model, *settings)
    edit = ("--model", model, "--num_inference_steps", "5", "--image_guidance_scale", "1.2", "--guidance_scale", "2")
    shown = ("--output", args.output / "edits", "--sheet", args.output / "edits.png", "--seed", args.seed)
    run("Edit held-out emoji", "-m", "ip2p.infer", *edit, "--table", data, "--split", "test[:12]", *shown)
    scored = ("--data", data, "--output", args.output, "--seed", args.seed)
    run("Score edits of held-out emoji", HERE / "evaluate.py", *edit, *scored)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Everything is in {args.output}.")
    print(f"Look at {args.output / 'contact-sheet.png'}: original, edited, target.")


if __name__ == "__main__":
    main()
