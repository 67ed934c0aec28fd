"""Guides an InstructPix2Pix pipeline by picture and text, at every scale."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..encode.base.errors import EditError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with two scales (InstructPix2Pix, arXiv 2211.09800, equation 3).

    Attributes:
        text: how closely to follow the prompt, >= 0.
        image: how closely to keep to the input picture, >= 0.
        rescale: 0 to 1, how far to pull the spread of the guided noise back to that of the conditional one
            (arXiv 2305.08891, equation 16).

    Raises:
        EditError: a scale is out of its range.
    """

    text: float
    image: float
    rescale: float = 0.0

    def __post_init__(self) -> None:
        for name, scale in (("guidance_scale", self.text), ("image_guidance_scale", self.image)):
            if not (math.isfinite(scale) and scale >= 0):
                raise EditError(f"{name} is {scale}, expected a number from 0 up")
        if not 0 <= self.rescale <= 1:
            raise EditError(f"guidance_rescale is {self.rescale}, expected 0 to 1")

    @property
    def changes(self) -> bool:
        """False where both scales are 1: the guided noise is then the conditional one, a single pass."""
        return not self.text == self.image == 1

    def combine(self, noise: torch.Tensor) -> torch.Tensor:
        """The guided noise (B, 4, h, w) of predictions (3B, 4, h, w) from text and picture, picture, none."""
        from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl as sdxl

        both, image, none = noise.chunk(3)
        guided = none + self.text * (both - image) + self.image * (image - none)
        return sdxl.rescale_noise_cfg(guided, both, self.rescale) if self.rescale else guided

    @contextlib.contextmanager
    def inside(self, unet: torch.nn.Module) -> Iterator[None]:
        """Let the UNet itself return the guided noise, three times over.

        The pipelines drop all guidance where the picture's scale is below 1 or the text's is at most 1, and
        only SDXL's can rescale. Their own formula adds differences of the three predictions, which are zero
        here, so that any scales that keep the three passes on will do there.
        """

        def hook(_module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (self.combine(output[0]).repeat(3, 1, 1, 1),)

        handle = unet.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
