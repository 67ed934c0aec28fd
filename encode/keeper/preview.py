"""Decodes samples of a cache to a contact sheet: original, edited, a mask and the instruction, in every view."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..base.console import bar
from ..base.errors import CacheError
from ..cache.format import SAMPLES, Cache
from ..cache.keep import condition_on, kept
from ..cache.shapes import latents_of
from ..config import EncodeConfig
from ..data.sheet import TILE, contact_sheet
from ..models.checkpoint import find_checkpoint, find_device


def preview(cache: Cache, config: EncodeConfig, count: int, keep: str | None = None) -> Image.Image:
    """A contact sheet of `count` samples, spread evenly over the dataset.

    Args:
        config: names the model whose VAE decodes.
        keep: the condition on samples that are shown, with what they have in the columns that it names; default: all.

    Raises:
        CacheError: no sample is encoded, or numbers are missing.
    """
    table = cache.samples() if keep is None else cache.samples().filter(kept(cache, keep))
    samples = [sample for sample in table.to_pylist() if sample["status"] == "ok"]
    if not samples:
        mend = "run the same ip2p-encode again" if keep is None else f"--keep {keep} leaves none"
        raise CacheError(f"{cache.folder} holds no encoded sample to show: {mend}")
    chosen = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    checkpoint = find_checkpoint(config.model, without=("unet", "text_encoder", "text_encoder_2"))
    vae = checkpoint.network("vae", torch.float32).to(find_device())
    sides = ("original", "edited", "mask") if cache.manifest.get("masks") else ("original", "edited")
    labels = [f"{side}, {view}" for view in cache.views for side in sides]
    side = max(TILE, cache.manifest["encoding"]["resolution"])  # no pixel is left out
    names = [name for name in condition_on(cache, keep).columns if name not in SAMPLES.names] if keep else []
    return contact_sheet(_rows(cache, vae, [samples[n] for n in chosen], names), labels, side)


def _rows(
    cache: Cache, vae: Any, samples: Sequence[dict[str, Any]], names: Sequence[str]
) -> Iterator[tuple[str, list[Image.Image]]]:
    """The instruction of each sample with what it has in some columns, and its pictures in all views."""
    for sample in bar(samples, "decode", "sample"):
        held = latents_of(cache, sample)
        if not all(np.isfinite(part).all() for part in held.values()):
            raise CacheError(f"{cache.folder}: sample {sample['key']} is torn (`ip2p-cache verify {cache.folder}`)")
        pictures = [[_decode(vae, latent) for latent in held["original"]]]
        pictures += [[_decode(vae, moments[: len(moments) // 2]) for moments in held["edited"]]]
        pictures += [[_gray(share, pictures[0][0].size) for (share,) in held["mask"]]] if "mask" in held else []
        values = ", ".join(f"{name} {_shown(sample[name])}" for name in names)
        told = f"{sample['instruction']} ({values})" if names else sample["instruction"]
        yield told, list(chain.from_iterable(zip(*pictures, strict=True)))


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _gray(share: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A mask (h, w) as large as the pictures."""
    return Image.fromarray((255 * share).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


@torch.inference_mode()
def _decode(vae: Any, latent: np.ndarray) -> Image.Image:
    """The picture of an unscaled latent (4, h, w)."""
    pixels = vae.decode(torch.from_numpy(latent[None]).to(vae.device, vae.dtype)).sample  # (1, 3, H, W)
    return VaeImageProcessor().postprocess(pixels)[0]  # type: ignore[return-value]
