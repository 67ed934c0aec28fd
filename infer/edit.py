"""Edits pictures by instruction with the InstructPix2Pix pipelines of diffusers (SD and SDXL)."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..encode.base.errors import EditError
from ..encode.data.pictures import Picture, open_picture
from .drawing.denoise import Task, draw
from .drawing.guidance import Guidance, Told
from .drawing.mask import Mask, Masks, read_mask
from .kind import check_kind
from .models import load, scheduler_like


class Editor:
    """A trained InstructPix2Pix pipeline that edits pictures, one or many, by instruction.

    >>> editor = Editor("OUT")
    >>> editor.edit("house.jpg", "make it snowy")[0].save("snowy.png")

    A picture depends on its input, prompt, seed and settings alone, whatever else is edited beside it: each
    picture has a random generator of its own, on the CPU, so the noise is the same on every device. (Matrix
    kernels may round differently at another batch size; in float32 that is about one level of 255 at most.)

    Args:
        model: folder as `ip2p-train` saves it, Hub id, or a loaded pipeline, whose device and dtype stay.
        device: "cuda", "mps", "cpu" …; default: the accelerator if there is one.
        dtype: a torch dtype or its name; default: float16 on CUDA, float32 elsewhere.
        variant: variant of the weight files, such as "fp16".
        revision: branch, tag or commit on the Hub.
        scheduler: diffusers' class name of another scheduler, "Scheduler" and case optional, such as "DDIM".
        lora: folders that `ip2p-train --lora_rank` saved, whose adapters are added to the model that is loaded, the
            one that they were trained from.
        lora_weights: what they are multiplied by; default: 1 each.
        cache_dir: where the huggingface_hub library keeps downloads.

    Attributes:
        pipeline: the diffusers pipeline underneath.
        known: what the latest batches were encoded to, for a next call with the same pictures and prompts. None, as at
            first, keeps nothing; a pipeline that is changed needs a new one.

    Raises:
        EditError: the model cannot be loaded, or is no InstructPix2Pix model; the scheduler does not fit it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | DiffusionPipeline,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        scheduler: str | None = None,
        lora: Sequence[str] = (),
        lora_weights: Sequence[float] = (),
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            place = Path(cache_dir) if cache_dir else None
            model = load(os.fspath(model), device, dtype, variant, revision, lora, lora_weights, place)
        else:
            unet = getattr(model, "unet", None)
            check_kind("the pipeline", type(model).__name__, unet and unet.config.in_channels)
        self.pipeline: DiffusionPipeline = model
        self.known: dict[Any, Told] | None = None
        if scheduler is not None:
            self.pipeline.scheduler = scheduler_like(self.pipeline.scheduler, scheduler)

    @property
    def resolution(self) -> int:
        """The long side in pixels that the UNet was trained for (`sample_size` in its configuration)."""
        size = self.pipeline.unet.config.sample_size or 64
        return (max(size) if isinstance(size, (list, tuple)) else size) * self.pipeline.vae_scale_factor

    def working_size(self, size: tuple[int, int], resolution: int | None = None) -> tuple[int, int]:
        """(width, height) at which a picture of `size` is edited.

        The long side becomes `resolution`, up or down, because the UNet is at its best at the size it was
        trained for; the aspect stays, both sides rounded to multiples of what the VAE divides by (8 for SD).
        """
        factor = self.pipeline.vae_scale_factor
        long = self.resolution if resolution is None else resolution
        if long < factor or long % factor:
            raise EditError(f"resolution {long} is not a multiple of {factor}, by which the VAE divides")
        width, height = (max(factor, round(side * long / max(size) / factor) * factor) for side in size)
        return width, height

    def edit(
        self,
        images: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
        *,
        masks: Masks = None,
        seed: int = 0,
        num_images: int = 1,
        num_inference_steps: int = 20,
        image_guidance_scale: float = 1.5,
        guidance_scale: float = 10.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | None = None,
        resolution: int | None = None,
        batch_size: int = 4,
    ) -> list[Image.Image]:
        """Edit each picture by its prompt.

        Steps and scales default to those of diffusers' InstructPix2Pix guide; the paper's are 100, 1.5 and 7.5.

        Args:
            images: picture or pictures: PIL images, paths, or bytes of image files, of any mode and size.
            prompts: instruction or instructions; a single picture or prompt goes with each of the other.
            masks: where a picture may change, white or transparent there (see `Mask`), else everywhere; one for all, or
                a list of as many as `images`. Outside, pixels stay as they are.
            seed: the k-th picture of each pair is drawn with `seed + k`.
            num_images: how many different pictures each pair gives.
            num_inference_steps: denoising steps.
            image_guidance_scale: how closely to keep to the input picture, >= 0.
            guidance_scale: how closely to follow the prompt, >= 0.
            guidance_rescale: 0 to 1, pulls back the contrast that guidance adds (arXiv 2305.08891, 3.4).
            guidance_interval: shares of the steps between which guidance acts (arXiv 2404.07724).
            negative_prompt: what to steer away from.
            resolution: long side in pixels while editing; default: `self.resolution`. See `working_size`.
            batch_size: pictures edited at once; those of one working size share a batch.

        Returns:
            `num_images` RGB pictures for each pair, of the size of its input, in the order of the pairs. Those that the
            model's safety checker put black ones in the place of have `info["blacked_out"]`.

        Raises:
            EditError: a picture cannot be read, a prompt is empty, or a setting makes no sense.
        """
        guidance = Guidance(guidance_scale, image_guidance_scale, guidance_rescale, guidance_interval)
        self._check(seed, num_images, num_inference_steps, batch_size)
        tasks = [self._task(*given, resolution) for given in _together(images, prompts, masks)]
        edited: dict[tuple[int, int], Image.Image] = {}
        for batch in _batches([task.size for task in tasks], num_images, batch_size):
            drawn = [tasks[index]._replace(seed=seed + k) for index, k in batch]
            pictures = draw(self.pipeline, drawn, guidance, negative_prompt, num_inference_steps, self.known)
            edited |= zip(batch, pictures, strict=True)
        return [edited[key] for key in sorted(edited)]

    def _task(self, image: Picture, prompt: str, mask: Mask | None, resolution: int | None) -> Task:
        picture = open_picture(image)
        shares = None if mask is None else read_mask(mask, picture.size)
        return Task(picture, prompt, shares, self.working_size(picture.size, resolution))

    def unread(self, prompt: str) -> str:
        """The end of a prompt that is longer than the text encoder reads; empty where it reads all."""
        tokenizer: Any = self.pipeline.tokenizer
        tokens, most = tokenizer(prompt).input_ids, tokenizer.model_max_length
        return tokenizer.decode(tokens[most - 1 : -1]) if len(tokens) > most else ""  # without start and end

    def _check(self, seed: int, num_images: int, steps: int, batch_size: int) -> None:
        scheduler = self.pipeline.scheduler
        most = scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise EditError(f"num_inference_steps is {steps}, expected 1 to {most}")
        try:
            scheduler.set_timesteps(steps)
        except ValueError as error:  # PNDM, for one, may need four steps
            raise EditError(f"{type(scheduler).__name__} cannot do {steps} num_inference_steps: {error}") from error
        if num_images < 1 or batch_size < 1:
            raise EditError(f"num_images is {num_images} and batch_size {batch_size}, expected at least 1")
        if not 0 <= seed <= 2**63 - num_images:
            raise EditError(f"seed is {seed}, expected 0 to 2**63 - num_images")


