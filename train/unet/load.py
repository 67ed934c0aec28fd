"""The UNet: loaded from a checkpoint and widened for the image condition."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from ...encode.base.errors import ModelError, reason
from ...encode.models.checkpoint import Checkpoint
from ..config import TrainConfig
from .xformers import use_xformers

SMALL = 16  # side of latents, up to which the fused attention of CPUs loses in bfloat16 (docs/log.md)


def load_unet(config: TrainConfig, checkpoint: Checkpoint) -> UNet2DConditionModel:
    """Load the UNet in float32 on the CPU, with input channels for noisy latent and image condition.

    Raises:
        ModelError: no UNet there, or one with neither 4 nor 8 input channels.
        SettingsError: xformers was asked for and cannot run.
    """
    place, revision = str(checkpoint.folder), None
    if config.model.non_ema_revision:
        place, revision = config.model.pretrained_model_name_or_path, config.model.non_ema_revision
    try:
        unet = UNet2DConditionModel.from_pretrained(
            place,
            subfolder="unet",
            revision=revision,
            variant=config.model.variant,
            cache_dir=config.model.cache_dir,
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{place} holds no UNet: {reason(error)}") from None
    widen(unet, checkpoint.latent_channels)
    if config.machine.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.machine.enable_xformers_memory_efficient_attention:
        use_xformers(unet)
    if config.machine.compile:
        unet.compile()  # in place, so that parameter names and the saved model stay as they are
    return unet.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def choose_attention(unet: UNet2DConditionModel, device: torch.device, precision: str) -> None:
    """Take plain attention for small pictures in bfloat16 on a CPU, in place; else leave PyTorch's fused one."""
    if device.type == "cpu" and precision == "bf16" and unet.config["sample_size"] in range(SMALL + 1):
        unet.set_attn_processor(AttnProcessor())


def widen(unet: UNet2DConditionModel, latent_channels: int = 4) -> None:
    """Let `conv_in` take the image condition beside the noisy latent, in place (InstructPix2Pix, section 3.2).

    The first channels and the bias are copied and the new channels are zero, so that the output stays the base
    model's, whatever the condition. A UNet that is wide already is left as it is.

    Raises:
        ModelError: the UNet has another number of input channels.
    """
    wide = 2 * latent_channels
    narrow: torch.nn.Conv2d = unet.conv_in
    if narrow.in_channels == wide:
        return
    if narrow.in_channels != latent_channels:
        raise ModelError(
            f"the UNet has {narrow.in_channels} input channels, expected {latent_channels} (Stable Diffusion) or "
            f"{wide} (InstructPix2Pix): an inpainting or depth model cannot be the base"
        )
    conv = torch.nn.Conv2d(wide, narrow.out_channels, narrow.kernel_size, narrow.stride, narrow.padding)  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :latent_channels] = narrow.weight
        conv.bias.copy_(narrow.bias)  # type: ignore[union-attr, arg-type]
    unet.conv_in = conv.to(narrow.weight)
    unet.register_to_config(in_channels=wide)
