"""What training computes: from cached moments, text and random draws to the loss.

Nothing here draws on hidden state, so that a test can hand in the draws. Everything up to the UNet's input and all
of the loss is float32: in bfloat16, `add_noise` shifts the ratio of noise to signal by a quarter at small timesteps.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ..encode.base.errors import SettingsError
from ..encode.models.checkpoint import Checkpoint
from .learning import Objective as Flags


class Batch(NamedTuple):
    """Samples as the cache holds them, on the device."""

    original: Tensor  # (B, 4, h, w) posterior mean, unscaled
    edited: Tensor  # (B, 8, h, w) posterior mean and log variance, unscaled
    text: Tensor  # (B, 77, d)
    pooled: Tensor | None = None  # (B, 1280) SDXL
    time_ids: Tensor | None = None  # (B, 6) SDXL: original height and width, crop top and left, target height and width
    mask: Tensor | None = None  # (B, 1, h, w) the share of each place that is edited, from 0 to 1


class Draws(NamedTuple):
    """All randomness of one batch."""

    posterior: Tensor  # (B, 4, h, w) standard normal: which latent of the edited image's posterior
    noise: Tensor  # (B, 4, h, w) standard normal
    timesteps: Tensor  # (B,) integers
    dropout: Tensor  # (B,) uniform in [0, 1)


class Null(NamedTuple):
    """The encoding of the empty instruction."""

    text: Tensor  # (1, 77, d)
    pooled: Tensor | None = None  # (1, 1280)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of InstructPix2Pix (arXiv 2211.09800, equation 2), and the randomness that it needs.

    The flags: `snr_gamma` is min-SNR (arXiv 2303.09556); `noise_offset` lets a model learn brightness
    (crosslabs.org/blog/diffusion-with-offset-noise); `edit_weight` is of ip2p.
    """

    scheduler: DDPMScheduler  # the base model's noise schedule and prediction type
    null: Null
    scaling_factor: float  # of the VAE's latents
    flags: Flags
    text_dtype: torch.dtype = torch.float32  # of the UNet's attention, so that not each layer casts the text anew

    def draw(self, batch: Batch, *position: int) -> Draws:
        """Draw what a batch needs, as a function of its position alone: (seed, step, micro-batch, rank)."""
        device, latents = batch.original.device, batch.original.shape
        state = np.random.SeedSequence(position).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
        draws = Draws(
            torch.randn(latents, generator=generator, device=device),
            torch.randn(latents, generator=generator, device=device),
            torch.randint(0, len(self.scheduler.alphas_cumprod), latents[:1], generator=generator, device=device),
            torch.rand(latents[:1], generator=generator, device=device),
        )
        if self.flags.noise_offset:
            shared = torch.randn((*latents[:2], 1, 1), generator=generator, device=device)
            draws = draws._replace(noise=draws.noise + self.flags.noise_offset * shared)
        return draws

    def loss(self, unet: torch.nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Mean squared error of the UNet's prediction, a float32 scalar, with the weights that the flags ask for."""
        errors = self.errors(unet, batch, draws)
        if self.flags.edit_weight != 1:
            errors = errors * edit_weights(batch, self.flags.edit_weight)
        losses = errors.flatten(1).mean(dim=1)
        if self.flags.snr_gamma is not None:
            snr = compute_snr(self.scheduler, draws.timesteps)  # (B,)
            losses = losses * (snr.clamp(max=self.flags.snr_gamma) / (snr + 1 if self.of_velocity else snr))
        return losses.mean()

    def losses(self, unet: torch.nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Mean squared error of each sample, unweighted, (B,) float32."""
        return self.errors(unet, batch, draws).flatten(1).mean(dim=1)

    def errors(self, unet: torch.nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Squared error of each number that is predicted, (B, 4, h, w) float32."""
        latents = target_latents(batch.edited, draws.posterior, self.scaling_factor)  # (B, 4, h, w)
        noisy = self.scheduler.add_noise(latents, draws.noise, draws.timesteps)  # type: ignore[arg-type]
        text, image, pooled = drop_conditioning(batch, self.null, draws.dropout, self.flags.dropout)
        added = None if pooled is None else {"text_embeds": pooled.float(), "time_ids": batch.time_ids}
        sample, text = torch.cat([noisy, image], dim=1), text.to(self.text_dtype)
        prediction = unet(sample, draws.timesteps, text, added_cond_kwargs=added, return_dict=False)[0]
        target: Any = draws.noise
        if self.of_velocity:  # arXiv 2202.00512
            target = self.scheduler.get_velocity(latents, draws.noise, draws.timesteps)  # type: ignore[arg-type]
        return (prediction.float() - target).square()

    @property
    def of_velocity(self) -> bool:
        """Whether the UNet predicts velocity; else it predicts the noise."""
        return self.scheduler.config["prediction_type"] == "v_prediction"


def noise_scheduler(flags: Flags, checkpoint: Checkpoint) -> DDPMScheduler:
    """The noise schedule that the base model was trained with, down to pure noise if that is asked for.

    Raises:
        ModelError: the model predicts neither noise nor velocity.
        SettingsError: a schedule that ends in pure noise, for a model that predicts noise: there is nothing to learn
            at its end (arXiv 2305.08891, section 3.3).
    """
    kind, zero_snr = checkpoint.prediction_type(), flags.rescale_betas_zero_snr
    if zero_snr and kind != "v_prediction":
        raise SettingsError(f"--rescale_betas_zero_snr needs a model that predicts v_prediction, this one: {kind}")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    return checkpoint.scheduler(DDPMScheduler, **options)


def target_latents(moments: Tensor, posterior: Tensor, scaling_factor: float) -> Tensor:
    """Sample the edited image's latent from its posterior and scale it, (B, 4, h, w) float32; nobody else scales."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * posterior) * scaling_factor


def edit_weights(batch: Batch, weight: float) -> Tensor:
    """Of each place in a picture, (B, 1, h, w) float32, with a mean of 1: more where the edit is, by `weight` to 1.

    The edit is where the mask says, as far as it says so. Without masks it is where the latents of the two pictures
    differ by more than they do in the root mean square, and one place around that; so it is nowhere in pictures that
    are equal, and nearly everywhere if all of it changes.
    """
    if batch.mask is None:
        changes = batch.edited.float()[:, : batch.original.shape[1]] - batch.original.float()
        size = changes.square().mean(dim=1, keepdim=True).sqrt()  # (B, 1, h, w)
        edit = size > size.square().mean(dim=(2, 3), keepdim=True).sqrt()
        edit = F.max_pool2d(edit.float(), 3, stride=1, padding=1)
    else:
        edit = batch.mask.float()
    weights = 1 + (weight - 1) * edit
    return weights / weights.mean(dim=(2, 3), keepdim=True)


def drop_conditioning(
    batch: Batch, null: Null, uniform: Tensor, dropout: tuple[float, float, float]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Conditioning dropout (InstructPix2Pix, section 3.2.1) with one uniform number per sample.

    The probabilities of dropping text alone, both, and image alone are bands of it in this order, as in diffusers.

    Returns:
        Text (B, 77, d), image (B, 4, h, w) and pooled text (B, 1280) or None, with the dropped ones replaced by the
        encoding of the empty instruction, and by zeros.
    """
    text_alone, both, image_alone = dropout
    no_text = uniform < text_alone + both  # (B,)
    no_image = (uniform >= text_alone) & (uniform < text_alone + both + image_alone)
    text = torch.where(no_text[:, None, None], null.text, batch.text)
    image = batch.original.float().masked_fill(no_image[:, None, None, None], 0)
    pooled, empty = batch.pooled, null.pooled
    if pooled is not None and empty is not None:
        pooled = torch.where(no_text[:, None], empty, pooled)
    return text, image, pooled
