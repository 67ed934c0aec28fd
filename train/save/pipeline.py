"""The pipeline that a run ends with: the trained UNet among the base model's frozen parts."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open

from ...encode.models.checkpoint import Checkpoint, weight_files


def export(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, checkpoint: Checkpoint, resolution: int, output_dir: Path
) -> None:
    """Save the finished pipeline, its frozen parts in the precision in which they were found."""
    unet.register_to_config(sample_size=resolution // checkpoint.vae_scale_factor)
    make_pipeline(unet, scheduler, checkpoint, dtypes(checkpoint)).save_pretrained(output_dir)


def make_pipeline(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    checkpoint: Checkpoint,
    dtype: torch.dtype | dict[str, torch.dtype],
) -> Any:
    """The pipeline that a UNet in training belongs to, with the base model's frozen parts."""
    options: dict[str, Any] = {"unet": unet, "variant": checkpoint.variant, "dtype": dtype}
    if (folder := checkpoint.vae_folder) != checkpoint.folder / "vae":  # the cache was encoded with another VAE
        of_vae = dtype["vae"] if isinstance(dtype, dict) else dtype
        options["vae"] = AutoencoderKL.from_pretrained(folder, variant=checkpoint.variant_in(folder), dtype=of_vae)
    if checkpoint.is_sdxl:
        pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(checkpoint.folder, **options)
        # Training drops text to the encoding of "", so that is what guidance must use, not zeros.
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    else:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            checkpoint.folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options
        )
    if scheduler.config["rescale_betas_zero_snr"]:  # inference must end where training did
        changed = {name: scheduler.config[name] for name in ("rescale_betas_zero_snr", "timestep_spacing")}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    return pipeline


def dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The precision of each frozen part's weight files."""
    parts = {name: checkpoint.folder / name for name in checkpoint.text_encoders} | {"vae": checkpoint.vae_folder}
    found = {"default": torch.float32, "vae": torch.float32}
    for name, folder in parts.items():
        file = weight_files(folder, checkpoint.variant)[0]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                found[name] = opened.get_tensor(next(iter(opened.keys()))).dtype
    return found
