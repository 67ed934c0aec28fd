"""Trains the starter's autoencoder on the emoji that are not held out, and measures it on those that are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup

from openmoji import render

SIZE = 64
KL_WEIGHT = 1e-4  # per latent number, beside a squared error per pixel
EMA_DECAY = 0.998
SCHEDULE = 7500  # steps of the cosine; the averaged weights are good long before its end
LEARNING_RATE = 1e-3


def new_vae() -> Any:
    """An untrained autoencoder of 2.6 M parameters: (B, 3, 64, 64) in [-1, 1] to 4 x 16 x 16 latents and back."""
    channels = (16, 64, 128)
    settings: dict[str, Any] = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": SIZE,
    }
    vae: Any = AutoencoderKL(**settings)
    # Narrow posteriors at first: under unit noise the decoder learns to ignore the latents.
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6.0
    return vae


def pixels_of(keys: Sequence[str], size: int = SIZE) -> torch.Tensor:
    """The renders of the emoji `keys` as (N, 3, size, size) uint8."""
    pixels = np.stack([np.asarray(render(key, size)) for key in keys])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in [-1, 1], laid out channels last."""
    return (pixels.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def augmented(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture flipped, moved by up to 4 pixels and with its color channels exchanged, at random."""
    out = []
    for picture in pixels:
        flip, swap = torch.rand(2, generator=generator).tolist()
        if flip < 0.5:
            picture = picture.flip(-1)
        if swap < 0.2:
            picture = picture[torch.randperm(3, generator=generator)]
        top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
        padded = F.pad(picture, (4, 4, 4, 4), value=255)
        out.append(padded[:, top : top + picture.shape[1], left : left + picture.shape[2]])
    return torch.stack(out)


@torch.no_grad()
def psnr(vae: Any, pixels: torch.Tensor) -> float:
    """Mean PSNR in dB over pictures, each encoded to its mode, decoded, clipped, on a scale of [0, 1]."""
    values = []
    for batch in pixels.split(32):
        images = to_model(batch)
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((decoded - images) / 2).square().flatten(1).mean(1)
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()


@torch.no_grad()
def latent_std(vae: Any, pixels: torch.Tensor) -> float:
    """The standard deviation of all posterior means over the pictures."""
    return torch.cat([vae.encode(to_model(batch)).latent_dist.mean for batch in pixels.split(32)]).std().item()


def train_vae(train: torch.Tensor, held_out: torch.Tensor, steps: int, batch_size: int, seed: int, save: Path) -> dict:
    """Train an autoencoder on uint8 pictures (N, 3, 64, 64) and save it; returns a record of the run.

    Squared error and a small Kullback-Leibler term, AdamW, cosine schedule; the averaged weights so far are saved
    in `save` every 1000 steps. The scaling factor is one over the standard deviation of the training latents.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    average = deepcopy(vae).eval()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps // 10), SCHEDULE)
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(train), (batch_size,), generator=generator)
        images = to_model(augmented(train[chosen], generator))  # (B, 3, 64, 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(torch.cpu.get_capabilities().get("amx_bf16"))):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(decoded.float(), images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (loss + KL_WEIGHT * min(1, step / (0.3 * SCHEDULE)) * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            for mine, theirs in zip(average.parameters(), vae.parameters(), strict=True):
                mine.lerp_(theirs, 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            seconds = time.monotonic() - started
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"vae step {step}/{steps} loss {mean:.5f} kl {kl.item():.2f} {seconds:.0f} s", flush=True)
        if step % 1000 == 0 or step == steps:
            average.register_to_config(scaling_factor=1 / latent_std(average, train[::8]))
            average.save_pretrained(save)
            print(f"vae step {step}: held-out PSNR {psnr(average, held_out[::4]):.2f} dB", flush=True)
    record = {"steps": steps, "batch_size": batch_size, "learning_rate": LEARNING_RATE, "seed": seed}
    return record | {
        "loss": sum(losses[-500:]) / len(losses[-500:]),
        "minutes": (time.monotonic() - started) / 60,
    }
