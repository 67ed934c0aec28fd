"""Guidance by picture and text: three predictions of the UNet, and what each of them weighs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from torch import Tensor

from ...encode.base.errors import EditError


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with two scales (InstructPix2Pix, arXiv 2211.09800, equation 3).

    Raises:
        EditError: a number is out of its range.
    """

    text: float  # how closely to follow the prompt, >= 0
    image: float  # how closely to keep to the input picture, >= 0
    rescale: float = 0.0  # 0 to 1: pulls the spread of the noise back to the conditional one's (2305.08891, eq. 16)
    interval: tuple[float, float] = (0.0, 1.0)  # shares of the steps between which it guides (2404.07724)

    def __post_init__(self) -> None:
        for name, scale in (("guidance_scale", self.text), ("image_guidance_scale", self.image)):
            if not 0 <= scale < math.inf:
                raise EditError(f"{name} is {scale}, expected a number from 0 up")
        if not 0 <= self.rescale <= 1:
            raise EditError(f"guidance_rescale is {self.rescale}, expected 0 to 1")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise EditError(f"guidance_interval is {low:g} {high:g}, expected two shares from 0 to 1, the lower first")

    def at(self, step: int, steps: int) -> "Guidance":
        """What guides one of the steps, counted from 0: outside the interval nothing does, and one pass is enough."""
        low, high = (round(share * steps) for share in self.interval)
        return self if low <= step < high else Guidance(1.0, 1.0)

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the predictions from text and picture, from the picture alone, from neither; their sum is 1."""
        return self.text, self.image - self.text, 1 - self.image


class Told(NamedTuple):
    """What the UNet is told beside the noise: by text and picture, by the picture alone, by neither."""

    image: Sequence[Tensor]  # three of (B, 4, h, w), posterior mean, unscaled
    text: Sequence[Tensor]  # three of (B, 77, d)
    added: dict[str, Sequence[Tensor]]  # of SDXL, three each: pooled text (B, p), and sizes (B, 6)


def guided(unet: Any, noisy: Tensor, timestep: Tensor, told: Told, guidance: Guidance) -> Tensor:
    """The weighted sum of three predictions of noise or velocity, (B, 4, h, w) float32, in one pass of the UNet."""
    # What weighs nothing is not computed, but for what rescaling compares with.
    used = [n for n, weight in enumerate(guidance.weights) if weight or (guidance.rescale and n == 0)]

    def of(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([parts[n] for n in used])

    sample = torch.cat([of([noisy] * 3), of(told.image)], dim=1)
    added = {name: of(parts) for name, parts in told.added.items()}
    found = unet(sample, timestep, of(told.text), added_cond_kwargs=added, return_dict=False)[0]
    parts = found.float().chunk(len(used))  # since large weights of opposite signs nearly cancel out
    total = torch.stack([guidance.weights[n] * part for n, part in zip(used, parts, strict=True)]).sum(dim=0)
    return rescale_noise_cfg(total, parts[0], guidance.rescale) if guidance.rescale else total
