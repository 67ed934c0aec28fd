"""The names and shapes that weights have in their authors' own code, where one file holds a whole Stable Diffusion.

The opposite of what diffusers' `from_single_file` does: latent-diffusion counts the blocks of its UNet through, its VAE
counts those that go up from the other end, and open_clip keeps query, key and value in one.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ModelError

UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""What stands outside of the UNet's blocks."""
BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "attentions.0": "attn_1",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_": "",
    "mid_block": "mid",
    "down_blocks": "down",
    "up_blocks": "up",
}
OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "q_proj.": "in_proj_",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def original(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1.x, 2.x or XL as one file holds them, in the precision that they have.

    What no weight says is marked as other programs look for it: `v_pred` and `ztsnr`.

    Args:
        parts: the networks unet, vae, text_encoder and perhaps text_encoder_2, and the scheduler.

    Raises:
        ModelError: a UNet that has parts which those of Stable Diffusion lack.
    """
    state = {f"model.diffusion_model.{name}": weight for name, weight in _unet(parts["unet"]).items()}
    state |= {f"first_stage_model.{name}": weight for name, weight in _vae(parts["vae"]).items()}
    encoder = parts["text_encoder"]
    if "text_encoder_2" in parts:
        state |= {f"conditioner.embedders.0.{name}": weight for name, weight in _clip(encoder).items()}
        second = _open_clip(parts["text_encoder_2"])
        state |= {f"conditioner.embedders.1.model.{name}": weight for name, weight in second.items()}
    elif encoder.config.hidden_act == "gelu":  # OpenAI's own has "quick_gelu", that of 2.x is open_clip's
        state |= {f"cond_stage_model.model.{name}": weight for name, weight in _open_clip(encoder).items()}
    else:
        state |= {f"cond_stage_model.{name}": weight for name, weight in _clip(encoder).items()}
    if parts["scheduler"].config.get("prediction_type") == "v_prediction":
        state["v_pred"] = torch.empty(0)
    if parts["scheduler"].config.get("rescale_betas_zero_snr"):
        state["ztsnr"] = torch.empty(0)
    return {name: weight.contiguous() for name, weight in state.items()}


def _unet(unet: Any) -> dict[str, Tensor]:
    layers, weights = unet.config["layers_per_block"], unet.state_dict()
    if not isinstance(layers, int):
        raise ModelError(
            f"a UNet with blocks of {layers} layers has no names in the original layout: expected one number"
        )
    attentive = {f"{found[1]}{found[2]}" for found in map(BLOCK.match, weights) if found and found[3] == "attentions"}

    def renamed(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if module in UNET:
            return f"{UNET[module]}.{kind}"
        if not (found := BLOCK.fullmatch(name)):
            raise ModelError(f"the UNet has {name}, for which there is no name in the original layout")
        side, block, what, layer, rest = found.groups()
        if what == "resnets":
            rest = _replaced(rest, RESNET)
        if side == "mid":
            return f"middle_block.{1 if what == 'attentions' else 2 * int(layer)}.{rest}"
        last = what.endswith("samplers")
        number = int(block) * (layers + 1) + (layers if last else int(layer))
        place = int(what == "attentions")
        if side == "down":  # after conv_in; what makes smaller is a block of its own
            return f"input_blocks.{number + 1}.{place}.{rest.replace('conv.', 'op.') if last else rest}"
        return f"output_blocks.{number}.{1 + (f'up{block}' in attentive) if last else place}.{rest}"

    return {renamed(name): weight for name, weight in weights.items()}


def _vae(vae: Any) -> dict[str, Tensor]:
    highest = len(vae.config["block_out_channels"]) - 1

    def renamed(name: str) -> str:
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda found: str(highest - int(found[0])), name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid_block.block_{int(found[1]) + 1}", name)
        return _replaced(name, VAE)

    weights = vae.state_dict().items()  # attention, alone of two dimensions, was written as convolution
    return {renamed(name): weight[..., None, None] if weight.ndim == 2 else weight for name, weight in weights}


def _clip(encoder: Any) -> dict[str, Tensor]:
    weights = encoder.state_dict().items()
    return {f"transformer.text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights}


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    weights, found = encoder.state_dict(), dict[str, Tensor]()
    for name, weight in weights.items():
        if "q_proj" in name:
            weight = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        elif name == "text_projection.weight":
            weight = weight.T
        if not re.search("[kv]_proj", name):
            found[_replaced(name.removeprefix("text_model."), OPEN_CLIP)] = weight
    return found


def _replaced(name: str, names: Mapping[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name
