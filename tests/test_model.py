"""Tests of train/unet/load.py: the UNet before the first step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import tiny
from configs import train_config
from ip2p.encode.base.errors import ModelError
from ip2p.encode.cache.format import Cache
from ip2p.encode.config import Model
from ip2p.encode.models.checkpoint import Checkpoint, find_checkpoint
from ip2p.train.config import TrainConfig
from ip2p.train.unet.load import choose_attention, load_unet, widen


def config(model: Path) -> TrainConfig:
    return train_config(model)


@pytest.mark.parametrize("sdxl", [False, True])
def test_widened_unet_equals_the_base_for_any_condition(sdxl: bool) -> None:
    """Before training the output is the base model's, bit for bit up to summation order, whatever the image."""
    torch.manual_seed(0)
    base = tiny.unet(4, sdxl=sdxl)
    wide: Any = UNet2DConditionModel.from_config(base.config)
    wide.load_state_dict(base.state_dict())
    widen(wide)
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 77, base.config["cross_attention_dim"])
    timesteps = torch.tensor([1, 500, 999])
    added = {"text_embeds": torch.randn(3, 32), "time_ids": torch.full((3, 6), 16.0)} if sdxl else None
    expected = base(latents, timesteps, text, added_cond_kwargs=added).sample
    for _ in range(3):
        condition = 10 * torch.randn(3, 4, 8, 8)
        found = wide(torch.cat([latents, condition], 1), timesteps, text, added_cond_kwargs=added).sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_widening_copies_the_bias_and_updates_the_configuration(sd: Path) -> None:
    """conv_in keeps weight and bias for the latent, gets zeros for the image, and the saved config says 8."""
    base = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    wide = load_unet(config(sd), Checkpoint(sd))
    assert torch.equal(wide.conv_in.bias, base.conv_in.bias)  # type: ignore[arg-type]
    assert torch.equal(wide.conv_in.weight[:, :4], base.conv_in.weight)
    assert not wide.conv_in.weight[:, 4:].any()
    assert wide.config["in_channels"] == 8


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers still gives it
def test_a_revision_is_that_of_every_part(
    sd: Path, data: Path, cache: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """On the Hub, `--revision` decides on all that is encoded and trained, `--non_ema_revision` on the UNet alone."""
    hub, hashes = tmp_path / "hub", {"main": "1" * 40, "other": "2" * 40}
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    for branch, model in (("main", sd), ("other", other)):  # as huggingface_hub keeps a model that it has downloaded
        shutil.copytree(model, hub / "models--someone--tiny" / "snapshots" / hashes[branch])
        (hub / "models--someone--tiny" / "refs").mkdir(exist_ok=True)
        (hub / "models--someone--tiny" / "refs" / branch).write_text(hashes[branch])
    found = find_checkpoint(Model("someone/tiny", revision="other", cache_dir=hub))
    assert found.identity() == Checkpoint(other).identity() != Checkpoint(sd).identity()
    encode("someone/tiny", data, tmp_path / "cache", revision="other", cache_dir=hub, max_train_samples=1)
    assert Cache.open(tmp_path / "cache").manifest["identity"] == found.identity()
    for non_ema, expected in ((None, other), ("main", sd)):
        flags = train_config("someone/tiny", cache, revision="other", non_ema_revision=non_ema, cache_dir=hub)
        loaded, base = load_unet(flags, found), UNet2DConditionModel.from_pretrained(expected, subfolder="unet")
        assert torch.equal(loaded.conv_out.weight, base.conv_out.weight)


def test_an_8_channel_base_is_continued_unchanged(tmp_path: Path) -> None:
    """A model that is an instruction editor already keeps every weight."""
    model = tiny.checkpoint(tmp_path / "wide", in_channels=8)
    base = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    loaded = load_unet(config(model), Checkpoint(model))
    assert loaded.config["in_channels"] == 8
    for name, weight in base.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_base_with_other_input_channels_is_refused(tmp_path: Path) -> None:
    """An inpainting model has 9 channels: the error names what was found and what was expected."""
    model = tiny.checkpoint(tmp_path / "inpainting", in_channels=9)
    with pytest.raises(ModelError, match=r"9 input channels, expected 4 .* or 8"):
        load_unet(config(model), Checkpoint(model))


def test_a_missing_unet_is_one_clear_line(sd: Path, tmp_path: Path) -> None:
    """A checkpoint without a UNet folder is answered with the folder's name."""
    shutil.copytree(sd, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "unet")
    with pytest.raises(ModelError, match=r"unet/config\.json cannot be read"):
        load_unet(config(tmp_path / "sd"), Checkpoint(tmp_path / "sd"))


@pytest.mark.parametrize(
    ("side", "device", "precision", "expected"),
    [
        (16, "cpu", "bf16", AttnProcessor),
        (16, "cpu", "no", AttnProcessor2_0),
        (32, "cpu", "bf16", AttnProcessor2_0),
        (16, "cuda", "bf16", AttnProcessor2_0),
    ],
)
def test_attention_is_fused_but_for_small_pictures_in_bfloat16_on_a_cpu(
    side: int, device: str, precision: str, expected: type
) -> None:
    """There diffusers' plain attention is the faster one; everywhere else it is PyTorch's own."""
    unet = tiny.unet(sample_size=side)
    choose_attention(unet, torch.device(device), precision)
    assert {type(processor) for processor in unet.attn_processors.values()} == {expected}
