"""Decodes samples of a cache to a contact sheet: original, edited and instruction, in every view."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..base.console import bar
from ..base.errors import CacheError
from ..cache.format import Cache
from ..cache.keep import kept
from ..cache.shapes import latents_of
from ..config import EncodeConfig
from ..data.sheet import TILE, contact_sheet
from ..models.checkpoint import find_checkpoint, find_device


def preview(cache: Cache, config: EncodeConfig, count: int, keep: str | None = None) -> Image.Image:
    """A contact sheet of `count` samples, spread evenly over the dataset.

    Args:
        config: names the model whose VAE decodes.
        keep: the condition on samples that are shown; default: all.

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
    labels = [f"{side}, {view}" for view in cache.views for side in ("original", "edited")]
    side = max(TILE, cache.manifest["encoding"]["resolution"])  # no pixel is left out
    return contact_sheet(_rows(cache, vae, [samples[n] for n in chosen]), labels, side)


def _rows(cache: Cache, vae: Any, samples: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[Image.Image]]]:
    """The instruction of each sample, and its pictures in all views."""
    for sample in bar(samples, "decode", "sample"):
        original, edited = latents_of(cache, sample).values()
        latents = np.stack([original, edited[:, : original.shape[1]]], axis=1)  # (V, 2, 4, h, w)
        if not np.isfinite(latents).all():
            raise CacheError(f"{cache.folder}: sample {sample['key']} is torn (`ip2p-cache verify {cache.folder}`)")
        yield sample["instruction"], [_decode(vae, latent) for latent in latents.reshape(-1, *latents.shape[2:])]


@torch.inference_mode()
def _decode(vae: Any, latent: np.ndarray) -> Image.Image:
    """The picture of an unscaled latent (4, h, w)."""
    pixels = vae.decode(torch.from_numpy(latent[None]).to(vae.device, vae.dtype)).sample  # (1, 3, H, W)
    return VaeImageProcessor().postprocess(pixels)[0]  # type: ignore[return-value]
