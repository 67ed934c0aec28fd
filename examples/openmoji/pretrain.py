"""Trains the starter's UNet and text encoder together, from text to picture, on the autoencoder's latents."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from contrast import Matcher, contrastive_loss
from vae import to_model

EMA_DECAY = 0.999
NO_TEXT = 0.1  # share of texts replaced by the empty one
NAMED = 0.5  # share of the others that name the picture; the rest are instructions that it answers
MATCHER_LEARNING_RATE = 1e-3


class Recipe(NamedTuple):
    """How one part of the training goes: with `pairs`, that many texts are matched with pictures at each step too."""

    steps: int
    batch_size: int
    learning_rate: float
    pairs: int
    seed: int


class Model(nn.Module):
    """Text encoder and UNet as one: what is trained, averaged and saved together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


class Data:
    """Pictures as latents, and the texts of each."""

    def __init__(self, vae: Any, tokenizer: CLIPTokenizer, texts: list[list[str]], pixels: torch.Tensor, seed: int):
        self.texts, self.moments, self.scale = texts, moments_of(vae, pixels), vae.config["scaling_factor"]
        self.known = {text: row for row, text in enumerate(dict.fromkeys(["", *itertools.chain(*texts)]))}
        self.ids = token_ids(tokenizer, list(self.known))
        self.rows = [{self.known[text] for text in mine} for mine in texts]  # in `ids`, of each picture
        self.chance = random.Random(seed)

    def pictures(self, count: int) -> tuple[list[int], torch.Tensor]:
        """Random pictures: their numbers, and a fresh draw of their posteriors (count, 4, h, w)."""
        chosen = torch.randint(0, len(self.moments), (count,))
        mean, logvar = self.moments[chosen].chunk(2, dim=1)
        return chosen.tolist(), (mean + (logvar / 2).exp() * torch.randn_like(mean)) * self.scale

    def words(self, picture: int, no_text: float = 0.0) -> int:
        """The row in `ids` of a text for the picture."""
        named, *answered = self.texts[picture]
        if self.chance.random() < no_text:
            return self.known[""]
        return self.known[self.chance.choice(answered) if answered and self.chance.random() > NAMED else named]


@torch.no_grad()
def moments_of(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments of uint8 pictures: (N, 8, h, w) float32, mean and log variance, unscaled."""
    return torch.cat([vae.encode(to_model(batch)).latent_dist.parameters for batch in pixels.split(32)])


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(N, 32) token ids, padded as the diffusers pipelines pad."""
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def losses(model: Model, matcher: Matcher, scheduler: Any, data: Data, recipe: Recipe) -> tuple[torch.Tensor, ...]:
    """Of one batch: the mean squared error of the predicted velocity, and the loss of the matched pairs or 0."""
    chosen, latents = data.pictures(recipe.batch_size)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    matched, pictures = data.pictures(recipe.pairs)
    rows = [data.words(picture) for picture in matched]
    ids = data.ids[[data.words(picture, NO_TEXT) for picture in chosen] + rows]
    # At sequences this short the plain attention is faster on a CPU than the fused one.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        encoded = model.text_encoder(ids)
        predicted = model.unet(noisy, timesteps, encoded.last_hidden_state[: len(chosen)]).sample
        scores = matcher(encoded.pooler_output[len(chosen) :], pictures) if matched else torch.zeros(1, 1)
    error = F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timesteps))
    matches = torch.tensor([[row in data.rows[picture] for picture in matched] for row in rows] or [[True]])
    return error, contrastive_loss(scores.float(), matches)


def pretrain(model: Model, scheduler: Any, data: Data, recipe: Recipe, save: Callable[[Model, dict], None]) -> Model:
    """Train `model` on pictures and the texts of each; returns the average over its weights.

    Velocity prediction, a fresh draw of every posterior, AdamW, cosine schedule. Every 500 steps, and
    in the end, `save` is called with the averaged weights so far and a record of the run.
    """
    torch.manual_seed(recipe.seed)
    matcher = Matcher(model.text_encoder.config.hidden_size, data.moments.shape[-1])
    model.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    average = deepcopy(model).eval()
    groups: list[dict[str, Any]] = [
        {"params": model.parameters()},
        {"params": matcher.parameters(), "lr": MATCHER_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.learning_rate, (0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, recipe.steps // 10), recipe.steps)
    started, found = time.monotonic(), []
    for step in range(1, recipe.steps + 1):
        error, mismatch = losses(model, matcher, scheduler, data, recipe)
        (error + mismatch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - decay)
        found.append((error.item(), mismatch.item()))
        if step % 100 == 0 or step == recipe.steps:
            error, mismatch = (sum(values) / len(values) for values in zip(*found[-200:], strict=True))
            seconds = time.monotonic() - started
            print(f"step {step}/{recipe.steps} loss {error:.4f}, of pairs {mismatch:.4f}, {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == recipe.steps:
            error, mismatch = (sum(values) / len(values) for values in zip(*found[-500:], strict=True))
            minutes = (time.monotonic() - started) / 60
            reached = {"steps": step, "of": recipe.steps, "loss": error, "loss_of_pairs": mismatch, "minutes": minutes}
            save(average, recipe._asdict() | reached)
    return average
