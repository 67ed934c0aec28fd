"""The starter's UNet, and its training from text to picture beside a finished autoencoder and text encoder.

What takes most of the time in learning to edit is to give back what shall stay, and a model of Stable Diffusion's size
brings far more for that than one of 7 M parameters. So while this one is trained, half of each batch is edits, of which
the picture before is given through four more input channels. These are taken away in the end: ip2p-train makes its own,
of zeros, as for any Stable Diffusion.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from fit import Data, Recipe, fit

NO_TEXT = 0.1  # share of texts replaced by the empty one
EDITS = 0.5  # share of a batch


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
    """The noise of DDPM (arXiv 2006.11239) over 1000 steps, with velocity predicted as in Stable Diffusion 2.1.

    Velocity, not epsilon: at the noisy end its error is that of the picture itself, so that a short training
    already copies what shall stay. DDPM's noise, not Stable Diffusion's: that leaves a fifteenth of the picture in
    its last step, and in small ones of flat colors a glimpse tells the tone that the text should.
    """
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",  # few steps begin where training ended: at the noisiest (arXiv 2305.08891)
    )


@torch.no_grad()
def hidden_states(text_encoder: CLIPTextModel, ids: torch.Tensor) -> torch.Tensor:
    """Of all texts at once, (N, 32, width) float32: the encoder is not trained any more."""
    return torch.cat([text_encoder(some).last_hidden_state for some in ids.split(256)])


def with_inputs(unet: Any, channels: int) -> Any:
    """A copy of the UNet with more input channels, whose weights are zero, or with fewer."""
    unet = deepcopy(unet)
    old, new = unet.conv_in, nn.Conv2d(channels, unet.conv_in.out_channels, 3, padding=1)
    nn.init.zeros_(new.weight)
    with torch.no_grad():
        common = min(channels, old.in_channels)
        new.weight[:, :common] = old.weight[:, :common]
        new.bias.copy_(old.bias)  # pyright: ignore[reportOptionalMemberAccess]
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)
    return unet


def train_unet(
    unet: Any,
    text_encoder: CLIPTextModel,
    scheduler: Any,
    data: Data,
    recipe: Recipe,
    save: Callable[[Any, dict], None],
) -> None:
    """Train the UNet on pictures and the texts of each; `save` gets the averaged one and a record, as `fit` says.

    Velocity prediction, uniform timesteps, a fresh draw of every posterior.
    """
    encoded, edits = hidden_states(text_encoder, data.ids), round(EDITS * recipe.batch_size)

    def loss(chance: random.Random) -> torch.Tensor:
        drawn = [chance.randrange(len(data.texts)) for _ in range(recipe.batch_size - edits)]
        rows = [data.known[""] if chance.random() < NO_TEXT else data.text(picture, chance) for picture in drawn]
        before, after, asked = zip(*(data.edit(chance) for _ in range(edits)), strict=True)
        latents, timesteps = data.latents([*drawn, *after]), torch.randint(0, 1000, (recipe.batch_size,))
        given = F.pad(data.originals([*before]), (0, 0) * 3 + (len(drawn), 0))  # zeros where there is none
        noise = torch.randn_like(latents)
        inputs = torch.cat([scheduler.add_noise(latents, noise, timesteps), given], 1)
        predicted = wide(
            inputs.contiguous(memory_format=torch.channels_last), timesteps, encoded[[*rows, *asked]]
        ).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timesteps))

    wide = with_inputs(unet, 8)
    fit(wide, loss, recipe, lambda average, run: save(with_inputs(average, 4), run))
