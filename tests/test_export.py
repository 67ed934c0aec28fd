"""Tests of infer/export.py and encode/models/original.py: a pipeline in one file, as others read it."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import tiny
from ip2p.encode.base.errors import ModelError
from ip2p.encode.config import Model
from ip2p.encode.models.checkpoint import Checkpoint, find_checkpoint
from ip2p.encode.models.original import original
from ip2p.infer.__main__ import main as infer
from ip2p.infer.kind import SD, SDXL
from ip2p.train.__main__ import main as train
from test_lora import command
from test_train import assert_same, flags, unet_file

NAMES = Path(__file__).with_name("sd15_names.txt")
VAE_OF_ALL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
UNET_OF_XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def parts_of(unet: dict[str, Any]) -> dict[str, Any]:
    """Networks as large as published ones, without numbers."""
    with init_empty_weights():
        return {
            "unet": UNet2DConditionModel(in_channels=8, **unet),
            "vae": AutoencoderKL(**VAE_OF_ALL),
            "text_encoder": CLIPTextModel(CLIPTextConfig(num_hidden_layers=12)),
            "scheduler": DDPMScheduler(),
        }


def export(*arguments: object) -> int:
    return infer(["export", *map(str, arguments)])


def states(pipeline: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each network, by part."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: network.state_dict() for name, network in networks.items()}


def test_the_names_are_those_of_stable_diffusion_as_it_was_published() -> None:
    """At its real size, each weight of SD 1.5 has its name, and there are no others."""
    published = {line for line in NAMES.read_text().splitlines() if not line.startswith("#")}
    assert original(parts_of({"cross_attention_dim": 768})).keys() == published


def test_a_large_unet_is_read_back_as_it_is() -> None:
    """SDXL at its real size: three blocks, many layers of attention, upsamplers behind attention."""
    parts = parts_of(UNET_OF_XL)
    state = original(parts)
    for part, read in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        found = read(state, parts[part].config)
        expected = parts[part].state_dict()
        assert {name: weight.shape for name, weight in found.items()} == {
            name: weight.shape for name, weight in expected.items()
        }


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl"])
def test_what_was_trained_comes_back_from_one_file(
    family: str, request: pytest.FixtureRequest, data: Path, encode: Callable[..., None], tmp_path: Path
) -> None:
    """diffusers and our own reader find all weights bit for bit in half precision, averages in the UNet's place."""
    model, out = request.getfixturevalue(family), tmp_path / "out"
    encode(model, data, tmp_path / "cache", max_train_samples=4)
    train(flags(model, tmp_path / "cache", out, max_train_steps=2, learning_rate=0.01, lr_scheduler="constant"))
    assert export("--model", out, "--output", tmp_path / "new" / "out.safetensors") == 0
    file, half = tmp_path / "new" / "out.safetensors", torch.float16
    expected = DiffusionPipeline.from_pretrained(out, dtype=half)
    assert {weight.dtype for name, weight in load_file(file).items() if name != "v_pred"} == {half}
    assert ("v_pred" in load_file(file)) == (family == "sd2")

    small = shutil.copytree(out, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    options = {"safety_checker": None} if family != "sdxl" else {}
    kind = getattr(diffusers, SDXL if family == "sdxl" else SD)
    found = kind.from_single_file(str(file), config=str(small), torch_dtype=half, **options)
    assert_same(states(found), states(expected))
    assert (found.unet.config.in_channels, len(states(found))) == (8, 4 if family == "sdxl" else 3)

    ours = find_checkpoint(Model(str(file), single_file_config=str(small), cache_dir=tmp_path / "hub"))
    for part, weights in states(expected).items():
        assert_same(ours.network(part, half).state_dict(), weights)
    assert ours.prediction_type() == Checkpoint(model).prediction_type()


def test_a_run_of_adapters_is_exported_fused(sd: Path, cache: Path, tmp_path: Path) -> None:
    """From its folder, or from the base and the adapters: the same file but for rounding, not that of the base."""
    train(command(sd, cache, tmp_path / "out", learning_rate=0.05))
    export("--model", tmp_path / "out", "--output", tmp_path / "a.safetensors", "--dtype", "float32")
    export("--model", sd, "--lora", tmp_path / "out", "--output", tmp_path / "b.safetensors", "--dtype", "float32")
    fused, added = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    torch.testing.assert_close(added, fused, rtol=0, atol=1e-6)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    assert not torch.allclose(fused[name], load_file(tiny.single_file(sd, tmp_path / "base.safetensors"))[name])


def test_what_cannot_be_exported_is_a_line(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain model, a folder of something else, numbers too large, a wrong ending, a full disk: nothing is written."""
    model, file = tiny.pipeline(tmp_path / "sd"), tmp_path / "new" / "out.safetensors"
    large = shutil.copytree(model, tmp_path / "large")
    weights = load_file(unet_file(large))
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] + 1e5}, unet_file(large))

    def full(*_: object) -> None:
        file.with_name(f".{file.name}.{os.getpid()}").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for folder, output, answer in (
        (sd, file, "conv_in takes 4 channels, 8 expected; train one with ip2p-train"),
        (tmp_path, file, "has no model_index.json"),
        (large, file, "--dtype float16 cannot hold the numbers of model.diffusion_model.out.2.bias: give --dtype"),
        (model, tmp_path / "out.ckpt", "out.ckpt: expected a name that ends in .safetensors"),
        (model, unet_file(model) / "x.safetensors", "is no folder"),
        (model, file, f"--output {file} cannot be written: [Errno 28] No space left on device"),
    ):
        with pytest.raises(SystemExit, match="2"):
            export("--model", folder, "--output", output)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ip2p-infer")]
        assert answer in line
        assert not list(file.parent.glob("*"))


def test_a_unet_of_another_kind_has_no_names(sd: Path) -> None:
    """What the original code has no place for is refused by its name, and not left out."""
    parts = DiffusionPipeline.from_pretrained(sd).components
    parts["unet"].encoder_hid = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"the UNet has encoder_hid\.weight, for which there is no name"):
        original(parts)
    parts["unet"].register_to_config(layers_per_block=(1, 2))
    with pytest.raises(ModelError, match=r"blocks of \(1, 2\) layers"):
        original(parts)
