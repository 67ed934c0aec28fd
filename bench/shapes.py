"""The models that are measured, with random weights: the real shapes, and small ones in the same proportions."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ip2p.encode.cache.shapes import RowShapes, row_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import tokenizer


class Shape(NamedTuple):
    """What the models of one size differ in."""

    unet: dict[str, Any]
    vae: tuple[int, ...]  # widths of its blocks
    text: tuple[dict[str, Any], ...]  # of each text encoder

    @property
    def text_width(self) -> int:
        return sum(config["hidden_size"] for config in self.text)

    @property
    def pooled(self) -> int | None:
        """Width of the pooled instruction, which SDXL has."""
        return self.text[-1]["projection_dim"] if len(self.text) == 2 else None

    def rows(self, resolution: int) -> RowShapes:
        """Shapes of one row of a cache."""
        return row_shapes(4, (resolution // 8,) * 2, 77, self.text_width, self.pooled)


def text_config(width: int, heads: int, layers: int = 12, **options: Any) -> dict[str, Any]:
    """What CLIP's text encoders differ in."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    } | options


XL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    "sample_size": 128,
}
# Of `demo` the UNet alone is that of examples/openmoji, whose 64 pixels make the latents that 128 make elsewhere.
DEMO = json.loads((Path(__file__).parents[1] / "examples/openmoji/starter/unet/config.json").read_text())
_NAMES = "block_out_channels down_block_types up_block_types layers_per_block attention_head_dim norm_num_groups"
DEMO_UNET = {name: DEMO[name] for name in [*_NAMES.split(), "sample_size"]}
# What a test or a rehearsal can run: SD and SDXL in kind, not in proportion.
_TEXT = text_config(16, 2, 2)
TINY = Shape({"block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "sample_size": 8}, (4, 8, 8, 8), (_TEXT,))
_TINY_XL = {
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "sample_size": 8,
}
TINY_XL = Shape(XL_UNET | _TINY_XL, (4, 8, 8, 8), (_TEXT, _TEXT))
# `small` is a fifth of SD 1.5 in width, but for the VAE: a quarter, since processors like powers of two. So its
# arithmetic favors a cache more than that of the real one.
SIZES = {
    "tiny": TINY,
    "tinyxl": TINY_XL,
    "demo": Shape(DEMO_UNET, (16, 32, 64, 64), (text_config(128, 4, 3),)),
    "small": Shape(
        {"block_out_channels": (64, 128, 256, 256), "norm_num_groups": 8, "sample_size": 32},
        (32, 64, 128, 128),
        (text_config(160, 5),),
    ),
    "sd15": Shape(
        {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}, (128, 256, 512, 512), (text_config(768, 12),)
    ),
    "sdxl": Shape(
        {"block_out_channels": (320, 640, 1280), **XL_UNET},
        (128, 256, 512, 512),
        (text_config(768, 12), text_config(1280, 20, 32, hidden_act="gelu")),
    ),
}


def make_unet(shape: Shape, in_channels: int = 8) -> UNet2DConditionModel:
    """A UNet on the device that is the default."""
    return UNet2DConditionModel(in_channels=in_channels, cross_attention_dim=shape.text_width, **shape.unet)  # type: ignore[arg-type]


def make_vae(shape: Shape) -> AutoencoderKL:
    """A frozen VAE that makes pictures eight times smaller."""
    blocks: dict[str, Any] = {"block_out_channels": shape.vae, "norm_num_groups": shape.vae[0] // 4}
    blocks |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(layers_per_block=2, force_upcast=False, **blocks)
    return vae.requires_grad_(False).eval()


def make_text_encoders(shape: Shape, **tokens: Any) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
    """The frozen text encoder, or both; `tokens` are the numbers of special tokens."""
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = [kind(CLIPTextConfig(**config, **tokens)) for kind, config in zip(kinds, shape.text, strict=False)]
    return [encoder.requires_grad_(False).eval() for encoder in encoders]  # type: ignore[misc]


def save(shape: Shape, folder: Path, unet: UNet2DConditionModel) -> Path:
    """Write a checkpoint in diffusers' layout, whose tokenizer knows letters and a few words."""
    words = tokenizer(folder.with_name(f"{folder.name}-vocabulary"))
    special = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    first, *second = make_text_encoders(shape, **special)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**betas, steps_offset=1, clip_sample=False)
    parts: dict[str, Any] = {"vae": make_vae(shape), "unet": unet, "scheduler": scheduler}
    parts |= {"tokenizer": words, "text_encoder": first}
    if second:
        pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=words, text_encoder_2=second[0])  # type: ignore[arg-type]
    else:
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **absent)
    pipeline.save_pretrained(folder)
    return folder
