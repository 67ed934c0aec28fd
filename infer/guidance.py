"""Guides an InstructPix2Pix pipeline by picture and text, at every scale."""

import math
from dataclasses import dataclass

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from torch.utils.hooks import RemovableHandle

from ..encode.base.errors import EditError


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with two scales (InstructPix2Pix, arXiv 2211.09800, equation 3).

    Raises:
        EditError: a scale is out of its range.
    """

    text: float  # how closely to follow the prompt, >= 0
    image: float  # how closely to keep to the input picture, >= 0
    rescale: float = 0.0  # 0 to 1: pulls the spread of the noise back to the conditional one's (2305.08891, eq. 16)

    def __post_init__(self) -> None:
        for name, scale in (("guidance_scale", self.text), ("image_guidance_scale", self.image)):
            if not 0 <= scale < math.inf:
                raise EditError(f"{name} is {scale}, expected a number from 0 up")
        if not 0 <= self.rescale <= 1:
            raise EditError(f"guidance_rescale is {self.rescale}, expected 0 to 1")

    @property
    def changes(self) -> bool:
        """False where both scales are 1: the guided noise is then the conditional one, a single pass."""
        return not self.text == self.image == 1

    def combine(self, noise: torch.Tensor) -> torch.Tensor:
        """The guided noise (B, 4, h, w) of predictions (3B, 4, h, w) from text and picture, picture, none."""
        both, image, none = noise.chunk(3)
        guided = none + self.text * (both - image) + self.image * (image - none)
        return rescale_noise_cfg(guided, both, self.rescale) if self.rescale else guided

    def inside(self, unet: torch.nn.Module) -> RemovableHandle:
        """Let the UNet itself return the guided noise, three times over, until the handle is removed.

        The pipelines drop all guidance where the picture's scale is below 1 or the text's is at most 1, and
        only SDXL's can rescale. Their own formula adds differences of the three predictions, which are zero
        here, so that any scales that keep the three passes on will do there.
        """
        return unet.register_forward_hook(lambda _unet, _inputs, out: (self.combine(out[0]).repeat(3, 1, 1, 1),))
