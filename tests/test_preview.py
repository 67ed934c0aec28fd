"""Tests of encode/keeper/preview.py: the sheet shows what the cache holds."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from diffusers import AutoencoderKL
from PIL import Image

from ip2p.encode.cache.format import Cache
from ip2p.encode.data.sheet import GAP, LINE, TILE
from ip2p.encode.keeper.__main__ import main

Encode = Callable[..., None]


def decoded(sd: Path, latents: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 of unscaled latents (4, h, w), at 256 pixels by repetition."""
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    with torch.no_grad():
        pixels = vae.decode(torch.from_numpy(latents[None]).float()).sample[0]  # type: ignore[union-attr]
    small = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return small.repeat(256 // len(small), 0).repeat(256 // len(small), 1)


def test_the_sheet_shows_both_images_in_every_view_with_their_instruction(
    sd: Path, cache: Path, tmp_path: Path
) -> None:
    """A strip for each sample, from the first to the last; in it original and edited (the mode), view by view."""
    output = tmp_path / "new" / "sheet.png"
    main(["preview", str(cache), "--output", str(output), "--samples", "3"])
    sheet = np.asarray(Image.open(output))
    group = zarr.open_group(cache / "data.zarr", mode="r")
    arrays = {name: np.asarray(array[:]) for name, array in group.arrays()}
    samples = Cache.open(cache).samples().to_pylist()
    height = len(sheet) // 3
    for n, sample in enumerate([samples[0], samples[4], samples[9]]):
        strip = sheet[n * height : (n + 1) * height]
        for column, (name, view) in enumerate([("original", 0), ("edited", 0), ("original", 1), ("edited", 1)]):
            left = 2 * GAP + column * (TILE + GAP)
            below = strip[:, left : left + TILE].astype(int)
            expected = decoded(sd, arrays[name][sample["row"], view, :4])
            top = next(y for y in range(height) if np.abs(below[y : y + 16] - expected[:16]).max() <= 1)
            assert np.abs(below[top : top + TILE] - expected).max() <= 1, (n, column)
            assert (below[:top] < 200).any(), "no heading"
        assert (strip[-LINE - GAP :] < 128).any(), "no caption"


def test_a_cache_without_samples_or_with_torn_ones_is_told(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No picture is made up where numbers are missing, nor written where it cannot be."""
    torn = Path(shutil.copytree(cache, tmp_path / "torn"))
    shutil.rmtree(torn / "data.zarr" / "edited" / "c")
    for folder, output, part in [
        (torn, "sheet.png", "is torn (`ip2p-cache verify"),
        (cache, "sheet.what", "--output"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["preview", str(folder), "--output", str(tmp_path / output)])
        assert stopped.value.code == 2
        assert part in capsys.readouterr().err
        assert not (tmp_path / output).exists()