def _batches(sizes: Sequence[tuple[int, int]], num_images: int, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (index, k), for the k-th picture of an input; each of one size, since a batch is one tensor."""
    for _, group in itertools.groupby(sorted(range(len(sizes)), key=sizes.__getitem__), key=sizes.__getitem__):
        entries = [(index, k) for index in group for k in range(num_images)]
        yield from (entries[i : i + batch_size] for i in range(0, len(entries), batch_size))


def _together(
    images: Picture | Sequence[Picture], prompts: str | Sequence[str], masks: Masks
) -> list[tuple[Picture, str, Mask | None]]:
    pictures = [images] if isinstance(images, (Image.Image, bytes, str, os.PathLike)) else list(images)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    covers: list[Any] = list(masks) if isinstance(masks, (list, tuple)) else [masks] * len(pictures)
    if not all(text.strip() for text in texts):
        raise EditError("the prompt is empty: say what to change, such as 'make it snowy'")
    if len(covers) != len(pictures):
        raise EditError(f"{len(pictures)} pictures and {len(covers)} masks: give as many, or one mask")
    count = max(len(pictures), len(texts))
    if {len(pictures), len(texts)} - {1, count}:
        raise EditError(f"{len(pictures)} pictures and {len(texts)} prompts: give as many, or one of either")
    several = count // max(1, len(pictures))
    return list(zip(pictures * several, texts * (count // max(1, len(texts))), covers * several, strict=True))
