"""Trains the starter's UNet and text encoder together, from text to picture, on the autoencoder's latents."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from vae import to_model

LEARNING_RATE = 8e-4
EMA_DECAY = 0.999
NO_TEXT = 0.1  # share of texts replaced by the empty one
NAMED = 0.5  # share of the others that name the picture; the rest are instructions that it answers


class Model(nn.Module):
    """Text encoder and UNet as one: what is trained, averaged and saved together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The predicted velocity (B, 4, h, w) of noisy latents, given the texts' token ids (B, 77)."""
        return self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample


@torch.no_grad()
def moments_of(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments of uint8 pictures: (N, 8, h, w) float32, mean and log variance, unscaled."""
    return torch.cat([vae.encode(to_model(batch)).latent_dist.parameters for batch in pixels.split(32)])


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(N, 77) token ids, padded as the diffusers pipelines pad."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def pretrain(
    model: Model,
    vae: Any,
    scheduler: Any,
    tokenizer: CLIPTokenizer,
    pictures: tuple[list[list[str]], torch.Tensor],
    steps: int,
    batch_size: int,
    seed: int,
    save: Callable[[Model, dict], None],
) -> None:
    """Train `model` on uint8 pictures and the texts of each.

    Velocity prediction, a fresh draw of every posterior, AdamW, cosine schedule. Every 500 steps, and
    in the end, `save` is called with the averaged weights so far and a record of the run.
    """
    texts, pixels = pictures
    torch.manual_seed(seed)
    chance = random.Random(seed)
    known = {text: row for row, text in enumerate(dict.fromkeys(["", *itertools.chain(*texts)]))}
    moments, ids = moments_of(vae, pixels), token_ids(tokenizer, list(known))

    def words(picture: int) -> int:
        """The row in `ids` of a text for the picture."""
        named, *answered = texts[picture]
        if chance.random() < NO_TEXT:
            return known[""]
        return known[chance.choice(answered) if answered and chance.random() > NAMED else named]

    model.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    average = deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(moments), (batch_size,))
        mean, logvar = moments[chosen].chunk(2, dim=1)  # (B, 4, h, w)
        latents = (mean + (logvar / 2).exp() * torch.randn_like(mean)) * vae.config["scaling_factor"]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch_size,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps, ids[[words(picture) for picture in chosen.tolist()]])
        loss = F.mse_loss(predicted.float(), velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            recent = losses[-200:]
            seconds = time.monotonic() - started
            print(f"unet step {step}/{steps} loss {sum(recent) / len(recent):.4f} {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == steps:
            record = {"steps": step, "batch_size": batch_size, "learning_rate": LEARNING_RATE, "seed": seed}
            record["loss"] = sum(losses[-500:]) / len(losses[-500:])
            record["minutes"] = (time.monotonic() - started) / 60
            save(average, record)
