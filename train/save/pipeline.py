"""What a run ends with: a pipeline of the trained UNet and the base model's frozen parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from ...encode.base.errors import TrainError, explained
from ...encode.cache.format import Cache
from ...encode.models.checkpoint import Checkpoint
from ...encode.models.weights import dtype_of, not_finite
from ..config import TrainConfig
from ..unet.load import load_unet
from ..unet.lora import add_adapters, save_adapters
from ..unet.weights import Weights


def finished(
    config: TrainConfig, checkpoint: Checkpoint, unet: Any, weights: Weights, average: Sequence[Tensor] | None
) -> Any:
    """A UNet of a run as it is saved: with an average of its weights if one is given, and adapters beside the base in
    full precision.

    Weights have all the digits with which they are trained, and lie where they lay; the run's own UNet may go on.
    Raises TrainError where numbers are not finite.
    """
    trained = weights.trained(average)
    if config.lora.lora_rank:
        unet = load_unet(config, checkpoint)  # the base as it is, not in half precision
        add_adapters(unet, config.lora)
        Weights(unet).load_state_dict(trained)
    else:
        state = unet.state_dict() | trained
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet.config)
        unet.load_state_dict(state, assign=True)
    if name := not_finite(unet.state_dict()):
        raise TrainError(
            f"no pipeline is saved: numbers of the UNet are not finite, the first in {name}. Resume from a "
            "checkpoint that was saved before that, with a smaller --learning_rate"
        )
    return unet


def export(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, checkpoint: Checkpoint, cache: Cache, output_dir: Path
) -> None:
    """Save a pipeline, its frozen parts in the precision in which they were found.

    Adapters, if there are any, are saved for themselves and then fused into the UNet. Raises TrainError where it cannot
    be written.
    """
    unet.register_to_config(sample_size=cache.manifest["encoding"]["resolution"] // checkpoint.vae_scale_factor)
    hint = ": make space and repeat with --resume_from_checkpoint latest"
    with explained(TrainError, f"no pipeline can be written to {output_dir}", hint=hint):
        if hasattr(unet, "peft_config"):
            save_adapters(unet, changes(scheduler), output_dir)
            unet.fuse_lora()
            unet.unload_lora()
        frozen = {name: checkpoint.network(name, dtype) for name, dtype in dtypes(checkpoint).items()}
        for network in (unet, frozen["vae"]):
            network.register_to_config(_name_or_path="")  # where diffusers has read it is nobody's business
        make_pipeline(unet, scheduler, checkpoint, frozen).save_pretrained(output_dir)


def make_pipeline(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, checkpoint: Checkpoint, frozen: Mapping[str, Any]
) -> Any:
    """The pipeline that a UNet in training belongs to, with the base model's VAE and text encoders."""
    parts: dict[str, Any] = {"unet": unet, "scheduler": checkpoint.scheduler(), **frozen}
    parts |= {name: checkpoint.tokenizer(name) for name in checkpoint.tokenizers}
    if checkpoint.is_sdxl:
        # Training drops text to the encoding of "", so that is what guidance must use, not zeros.
        pipeline: Any = StableDiffusionXLInstructPix2PixPipeline(**parts, force_zeros_for_empty_prompt=False)
    else:
        absent: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionInstructPix2PixPipeline(**parts, **absent)
    if changed := changes(scheduler):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    return pipeline


def changes(scheduler: DDPMScheduler) -> dict[str, Any]:
    """Settings of a noise schedule that training changed: inference must end where training did."""
    names = ("rescale_betas_zero_snr", "timestep_spacing") if scheduler.config["rescale_betas_zero_snr"] else ()
    return {name: scheduler.config[name] for name in names}


def dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The precision of each frozen part's weight files."""
    folders = {name: checkpoint.folder / name for name in checkpoint.text_encoders} | {"vae": checkpoint.vae_folder}
    return {name: dtype_of(folder, checkpoint.variant) for name, folder in folders.items()}
