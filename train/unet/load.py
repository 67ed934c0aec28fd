"""The UNet: loaded from a checkpoint, widened for the image condition, and where it is compiled held against itself."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from ...encode.base.console import say
from ...encode.base.errors import ModelError, SettingsError, TrainError, reason
from ...encode.models.checkpoint import Checkpoint
from ...encode.models.hub import fetch_pipeline
from ..config import BaseModel, TrainConfig

SMALL = 16  # side of latents, up to which the fused attention of CPUs loses in bfloat16 (docs/log.md)
WRONG = 0.5  # error of a parameter's gradient over its size; bfloat16 makes 0.03, a gradient that is lost 1
NEGLIGIBLE = 1e-3  # share of the whole gradient, below which a parameter's is rounding
# Of the loss in float16: enough that gradients are no zeros. The scale that training begins with, 65,536, makes many of
# them overflow in the first step, and then nothing could be compared.
SCALE = 1024


def load_unet(config: TrainConfig, checkpoint: Checkpoint) -> UNet2DConditionModel:
    """Load the UNet in float32 on the CPU, with input channels for noisy latent and image condition.

    Raises ModelError: no UNet there, or one that cannot be widened; SettingsError: xformers cannot run.
    """
    unet = checkpoint.network("unet", torch.float32, _non_ema(config.model))
    widen(unet, checkpoint.latent_channels)
    if config.machine.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.machine.enable_xformers_memory_efficient_attention:
        check_xformers()
        unet.enable_xformers_memory_efficient_attention()
    if config.machine.compile:
        # In place, so that parameter names and the saved model stay as they are; each shape has a graph of its own.
        unet.compile(dynamic=False)
    return unet.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_xformers() -> None:
    """Let xformers attend to something, as diffusers tries it; raises SettingsError where it cannot."""
    try:
        Attention(query_dim=8).set_use_memory_efficient_attention_xformers(True)
    except (ImportError, ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise SettingsError(
            f"--enable_xformers_memory_efficient_attention: {reason(error).rstrip(' .:')}; "
            "pip install xformers nvidia-cuda-runtime-cu12, or leave the flag out: PyTorch's own attention is fused, "
            "too"
        ) from None


def _non_ema(model: BaseModel) -> Path | None:
    """Where --non_ema_revision lies, if it is asked for: another revision on the Hub, whose UNet alone is taken."""
    name, revision = model.pretrained_model_name_or_path, model.non_ema_revision
    if not revision:
        return None
    without = ("vae", "text_encoder", "text_encoder_2", "safety_checker", "feature_extractor", "image_encoder")
    return fetch_pipeline(name, revision, model.variant, model.cache_dir, without) / "unet"


def choose_attention(unet: UNet2DConditionModel, device: torch.device, precision: str) -> None:
    """Take plain attention for small pictures in bfloat16 on a CPU, in place; else leave PyTorch's fused one."""
    if device.type == "cpu" and precision == "bf16" and unet.config["sample_size"] in range(SMALL + 1):
        unet.set_attn_processor(AttnProcessor())


def widen(unet: UNet2DConditionModel, latent_channels: int = 4) -> None:
    """Let `conv_in` take the image condition beside the noisy latent, in place (InstructPix2Pix, section 3.2).

    The first channels and the bias are copied and the new channels are zero, so that the output stays the base
    model's, whatever the condition. A UNet that is wide already stays; another number of channels is a ModelError.
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


def allow_graphs(shapes: int) -> None:
    """Let the compiler make a graph for each shape: beyond a limit it runs eagerly what it has none for, silently."""
    import torch._dynamo  # which takes seconds

    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, shapes + 2)  # called recompile_limit since torch 2.7, too


def check_gradients(unet: torch.nn.Module, loss: Callable[[], Tensor], precision: str) -> None:
    """Compare the gradients of the compiled UNet with those of the same UNet run eagerly, before it is trained.

    Compilers have been wrong, silently (PyTorch's threads 190796 and 193061). One gradient is accumulated over minus
    the other, so that this takes no more memory than a step. Raises TrainError if one is wrong.

    Args:
        unet: compiled, without gradients, and left without.
        loss: the loss of one batch, the same whenever it is called.
        precision: no, fp16 or bf16, in which it computes.
    """
    scale = SCALE if precision == "fp16" else 1
    with torch.compiler.set_stance("force_eager"):
        (scale * loss()).backward()
    gradients = {name: weight for name, weight in unet.named_parameters() if weight.grad is not None}
    size = norms(gradients.values())
    (-scale * loss()).backward()
    error = norms(gradients.values())
    unet.zero_grad(set_to_none=True)
    finite = size.isfinite()
    if not finite.any():
        say("--compile: no gradient of the first batch is finite, so the compiled ones could not be checked")
    # Not `error > …`: what is finite eagerly and not so compiled is wrong too.
    wrong = finite & ~(error <= WRONG * size + NEGLIGIBLE * size[finite].norm())
    if wrong.any():
        worst = int((error / size).nan_to_num(torch.inf).where(wrong, 0).argmax())
        device = next(unet.parameters()).device.type
        raise TrainError(
            f"--compile: torch {torch.__version__} compiles this UNet wrongly for {device} in {precision}: "
            f"{int(wrong.sum())} of {len(wrong)} gradients are not those of the uncompiled UNet, most of all that of "
            f"{list(gradients)[worst]}, by {error[worst] / size[worst]:.0%}. "
            "Leave --compile out, set TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 in the environment, or try another torch"
        )


def norms(weights: Iterable[Tensor]) -> Tensor:
    """The size of each weight's gradient, on the CPU."""
    return torch.stack([torch.linalg.vector_norm(weight.grad, dtype=torch.float32) for weight in weights]).cpu()  # type: ignore[arg-type]
