"""Decodes samples of a cache to a contact sheet: original, edited and instruction, in every view."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from diffusers.utils.pil_utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..base.errors import CacheError
from ..cache.format import Cache
from ..config import EncodeConfig
from ..models.checkpoint import Model, find_checkpoint

SIDE = 256  # pixels of a picture on the sheet, at least
LINE = 16  # pixels of a line of text


@torch.inference_mode()
def preview(cache: Cache, config: EncodeConfig, count: int) -> Image.Image:
    """A contact sheet of `count` samples, spread evenly over the dataset.

    Args:
        cache: a cache with encoded samples.
        config: names the model whose VAE decodes.

    Raises:
        CacheError: no sample is encoded, or numbers are missing.
    """
    samples = [sample for sample in cache.samples().to_pylist() if sample["status"] == "ok"]
    if not samples:
        raise CacheError(f"{cache.folder} holds no encoded sample to show: run the same ip2p-encode again")
    chosen = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    others = ("unet", "text_encoder", "text_encoder_2")
    checkpoint = find_checkpoint(Model.of(config), config.cache_dir, without=others)
    folder = checkpoint.vae_folder
    vae = AutoencoderKL.from_pretrained(folder, variant=checkpoint.variant_in(folder))
    vae.eval().to(torch.device(PartialState().device or "cpu"))  # type: ignore[call-overload]
    arrays = cache.arrays("images")
    panels = []
    for sample in tqdm([samples[n] for n in chosen], desc="decode", leave=False):
        original, edited = (np.asarray(arrays[name][sample["row"]]) for name in ("original", "edited"))
        latents = np.stack([original, edited[:, : original.shape[1]]], axis=1)  # (V, 2, 4, h, w)
        if not np.isfinite(latents).all():
            raise CacheError(f"{cache.folder}: sample {sample['key']} is torn (`ip2p-cache verify {cache.folder}`)")
        panels.append(_panel(_decode(vae, latents.reshape(-1, *latents.shape[2:])), sample["instruction"]))
    heads = [f"{side}, {view}" for view in cache.views for side in ("original", "edited")]
    return _sheet(panels, heads)


def _decode(vae: Any, latents: np.ndarray) -> list[Image.Image]:
    """Pictures of unscaled latents (B, 4, h, w)."""
    pictures = []
    for latent in torch.from_numpy(latents).to(vae.device, vae.dtype).split(1):
        pixels = vae.decode(latent).sample[0].float().clamp(-1, 1).cpu()  # (3, H, W)
        pixels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        side = max(SIDE, pixels.shape[0])
        pictures.append(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST))
    return pictures


def _panel(pictures: Sequence[Image.Image], instruction: str) -> Image.Image:
    """Pictures side by side, under a caption."""
    row = make_image_grid(list(pictures), rows=1, cols=len(pictures))
    caption = textwrap.wrap(instruction, row.width // (LINE // 2), max_lines=2, placeholder=" …")
    return _headed(row, 2, [(0, "\n".join(caption))])


def _sheet(panels: Sequence[Image.Image], heads: Sequence[str]) -> Image.Image:
    """Panels one below the other, under a line that says what each column shows."""
    sheet = make_image_grid(list(panels), rows=len(panels), cols=1)
    return _headed(sheet, 1, [(n * sheet.width // len(heads), head) for n, head in enumerate(heads)])


def _headed(image: Image.Image, lines: int, texts: Sequence[tuple[int, str]]) -> Image.Image:
    """An image under `lines` of text, each text from its place on."""
    headed = Image.new("RGB", (image.width, image.height + lines * LINE), "white")
    headed.paste(image, (0, lines * LINE))
    for left, text in texts:
        foot = (left + 4, lines * LINE - 2)
        ImageDraw.Draw(headed).multiline_text(foot, text, "black", ImageFont.load_default(LINE - 4), anchor="ld")
    return headed
