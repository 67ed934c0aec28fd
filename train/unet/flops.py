"""How much arithmetic a training step is, and how much of it a GPU could do: counted and looked up, not measured."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...encode.cache.reader import Reader
from .weights import Precision

# Dense products of half precision with sums in float32, TFLOP/s, from the data sheets; the first name that fits.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "RTX 4090": 165}


def peak(device: torch.device) -> float | None:
    """TFLOP/s that a GPU reaches at best in half precision; None for one that is not listed, and without one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((float(tera) for part, tera in PEAKS.items() if part in name), None)


def training_flops(config: Any, latents: tuple[int, ...], text: tuple[int, ...], pooled: int | None) -> float:
    """TFLOP of one sample, forward and backward; nothing is computed.

    Args:
        config: of a UNet.
        latents: (8, h, w), of noisy latent and image together.
        text: (77, d).
        pooled: width of the pooled text of SDXL.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        sample, tokens = torch.empty(1, *latents), torch.empty(1, *text)
        timesteps, added = torch.empty(1, dtype=torch.long), dict[str, Tensor]()
        if pooled:
            added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(sample, timesteps, tokens, added_cond_kwargs=added)  # type: ignore[operator]
    return 3 * counter.get_total_flops() / 1e12


def share_of_peak(unet: Any, reader: Reader, precision: Precision, device: torch.device) -> float | None:
    """The share of the GPU's peak that one sample in a second is; None where the peak is not known."""
    tera = peak(device) if precision.name != "no" else None
    if tera is None:
        return None
    shapes = {name: array.row_shape for name, array in reader.arrays.items()}
    channels, *sides = shapes["original"]
    config = getattr(unet, "module", unet).config
    return training_flops(config, (2 * channels, *sides), shapes["text"], *shapes.get("pooled", (None,))) / tera
