"""The training loop of the starter's text encoder and UNet, and the pictures and texts that both are trained on."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from openmoji import base_of
from vae import pixels_of, to_model

EMA_DECAY = 0.999
NAMED = 0.5  # share of the texts that name the picture; the rest are instructions that it answers
ALIKE = 6  # pictures of one character that are drawn together, to be told apart


Edit = tuple[str, str, list[str]]


class Recipe(NamedTuple):
    """How one part is trained."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int


class Data:
    """Pictures as latents, the texts of each, and edits that turn one into another.

    Args:
        texts: by the picture's key.
        edits: of several kinds: the key before, the key after, and instructions.
    """

    def __init__(
        self,
        vae: Any,
        tokenizer: CLIPTokenizer,
        texts: dict[str, list[str]],
        edits: dict[str, list[Edit]] | None = None,
    ):
        every = [edit for kind in (edits or {}).values() for edit in kind]
        pictures = {
            key: row for row, key in enumerate(dict.fromkeys([*texts, *(key for edit in every for key in edit[:2])]))
        }
        self.moments, self.scale = moments_of(vae, pixels_of(list(pictures))), vae.config["scaling_factor"]
        said = itertools.chain(*texts.values(), *(instructions for _, _, instructions in every))
        self.known = {text: row for row, text in enumerate(dict.fromkeys(["", *said]))}
        self.edits = [
            [(pictures[before], pictures[after], [self.known[text] for text in said]) for before, after, said in kind]
            for kind in (edits or {}).values()
        ]
        self.ids = token_ids(tokenizer, list(self.known))
        self.texts = [[self.known[text] for text in mine] for mine in texts.values()]  # rows of `ids`, by picture
        alike: defaultdict[str, list[int]] = defaultdict(list)
        for picture, key in enumerate(texts):
            alike[base_of(key)].append(picture)
        self.characters = list(alike.values())

    def alike(self, count: int, chance: random.Random) -> list[int]:
        """Up to `count` pictures, several of each character; one with many variants comes up more often."""
        weights = [min(len(pictures), 4 * ALIKE) for pictures in self.characters]
        drawn = chance.choices(self.characters, weights, k=max(1, count // ALIKE))
        return [picture for some in drawn for picture in chance.sample(some, min(ALIKE, len(some)))]

    def latents(self, pictures: list[int]) -> torch.Tensor:
        """A fresh draw of their posteriors, (N, 4, h, w) float32, scaled."""
        mean, logvar = self.moments[pictures].chunk(2, dim=1)
        return (mean + (logvar / 2).exp() * torch.randn_like(mean)) * self.scale

    def originals(self, pictures: list[int]) -> torch.Tensor:
        """The means of their posteriors, (N, 4, h, w) float32, unscaled: how an InstructPix2Pix is shown a picture."""
        return self.moments[pictures].chunk(2, dim=1)[0]

    def edit(self, chance: random.Random) -> tuple[int, int, int]:
        """A picture, what it becomes, and the row in `ids` of what was asked for: every kind as often, and nothing."""
        if not (kind := chance.choice([*self.edits, []])):
            same = chance.randrange(len(self.texts))
            return same, same, chance.choice([self.known[""], self.text(same, chance)])
        before, after, instructions = chance.choice(kind)
        return before, after, chance.choice(instructions)

    def text(self, picture: int, chance: random.Random) -> int:
        """The row in `ids` of a text for the picture."""
        named, *answered = self.texts[picture]
        return chance.choice(answered) if answered and chance.random() > NAMED else named


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


@contextlib.contextmanager
def fast() -> Iterator[None]:
    """Compute in bfloat16 where the processor multiplies it faster; others do it twenty times slower than float32."""
    if not torch.cpu.get_capabilities().get("amx_bf16"):
        yield
        return
    # At sequences this short the plain attention is faster in bfloat16 than the fused one.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def fit(
    model: nn.Module,
    loss_of: Callable[[random.Random], torch.Tensor],
    recipe: Recipe,
    save: Callable[[Any, dict], None],
    helper: nn.Module | None = None,
) -> None:
    """Lower `loss_of`, which draws a batch for `model`: AdamW, warm-up and cosine, a moving average of the weights.

    Every 500 steps, and in the end, `save` is called with the averaged model so far and a record of the run.
    `helper` is trained beside the model, and not kept.
    """
    torch.manual_seed(recipe.seed)
    chance = random.Random(recipe.seed)
    model.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    average = deepcopy(model).eval()
    parameters = [*model.parameters(), *(helper.parameters() if helper else ())]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, (0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, recipe.steps // 10), recipe.steps)
    started, losses = time.monotonic(), []
    for step in range(1, recipe.steps + 1):
        with fast():
            loss = loss_of(chance)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, step / (step + 10))
            torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - decay)
        losses.append(loss.item())
        seconds = time.monotonic() - started
        if step % 100 == 0 or step == recipe.steps:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"{type(model).__name__} step {step}/{recipe.steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == recipe.steps:
            mean = sum(losses[-500:]) / len(losses[-500:])
            record = recipe._asdict() | {"steps": step, "of": recipe.steps, "loss": mean, "minutes": seconds / 60}
            save(average, record)
