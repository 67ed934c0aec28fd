"""Tests of encode/preview.py: the sheet shows what the cache holds."""

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
    """Columns are original and edited (the mode), view by view; rows are spread from the first sample to the last."""
    output = tmp_path / "new" / "sheet.png"
    main(["preview", str(cache), "--output", str(output), "--samples", "3"])
    sheet = np.asarray(Image.open(output))
    head, caption, side = 16, 32, 256
    assert sheet.shape == (head + 3 * (caption + side), 4 * side, 3)
    group = zarr.open_group(cache / "data.zarr", mode="r")
    arrays = {name: np.asarray(array[:]) for name, array in group.arrays()}
    samples = Cache.open(cache).samples().to_pylist()
    for n, sample in enumerate([samples[0], samples[4], samples[9]]):
        top = head + n * (caption + side) + caption
        for column, (name, view) in enumerate([("original", 0), ("edited", 0), ("original", 1), ("edited", 1)]):
            shown = sheet[top : top + side, column * side : (column + 1) * side].astype(int)
            expected = decoded(sd, arrays[name][sample["row"], view, :4])
            assert np.abs(shown - expected).max() <= 1, (n, column)
        assert (sheet[top - caption : top] < 128).any(), "no caption"


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
