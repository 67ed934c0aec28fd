"""Pictures and prompts to edited pictures by the parts of a pipeline: encode, denoise under guidance, decode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from PIL import Image
from torch import Tensor

from ..encode.base.errors import EditError
from .models import FORCE_ZEROS, SDXL


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


def encode(pipeline: Any, images: list[Image.Image], prompts: list[str], negative: str | None) -> Told:
    """Encode B pictures of one size, and their prompts."""
    count, device, (width, height) = len(images), pipeline._execution_device, images[0].size
    if type(pipeline).__name__ == SDXL:
        # Where it is configured so, no negative prompt means zeros; else it wants a list beside the list of prompts.
        nothing = None if negative is None and pipeline.config[FORCE_ZEROS] else [negative or ""] * count
        text, none, pooled, no = pipeline.encode_prompt(prompts, device=device, negative_prompt=nothing)
        sizes = text.new_tensor([[height, width, 0, 0, height, width]] * count)
        texts, added = (text, none, none), {"text_embeds": (pooled, no, no), "time_ids": (sizes,) * 3}
    else:
        texts, added = pipeline._encode_prompt(prompts, device, 1, True, [negative or ""] * count).chunk(3), {}
    pixels, kind = pipeline.image_processor.preprocess(images), pipeline.vae.dtype
    image = pipeline.prepare_image_latents(pixels, count, 1, kind, device, False).to(texts[0].dtype)
    return Told((image, image, torch.zeros_like(image)), texts, added)


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


def denoise(pipeline: Any, told: Told, guidance: Guidance, generators: list[torch.Generator], steps: int) -> Tensor:
    """Noise to latents (B, 4, h, w) of edited pictures, each with a random generator of its own, on the CPU."""
    image, kind, scheduler = told.image[0], told.image[0].dtype, pipeline.scheduler
    scheduler.set_timesteps(steps, device=image.device)
    random = pipeline.prepare_extra_step_kwargs(generators, 0.0)
    drawn = [torch.randn(1, *image.shape[1:], generator=generator, dtype=kind) for generator in generators]
    latents = torch.cat(drawn).to(image.device) * scheduler.init_noise_sigma
    for step, timestep in enumerate(pipeline.progress_bar(scheduler.timesteps)):
        noisy = scheduler.scale_model_input(latents, timestep)
        found = guided(pipeline.unet, noisy, timestep, told, guidance.at(step, len(scheduler.timesteps))).to(kind)
        latents = scheduler.step(found, timestep, latents, **random, return_dict=False)[0].to(kind)
    return latents


def decode(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents; black ones that a safety checker put in their place have `info["blacked_out"]`."""
    vae, latents, flags = pipeline.vae, latents.float() / pipeline.vae.config.scaling_factor, []
    mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean and std:
        latents = latents * latents.new_tensor(std).view(-1, 1, 1) + latents.new_tensor(mean).view(-1, 1, 1)
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    if type(pipeline).__name__ != SDXL:
        pixels, flags = pipeline.run_safety_checker(pixels, pixels.device, pipeline.text_encoder.dtype)
    elif pipeline.watermark:
        pixels = pipeline.watermark.apply_watermark(pixels)
    black = [bool(flag) for flag in flags or [False] * len(pixels)]  # not by its looks: an edit may be black
    pictures = pipeline.image_processor.postprocess(pixels, do_denormalize=[not flag for flag in black])
    for picture, flag in zip(pictures, black, strict=True):
        picture.info |= {"blacked_out": True} if flag else {}
    return pictures
