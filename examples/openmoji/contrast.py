"""Trains the starter's text encoder to tell pictures apart, as CLIP was: by matching texts with pictures in a batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel

from fit import Data, Recipe, fit


class Matcher(nn.Module):
    """How well texts and pictures go together: CLIP's picture side, for latents, and its projection of texts."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(4, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128 * (size // 4) ** 2, 128),
        )
        self.text = nn.Linear(width, 128, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, texts: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Scores (T, P) of texts (T, width) and latents (P, 4, size, size)."""
        one, two = F.normalize(self.text(texts), dim=1), F.normalize(self.picture(latents), dim=1)
        return self.log_scale.exp() * one @ two.T


def contrastive_loss(scores: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Cross entropy in both directions of scores (N, N) where a text may match several pictures: a bool (N, N).

    "Make it purple" is as true of every purple thing, so the wanted probability is shared among all matches
    (arXiv 2103.00020, section 2.3, with the targets of arXiv 2004.11362).
    """
    shares = matches.float()
    by_text = F.cross_entropy(scores, shares / shares.sum(1, keepdim=True))
    by_picture = F.cross_entropy(scores.T, (shares / shares.sum(0)).T)
    return (by_text + by_picture) / 2


def train_text_encoder(
    text_encoder: CLIPTextModel, data: Data, recipe: Recipe, save: Callable[[Any, dict], None]
) -> None:
    """Train the text encoder by its pooled output; `save` gets the averaged one and a record, as `fit` says.

    A batch holds several variants of each character, so that *medium* must be told from *medium-dark*.
    """
    matcher = Matcher(text_encoder.config.hidden_size, data.moments.shape[-1])
    end: Any = text_encoder.config.eos_token_id

    def loss(chance: random.Random) -> torch.Tensor:
        pictures = data.alike(recipe.batch_size, chance)
        rows = [data.text(picture, chance) for picture in pictures]
        longest = int((data.ids[rows] != end).sum(1).max()) + 1
        pooled = text_encoder(data.ids[rows, :longest]).pooler_output
        matches = torch.tensor([[row in data.texts[picture] for picture in pictures] for row in rows])
        return contrastive_loss(matcher(pooled, data.latents(pictures)).float(), matches)

    fit(text_encoder, loss, recipe, save, helper=matcher)
