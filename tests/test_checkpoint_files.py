"""Tests of encode/models/checkpoint.py and single_file.py: which files a checkpoint's parts come from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import tiny
from ip2p.encode.base.errors import ModelError
from ip2p.encode.cache.format import Cache
from ip2p.encode.config import Model
from ip2p.encode.models import single_file
from ip2p.encode.models.checkpoint import Checkpoint, find_checkpoint
from ip2p.encode.models.weights import hash_weights, variant_in, weight_files
from ip2p.train.__main__ import main as train
from test_train import assert_same, flags, unet_file

Encode = Callable[..., None]


@pytest.fixture
def description(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint without its weights."""

    def copy(model: Path) -> Path:
        return shutil.copytree(model, tmp_path / "description", ignore=shutil.ignore_patterns("*.safetensors"))

    return copy


def find(file: Path, config: Path | None, cache_dir: Path, **options: Any) -> Checkpoint:
    return find_checkpoint(
        Model(str(file), single_file_config=str(config) if config else None, cache_dir=cache_dir, **options)
    )


def hash_part(folder: Path) -> str:
    return hash_weights(weight_files(folder))


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl"])
def test_a_single_file_holds_the_same_model_as_its_folder(
    family: str, request: pytest.FixtureRequest, description: Callable[[Path], Path], tmp_path: Path
) -> None:
    """All weights are found under their original names, and what the file lacks comes from the description."""
    model = request.getfixturevalue(family)
    file = tiny.single_file(model, tmp_path / "model.safetensors")
    found = find(file, description(model), tmp_path / "cache")
    assert found.identity() == Checkpoint(model).identity()
    for part in ("unet", "vae", *found.text_encoders):
        expected = load_file(next((model / part).glob("*.safetensors")))
        assert_same(load_file(next((found.folder / part).glob("*.safetensors"))), expected)
    assert found.prediction_type() == Checkpoint(model).prediction_type()
    assert found.is_sdxl == (family == "sdxl")


def test_a_single_file_is_encoded_and_trained_like_its_folder(
    sd: Path, data: Path, description: Callable[[Path], Path], tmp_path: Path, encode: Encode
) -> None:
    """The cache fits the folder too, training knows the description from the cache, and converts nothing again."""
    file, small = tiny.single_file(sd, tmp_path / "model.safetensors"), description(sd)
    encode(file, data, tmp_path / "cache", single_file_config=small, cache_dir=tmp_path / "hub")
    assert Cache.open(tmp_path / "cache").manifest["identity"] == Checkpoint(sd).identity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "_load", lambda *_: pytest.fail("converted again"))
        options = {"max_train_steps": 1, "cache_dir": tmp_path / "hub"}
        train(flags(file, tmp_path / "cache", tmp_path / "out", **options))
    train(flags(sd, tmp_path / "cache", tmp_path / "reference", max_train_steps=1))
    assert_same(load_file(unet_file(tmp_path / "out")), load_file(unet_file(tmp_path / "reference")))


def test_another_content_or_description_is_converted_anew(
    sd: Path, description: Callable[[Path], Path], tmp_path: Path
) -> None:
    """A converted folder is known by what it was made of, not by the name or age of a file."""
    file, small = tiny.single_file(sd, tmp_path / "model.safetensors"), description(sd)
    first = find(file, small, tmp_path / "cache")
    renamed = Path(shutil.copy(file, tmp_path / "renamed.safetensors"))
    assert find(renamed, small, tmp_path / "cache").folder == first.folder
    scheduler = small / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    assert find(file, small, tmp_path / "cache").prediction_type() == "v_prediction"
    assert first.prediction_type() == "epsilon"
    state = load_file(file)
    save_file(state | {"first_stage_model.quant_conv.bias": state["first_stage_model.quant_conv.bias"] + 1}, file)
    assert find(file, small, tmp_path / "cache").identity()["vae"] != first.identity()["vae"]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_half_precision_file_stays_as_small_and_a_mixed_one_loses_nothing(
    sd: Path, description: Callable[[Path], Path], tmp_path: Path, precision: str
) -> None:
    """The folder has the widest precision that a weight has in the file."""
    half, small = getattr(torch, precision), description(sd)
    state = load_file(tiny.single_file(sd, tmp_path / "model.safetensors"))
    for name, kinds in (("half", {half}), ("mixed", {torch.float32})):
        mixed = {key: part.to(half) for key, part in state.items() if name == "half" or "first_stage" not in key}
        save_file(state | mixed, tmp_path / f"{name}.safetensors")
        found = find(tmp_path / f"{name}.safetensors", small, tmp_path / "cache")
        assert {part.dtype for part in load_file(unet_file(found.folder)).values()} == kinds
        assert (hash_part(found.vae_folder) == hash_part(sd / "vae")) == (name == "mixed")


def test_a_file_without_a_description_asks_for_one(
    sd2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the Hub nothing says how to read it, and with it a 2.x file could be of two kinds: both are said."""
    file = tiny.single_file(sd2, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read .* \(--single_file_config names a folder"):
        find(file, None, tmp_path / "cache")
    assert "taken to predict v_prediction; the base models at 512 px predict epsilon" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize("content", [b"", b"<html>", None], ids=["empty", "a web page", "other weights"])
def test_a_file_of_another_kind_is_refused(
    content: bytes | None, sd: Path, description: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Whatever the libraries make of it, the user is told in one line."""
    file = tmp_path / "model.safetensors"
    if content is None:
        save_file({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read as a Stable Diffusion checkpoint: .+"):
        find(file, description(sd), tmp_path / "cache")


def test_a_single_file_has_no_variants(sd: Path, description: Callable[[Path], Path], tmp_path: Path) -> None:
    """A flag that would do nothing is refused."""
    file = tiny.single_file(sd, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="--variant fp16 belongs to folders and Hub ids"):
        find(file, description(sd), tmp_path / "cache", variant="fp16")


def test_a_variant_is_taken_part_by_part(sd: Path, tmp_path: Path, data: Path, encode: Encode) -> None:
    """A model in fp16 goes with a VAE that has no such files, given by its folder or that of a whole checkpoint."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd, dtype=torch.float16, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    other = tiny.checkpoint(tmp_path / "other", seed=5)
    for vae in (other, other / "vae"):
        model = Model(str(tmp_path / "half"), variant="fp16", pretrained_vae_model_name_or_path=str(vae))
        found = find_checkpoint(model)
        folders = found.folder / "text_encoder", found.vae_folder
        assert [variant_in(folder, "fp16") for folder in folders] == ["fp16", None]
        assert found.identity()["vae"] == hash_part(other / "vae")
    cache, out = tmp_path / "cache", tmp_path / "out"
    encode(tmp_path / "half", data, cache, variant="fp16", pretrained_vae_model_name_or_path=other)
    train(flags(tmp_path / "half", cache, out, variant="fp16", max_train_steps=1))
    assert hash_part(out / "vae") == hash_part(other / "vae")
    assert {part.dtype for part in load_file(out / "text_encoder" / "model.safetensors").values()} == {torch.float16}
