"""Pictures and prompts to edited pictures by the parts of a pipeline: encode, denoise under guidance, decode."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from ...encode.base.errors import EditError
from ...encode.base.files import content_key
from ...encode.data.pictures import pooled
from ..kind import SDXL
from ..models import FORCE_ZEROS
from .guidance import Guidance, Told, guided
from .mask import paste

KEPT = 16
"""Batches whose encodings are kept for the next call."""


class TooLarge(EditError):
    """There is not memory enough for the pictures that are edited at once."""


class Task(NamedTuple):
    """One picture to edit."""

    picture: Image.Image  # RGB
    prompt: str
    shares: np.ndarray | None  # of each pixel (height, width), which may change; None where all may
    size: tuple[int, int]  # width and height while it is edited
    seed: int = 0


@torch.no_grad()
def draw(
    pipeline: Any,
    tasks: Sequence[Task],
    guidance: Guidance,
    negative: str | None,
    steps: int,
    known: dict[Any, Told] | None = None,
) -> list[Image.Image]:
    """Edit pictures at once, all of one size while they are edited; each edit has its own picture's size.

    Raises:
        TooLarge: out of memory.
    """
    vae, half, size = pipeline.vae, pipeline.vae.dtype, tasks[0].size
    images = [task.picture.resize(size, Image.Resampling.LANCZOS) for task in tasks]
    generators = [torch.Generator().manual_seed(task.seed) for task in tasks]
    try:
        if half == torch.float16 and vae.config.force_upcast and type(pipeline).__name__ == SDXL:
            torch.nn.Module.to(vae, torch.float32)  # it overflows; diffusers' own `to` warns of nothing
        told = _told(pipeline, tasks, images, negative, known)
        latents = denoise(pipeline, told, guidance, generators, steps, _cells(tasks, told.image[0]))
        edited = decode(pipeline, latents)
    except torch.OutOfMemoryError:
        found = f"out of memory with {len(images)} pictures of {size[0]} x {size[1]} at once"
        raise TooLarge(f"{found}: lower --batch_size or --resolution") from None
    finally:
        torch.nn.Module.to(vae, half)
        pipeline.maybe_free_model_hooks()
    return [_finished(*both, pipeline.vae_scale_factor) for both in zip(tasks, edited, strict=True)]


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


def _told(
    pipeline: Any, tasks: Sequence[Task], images: list[Image.Image], negative: str | None, known: dict[Any, Told] | None
) -> Told:
    """What `encode` gives, now or before."""
    prompts = [task.prompt for task in tasks]
    if known is None:
        return encode(pipeline, images, prompts, negative)
    key = negative, images[0].size, *prompts, *(content_key(image.tobytes()) for image in images)
    if key not in known:
        while len(known) >= KEPT:
            del known[next(iter(known))]
        known[key] = encode(pipeline, images, prompts, negative)
    return known[key]


def denoise(
    pipeline: Any,
    told: Told,
    guidance: Guidance,
    generators: list[torch.Generator],
    steps: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Noise to latents (B, 4, h, w) of edited pictures, each with a random generator of its own, on the CPU.

    Where a mask (B, 1, h, w) is 0, they are those of the picture itself, with as much of the noise, in the first half
    of the steps, which settle what is where. Later that would bend the edges of an edit to what was there before.
    """
    image, kind, scheduler = told.image[0], told.image[0].dtype, pipeline.scheduler
    scheduler.set_timesteps(steps, device=image.device)
    random = pipeline.prepare_extra_step_kwargs(generators, 0.0)
    drawn = [torch.randn(1, *image.shape[1:], generator=generator, dtype=kind) for generator in generators]
    noise = torch.cat(drawn).to(image.device)
    latents, kept = noise * scheduler.init_noise_sigma, image
    if mask is not None and not getattr(pipeline, "is_cosxl_edit", False):  # whose condition is scaled already
        shift, scale = _range(pipeline.vae, image)
        kept = (image - shift) * scale
    for step, timestep in enumerate(pipeline.progress_bar(scheduler.timesteps)):
        if mask is not None and step < len(scheduler.timesteps) // 2:
            latents = torch.lerp(scheduler.add_noise(kept, noise, timestep[None]), latents, mask)
        noisy = scheduler.scale_model_input(latents, timestep)
        found = guided(pipeline.unet, noisy, timestep, told, guidance.at(step, len(scheduler.timesteps))).to(kind)
        latents = scheduler.step(found, timestep, latents, **random, return_dict=False)[0].to(kind)
    return latents


def decode(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents; black ones that a safety checker put in their place have `info["blacked_out"]`."""
    vae, latents, flags = pipeline.vae, latents.float(), []
    shift, scale = _range(vae, latents)
    pixels = vae.decode((latents / scale + shift).to(vae.dtype), return_dict=False)[0]
    if type(pipeline).__name__ != SDXL:
        pixels, flags = pipeline.run_safety_checker(pixels, pixels.device, pipeline.text_encoder.dtype)
    elif pipeline.watermark:
        pixels = pipeline.watermark.apply_watermark(pixels)
    black = [bool(flag) for flag in flags or [False] * len(pixels)]  # not by its looks: an edit may be black
    pictures = pipeline.image_processor.postprocess(pixels, do_denormalize=[not flag for flag in black])
    for picture, flag in zip(pictures, black, strict=True):
        picture.info |= {"blacked_out": True} if flag else {}
    return pictures


def _range(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """What is taken from the latents of a VAE before they are denoised, and what they are multiplied by then."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    shift, spread = (mean, std) if mean and std else ([0.0], [1.0])
    shift, spread = (latents.new_tensor(values).view(-1, 1, 1) for values in (shift, spread))
    return shift, vae.config.scaling_factor / spread


def _cells(tasks: Sequence[Task], latents: Tensor) -> Tensor | None:
    """Which places of latents may change, (B, 1, h, w): with or beside any pixel that may; None where all may."""
    if all(task.shares is None for task in tasks):
        return None
    size, whole = (latents.shape[2], latents.shape[3]), np.ones((1, 1), np.float32)
    shares = [pooled(whole if task.shares is None else task.shares, size, (0, 0, 1, 1)) > 0 for task in tasks]
    return max_pool2d(torch.from_numpy(np.stack(shares)[:, None]).to(latents), 3, stride=1, padding=1)


def _finished(task: Task, edited: Image.Image, factor: int) -> Image.Image:
    """The edit at the size of its picture, and the picture itself outside the mask."""
    info, edited = edited.info, edited.resize(task.picture.size, Image.Resampling.LANCZOS)
    if task.shares is not None and not info:  # a black picture of a safety checker stays one
        edited = paste(
            task.picture, edited, task.shares, max(1, factor * max(task.picture.size) // max(task.size) // 2)
        )
    edited.info = info
    return edited
