"""Tiny real Stable Diffusion checkpoints in diffusers' layout, and pairs of pictures to encode."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ip2p.encode.models.original import original

WORDS = [
    "make",
    "it",
    "red",
    "blue",
    "green",
    "snowy",
    "the",
    "cat",
    "dog",
    "house",
    "sky",
    "a",
    "add",
    "turn",
    "into",
    "day",
    "night",
]


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that knows letters and a few words."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts[:2] = [parts[0] + parts[1]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token=pad)


def vae(channels: tuple[int, ...] = (8, 16)) -> AutoencoderKL:
    """A VAE that halves the side once for each channel count after the first."""
    blocks: Any = {  # diffusers declares these as tuples of one
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    return AutoencoderKL(norm_num_groups=4, layers_per_block=1, sample_size=16, scaling_factor=0.5, **blocks)


def unet(in_channels: int = 4, *, sdxl: bool = False, sample_size: int = 8) -> UNet2DConditionModel:
    """A UNet of two blocks; for SDXL with size, crop and pooled text as added conditions."""
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
        if sdxl
        else {}
    )
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=48 if sdxl else 16,
        **extra,
    )


def _text_config(tokens: Any, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def checkpoint(
    folder: Path, *, in_channels: int = 4, prediction_type: Any = "epsilon", sdxl: bool = False, seed: int = 0
) -> Path:
    """Save a tiny SD 1.x / 2.x or SDXL checkpoint with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = tokenizer(folder.parent / f"{folder.name}-vocabulary")
        scheduler = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
            clip_sample=False,
        )
        parts: dict[str, Any] = {
            "vae": vae(),
            "unet": unet(in_channels, sdxl=sdxl),
            "scheduler": scheduler,
            "tokenizer": tokens,
            "text_encoder": CLIPTextModel(_text_config(tokens, 16)),
        }
        if sdxl:
            parts["tokenizer_2"] = tokenizer(folder.parent / f"{folder.name}-vocabulary-2", pad="!")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(_text_config(parts["tokenizer_2"], 32))
            pipeline = StableDiffusionXLPipeline(**parts)
        else:
            absent: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = StableDiffusionPipeline(**parts, **absent)
        pipeline.save_pretrained(folder)
    return folder


def checkpoint_2(folder: Path) -> Path:
    """Save a tiny SD 2.x: velocity, a text encoder of another width, activation and padding, linear projections."""
    base = StableDiffusionPipeline.from_pretrained(checkpoint(folder, prediction_type="v_prediction"))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        tokens = tokenizer(folder.parent / "vocabulary", pad="!")
        config = CLIPTextConfig.from_dict(
            base.text_encoder.config.to_dict()
            | {"hidden_size": 24, "hidden_act": "gelu", "num_hidden_layers": 3, "pad_token_id": tokens.pad_token_id}
        )
        changed = {"cross_attention_dim": 24, "use_linear_projection": True, "attention_head_dim": [2, 4]}
        base.register_modules(
            tokenizer=tokens,
            text_encoder=CLIPTextModel(config),
            unet=UNet2DConditionModel.from_config(base.unet.config, **changed),
        )
    base.save_pretrained(folder)
    return folder


def pipeline(folder: Path) -> Path:
    """Write an untrained InstructPix2Pix pipeline, of SDXL in a folder of that name, for 16 pixels."""
    sdxl = folder.name == "sdxl"
    base = checkpoint(folder.parent / f"{folder.name}-base", in_channels=8, sdxl=sdxl)
    parts = DiffusionPipeline.from_pretrained(base).components
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config)
    if sdxl:
        parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
        pipeline = StableDiffusionXLInstructPix2PixPipeline(**parts)
    else:
        pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def single_file(folder: Path, file: Path) -> Path:
    """Write a checkpoint into one file in the original layout, in float32."""
    save_file(original(DiffusionPipeline.from_pretrained(folder).components), file)
    return file


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth random picture, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


SIDES = ((48, 30), (30, 48), (40, 40), (44, 34), (34, 44), (90, 30), (37, 41))
"""Sizes of pictures that become five shapes, the steps between which are an eighth of the square's side."""


def pairs(count: int, first: int = 0, sizes: Sequence[tuple[int, int]] = ((24, 20),)) -> dict[str, list]:
    """Columns of `count` pairs with instructions, named as in fusing/instructpix2pix-1000-samples.

    Their `sizes` (width, height) come in turns.
    """
    numbers = range(first, first + count)
    return {
        "input_image": [picture(2 * n, sizes[n % len(sizes)]) for n in numbers],
        "edited_image": [picture(2 * n + 1, sizes[n % len(sizes)]) for n in numbers],
        "edit_prompt": [f"make it {WORDS[2 + n % 7]}" for n in numbers],
    }


def dataset(folder: Path, columns: dict[str, list]) -> Path:
    """Write pairs as the Parquet file of a split that `datasets.load_dataset(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {"input_image", "edited_image", "mask_image"}
    features = {name: datasets.Image() if name in images else datasets.Value("string") for name in columns}
    features |= {name: datasets.Value("float64") for name in columns if isinstance(columns[name][0], float)}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def arguments(flags: Mapping[str, object]) -> list[str]:
    """Keyword arguments as command line flags; True stands for a bare flag, None and False for none."""
    result: list[str] = []
    for name, value in flags.items():
        if value is True:
            result.append(f"--{name}")
        elif isinstance(value, tuple | list):
            result += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            result += [f"--{name}", str(value)]
    return result
