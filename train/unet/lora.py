"""LoRA: adapters of low rank beside the frozen weights of a UNet (arXiv 2106.09685), by peft.

`conv_in`, where the image condition comes in, gets an adapter of full rank, which can express any change of its weight.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from ...encode.base.errors import SettingsError
from ...infer.lora import ADAPTERS, CONV_IN, need_peft
from ..learning import Lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = (
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "conv",
)
TARGETS = {"attn": ATTENTION, "all": ATTENTION + BLOCKS}
"""How the names of layers end that get an adapter; `all` are those of the blocks."""


def add_adapters(
    unet: UNet2DConditionModel, flags: Lora, seed: int = 0, precision: torch.dtype = torch.float32
) -> None:
    """Freeze a UNet and put adapters beside its layers, in place; they change nothing before they are trained.

    Adapters are float32, as in half precision small updates would be lost, and so are norms, since a CPU mixes no two
    precisions in them. All else computes in the `precision` of autocast anyway, and is held in it.

    Args:
        unet: in float32.
        seed: what the adapters begin with is a function of it.

    Raises:
        SettingsError: there is no peft.
    """
    need_peft(SettingsError, "--lora_rank")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    full = {"conv_in": unet.conv_in.weight[0].numel()}  # 8 channels of 3 x 3 pixels
    options: Any = {"r": flags.lora_rank, "lora_alpha": flags.alpha, "rank_pattern": full, "alpha_pattern": full}
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(target_modules=[*TARGETS[flags.lora_targets], "conv_in"], **options))
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast casts; peft would give each adapter a float32 copy of the input that several of them share.
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
        elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not module.weight.requires_grad:
            module.to(precision)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_adapters(unet: UNet2DConditionModel, scheduler: Mapping[str, Any], folder: Path) -> None:
    """Write the adapters for diffusers' `load_lora_weights`, and beside them `conv_in` as it was before training.

    The names are peft's own: of those that diffusers' scripts write, loading drops attention where there is an adapter
    of a convolution. Strengths are in the metadata: without it, diffusers takes each alpha for the rank.

    Args:
        unet: with adapters, in float32.
        scheduler: what training changed in the base's settings of it; `infer/lora.py` reads them, and the UNet's size.
    """
    from peft import get_peft_model_state_dict

    config: Any = unet.peft_config["default"].to_dict()
    said = {name: config[name] for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    said["target_modules"] = sorted(config["target_modules"])  # no more: an older peft would not know it
    layers: Any = {name: weight.contiguous() for name, weight in get_peft_model_state_dict(unet).items()}
    pipeline = StableDiffusionInstructPix2PixPipeline  # SDXL's writes the same
    pipeline.save_lora_weights(folder, layers, weight_name=ADAPTERS, unet_lora_adapter_metadata=said)
    changed = {"unet": {"sample_size": unet.config["sample_size"]}, "scheduler": dict(scheduler)}
    conv: Any = unet.conv_in.base_layer
    weights = {name: weight.contiguous() for name, weight in conv.state_dict().items()}
    metadata = {"format": "pt"} | {name: json.dumps(values) for name, values in changed.items()}
    save_file(weights, folder / CONV_IN, metadata=metadata)
