"""Writes tiny checkpoints into one file, with the names and shapes that weights have in their authors' own code.

The opposite of what diffusers' `from_single_file` does, for the tiny checkpoints alone: blocks of one layer, and no
attention before an upsampler.
"""

import re
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Names = dict[str, str]
UNET: Names = DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"] | DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
VAE = {"resnets": "block", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
VAE |= {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"encoder.layers.": "transformer.resblocks.", "layer_norm": "ln_", ".self_attn.": ".attn."}
OPEN_CLIP |= {".fc1.": ".c_fc.", ".fc2.": ".c_proj.", "final_ln_": "ln_final", "embeddings.token": "token"}
OPEN_CLIP |= {
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def save(folder: Path, file: Path) -> Path:
    """Write all weights of a checkpoint in diffusers' layout into one file."""
    first = {name.removeprefix("text_model."): tensor for name, tensor in weights(folder / "text_encoder").items()}
    clip = {f"transformer.text_model.{name}": tensor for name, tensor in first.items()}
    state = {f"model.diffusion_model.{unet(name)}": tensor for name, tensor in weights(folder / "unet").items()}
    for name, tensor in weights(folder / "vae").items():
        square = "mid_block.attentions" in name and tensor.ndim == 2
        state[f"first_stage_model.{vae(name)}"] = tensor[:, :, None, None] if square else tensor
    if (folder / "text_encoder_2").is_dir():
        state |= {f"conditioner.embedders.0.{name}": tensor for name, tensor in clip.items()}
        second = {
            name.removeprefix("text_model."): tensor for name, tensor in weights(folder / "text_encoder_2").items()
        }
        state |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip(second).items()}
    elif '"gelu"' in (folder / "text_encoder" / "config.json").read_text():  # SD 2.x
        state |= {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip(first).items()}
    else:
        state |= {f"cond_stage_model.{name}": tensor for name, tensor in clip.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def weights(part: Path) -> State:
    """The weights of one part."""
    return load_file(next(part.glob("*.safetensors")))


def renamed(name: str, names: Names) -> str:
    """A name with all `names` in it replaced."""
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def unet(name: str) -> str:
    """The original name of a UNet's parameter."""
    if name in UNET:
        return UNET[name]
    block, *rest = re.sub(r"^mid_block", "mid_blocks.0", name).split(".", 4)
    number, kind, layer, inside = int(rest[0]), rest[1], int(rest[2]), rest[3]
    inside = f"0.{renamed(inside, RESNET)}" if kind == "resnets" else f"1.{inside}"
    if kind == "downsamplers":
        return f"input_blocks.{2 * number + 2}.0.{name.split('.', 4)[-1].replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{2 * number + 1}.1.{name.split('.', 4)[-1]}"
    if block == "mid_blocks":
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{inside[2:]}"
    return (
        f"input_blocks.{1 + 2 * number + layer}.{inside}"
        if block == "down_blocks"
        else (f"output_blocks.{2 * number + layer}.{inside}")
    )


def vae(name: str, blocks: int = 2) -> str:
    """The original name of a VAE's parameter; its up blocks count from the other end."""
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        return renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
    return renamed(name, VAE)


def open_clip(state: State) -> State:
    """The weights of a text encoder in the open_clip library: query, key and value in one, the projection turned."""
    result: State = {}
    for name, tensor in state.items():
        if re.search(r"[kv]_proj", name):
            continue
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = name.replace("q_proj.", "in_proj_"), torch.cat(parts)
        result[renamed(name, OPEN_CLIP)] = tensor.T if name == "text_projection.weight" else tensor
    return result
