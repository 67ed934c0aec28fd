"""Tests of encode/models: models that are not whole, not of our kinds, or saved in other ways, and flags for others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import tiny
from ip2p.encode.base.errors import ModelError
from ip2p.encode.config import Model
from ip2p.encode.models.checkpoint import Checkpoint, find_checkpoint
from ip2p.encode.models.tokenizer import hash_tokenizer, load_tokenizer
from ip2p.encode.models.weights import dtype_of
from ip2p.train.__main__ import main as train
from test_train import assert_same, flags

Change = Callable[[Path], object]
FILES = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def copy(sd: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd, tmp_path / "copy")


@pytest.fixture
def copy_xl(sdxl: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sdxl, tmp_path / "copy")


def edit(file: Path, *without: str, **values: Any) -> None:
    """Change keys of a JSON file."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in found.items() if key not in without}))


def to_bin(folder: Path, part: str, **options: Any) -> Path:
    """Keep the weights of a part in a pickle, as early releases do; `extra` stands beside them."""
    old, extra = folder / part / f"{FILES[part]}.safetensors", options.pop("extra", {})
    new = old.with_name("pytorch_model.bin" if part == "text_encoder" else f"{FILES[part]}.bin")
    torch.save(load_file(old) | extra, new, **options)
    old.unlink()
    return new


def early_tokenizer(folder: Path) -> Path:
    """Write a tokenizer as releases of Stable Diffusion hold it, padded with "!" by its token map alone."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.tokenizer(folder)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names | {"pad_token": "!"}))
    settings = names | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def use(model: Path, **flags: Any) -> Checkpoint:
    """All of a model that encoding and training read."""
    found = find_checkpoint(Model(str(model), **flags))
    assert found.identity()
    assert found.prediction_type()
    for part in ("vae", "unet", *found.text_encoders):
        found.network(part, torch.float32)
    for part in found.tokenizers:
        found.tokenizer(part)
    return found


def test_weights_that_are_not_there_are_no_random_numbers(copy: Path) -> None:
    """A text encoder that lacks a tensor, has another in its place, or one of another shape is refused by its name."""
    file = copy / "text_encoder" / "model.safetensors"
    whole = load_file(file)
    name = next(key for key in whole if key.endswith("layers.1.mlp.fc1.weight"))
    for changed, said in (
        ({key: value for key, value in whole.items() if key != name}, r"holds no \S*layers\.1\.mlp\.fc1\.weight"),
        ({key.replace("layers.1.mlp.fc1.w", "layers.1.w"): value for key, value in whole.items()}, "holds no "),
        (whole | {"other.weight": whole[name].clone()}, r"holds unknown \S*other\.weight"),
        (whole | {name: whole[name][:-1].clone()}, r"holds misshapen \S*layers\.1\.mlp\.fc1\.weight"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ModelError, match=f"text_encoder.*{said}"):
            use(copy)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_weights_that_are_not_finite_are_refused_by_name(part: str, copy: Path) -> None:
    """They would set all samples aside, or stop a training, as if these were at fault."""
    weights = load_file(file := copy / part / f"{FILES[part]}.safetensors")
    name = min(weights)
    save_file(weights | {name: weights[name] * torch.nan}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{file.name} holds numbers that are not finite, in \S*{name}"):
        use(copy)


def test_a_file_of_another_kind_is_called_one(sd: Path, tmp_path: Path) -> None:
    """Not that it is not there."""
    (tmp_path / "model.ckpt").touch()
    for model in (
        Model(str(tmp_path / "model.ckpt")),
        Model(str(sd), pretrained_vae_model_name_or_path=str(tmp_path / "model.ckpt")),
    ):
        with pytest.raises(ModelError, match=r"model\.ckpt is a file of no known kind: .*\.safetensors"):
            find_checkpoint(model)


def test_weights_that_nobody_asks_for_are_left_alone(copy: Path) -> None:
    """Early releases store a constant, and other pipelines a projection that this text encoder has no use for."""
    file = copy / "text_encoder" / "model.safetensors"
    more = {"a.position_ids": torch.arange(77)[None], "text_projection.weight": torch.zeros(16, 16).half()}
    save_file(load_file(file) | more, file, {"format": "pt"})
    use(copy)
    assert dtype_of(file.parent, None) == torch.float32
    bin_file = to_bin(copy, "text_encoder")
    torch.save(more | torch.load(bin_file), bin_file)
    assert dtype_of(file.parent, None) == torch.float32


def test_weights_are_read_by_the_names_that_early_releases_gave_them(sd: Path, copy: Path) -> None:
    """Those of Stable Diffusion 1.x: attention in the VAE, and all of the text encoder."""
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, weight in load_file(file).items():
        for new, old in early.items() if ".attentions." in name else ():
            name = name.replace(new, old)
        weights[name] = weight
    assert weights.keys() != load_file(file).keys()
    save_file(weights, file, {"format": "pt"})
    file = copy / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    found, reference = use(copy), Checkpoint(sd)
    for part in ("vae", "text_encoder"):
        assert_same(*(model.network(part, torch.float32).state_dict() for model in (found, reference)))


@pytest.mark.parametrize("how", ["of today", "of old torch", "with more in it"])
def test_pickled_weights_are_those_of_safetensors(how: str, sd: Path, copy: Path) -> None:
    """`.bin` files of any torch are read, the numbers and texts beside their weights passed over."""
    options: dict[str, Any] = {
        "of today": {},
        "of old torch": {"_use_new_zipfile_serialization": False},
        "with more in it": {"extra": {"epoch": 5, "note": "fine"}},
    }[how]
    for part in FILES:
        to_bin(copy, part, **options)
    found, reference = use(copy), Checkpoint(sd)
    assert found.identity() == reference.identity()
    for part in FILES:
        ours, theirs = (model.network(part, torch.float32).state_dict() for model in (found, reference))
        assert_same(ours, theirs)


def test_a_nested_state_is_no_model_of_diffusers(copy: Path) -> None:
    """What a training script saved is answered in one line."""
    file = to_bin(copy, "vae")
    torch.save({"state_dict": torch.load(file), "step": 3}, file)
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin"):
        use(copy)


def test_frozen_parts_keep_the_half_precision_of_their_pickles(
    copy: Path, cache: Path, tmp_path: Path, encode: Callable[..., None], data: Path
) -> None:
    """The exported pipeline is as small as the base model was."""
    for part in FILES:
        file = to_bin(copy, part)
        torch.save({name: weight.half() for name, weight in torch.load(file).items()}, file)
    encode(copy, data, tmp_path / "cache", max_train_samples=2)
    train(flags(copy, tmp_path / "cache", tmp_path / "out", max_train_steps=1, train_batch_size=1))
    for part in ("vae", "text_encoder"):
        saved = load_file(tmp_path / "out" / part / f"{FILES[part]}.safetensors")
        assert {weight.dtype for weight in saved.values()} == {torch.float16}


def test_a_pointer_of_git_lfs_is_called_one(copy: Path) -> None:
    """A clone without Git LFS looks like a model until its files are read."""
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 334643276\n")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors is a pointer of Git LFS.*git lfs pull"):
        use(copy)


@pytest.mark.parametrize(
    ("parts", "variant", "said"),
    [
        (FILES, "fp16", None),
        (FILES, None, "holds no weights.*for --variant fp16"),
        (["vae", "text_encoder"], "fp16", None),  # as some releases are
        (["vae", "text_encoder"], None, "holds no weights.*for --variant fp16"),
        ([], "fp16", "--variant fp16.*holds no files of it"),
    ],
)
def test_a_variant_is_asked_for_and_taken_part_by_part(
    parts: Any, variant: str | None, said: str | None, copy: Path
) -> None:
    """Where a part has half-precision files alone the flag is named; where it has none of them, its others are used."""
    for part in parts:
        file = copy / part / f"{FILES[part]}.safetensors"
        file.rename(file.with_name(f"{FILES[part]}.fp16.safetensors"))
    if said is None:
        use(copy, variant=variant)
    else:
        with pytest.raises(ModelError, match=said):
            use(copy, variant=variant)


FLUX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: (m / "model_index.json").write_text(json.dumps(FLUX)), "a FluxPipeline whose unet is missing"),
        (lambda m: edit(m / "model_index.json", text_encoder=[None, None]), "whose text_encoder is missing"),  # refiner
        (lambda m: edit(m / "model_index.json", "text_encoder_2"), "whose text_encoder_2 is missing"),
        (lambda m: (m / "model_index.json").write_text('{"_class_name": "Sta'), "model_index.json cannot be read"),
        (lambda m: edit(m / "model_index.json", "_class_name"), "does not say of which class"),
        (lambda m: shutil.rmtree(m / "scheduler"), "scheduler_config.json cannot be read"),
        (lambda m: shutil.rmtree(m / "text_encoder_2"), "text_encoder_2 holds no weights"),
        (lambda m: edit(m / "tokenizer" / "tokenizer_config.json", "model_max_length"), "without model_max_length"),
        (lambda m: edit(m / "tokenizer_2" / "tokenizer_config.json", model_max_length=64), "has 77 positions"),
        (lambda m: edit(m / "vae" / "config.json", "scaling_factor"), "without scaling_factor"),
        (lambda m: edit(m / "vae" / "config.json", scaling_factor=None), "without scaling_factor"),
        (lambda m: edit(m / "vae" / "config.json", scaling_factor="big"), "scaling_factor 'big', expected a number"),
        (lambda m: edit(m / "vae" / "config.json", scaling_factor=0), "scaling_factor 0, expected a number above 0"),
        (lambda m: edit(m / "vae" / "config.json", shift_factor=0.0609), "shifts latents by its shift_factor"),
        (lambda m: edit(m / "vae" / "config.json", latents_mean=[0.1] * 4), "shifts latents by its latents_mean"),
        (lambda m: edit(m / "text_encoder" / "config.json", "hidden_act"), "without hidden_act"),
        (lambda m: edit(m / "unet" / "config.json", cross_attention_dim=16), "unet"),
        (
            lambda m: edit(m / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler"),
            "is of EDMEulerScheduler, expected the noise process of DDPM",
        ),
        (lambda m: EDMEulerScheduler().save_pretrained(m / "scheduler"), "EDMEulerScheduler without beta_end"),
        (
            lambda m: FlowMatchEulerDiscreteScheduler().save_pretrained(m / "scheduler"),
            "FlowMatchEulerDiscreteScheduler without beta_end",
        ),
        (
            lambda m: edit(m / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction"),
            "predicts flow_prediction, expected epsilon or v_prediction",
        ),
        (lambda m: AutoencoderTiny().save_pretrained(m / "vae"), "describes a AutoencoderTiny, expected AutoencoderKL"),
    ],
)
def test_a_model_that_is_not_whole_or_not_ours_is_refused(change: Change, said: str, copy_xl: Path) -> None:
    """Other families, other noise processes, other kinds of VAE, and parts that are gone."""
    change(copy_xl)
    with pytest.raises(ModelError, match=said) as refused:
        use(copy_xl)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("part", "file", "keys", "written"),
    [
        ("vae", "config.json", ["scaling_factor", "force_upcast", "latents_mean", "shift_factor"], "0.12.1"),
        ("scheduler", "scheduler_config.json", ["prediction_type"], "0.9.0"),
    ],
)
def test_early_releases_keep_the_defaults_that_they_were_made_with(
    part: str, file: str, keys: list[str], written: str, copy: Path
) -> None:
    """SD 1.x says neither how its latents are scaled nor what its UNet predicts; a younger file must."""
    edit(copy / part / file, *keys, _diffusers_version=written)
    found = use(copy)
    assert found.prediction_type() == "epsilon"
    assert found.scaling_factor == (0.18215 if part == "vae" else 0.5)
    edit(copy / part / file, _diffusers_version="0.30.0")
    with pytest.raises(ModelError, match=f"without {keys[0]}"):
        use(copy)


@pytest.mark.parametrize(
    ("part", "file", "key"),
    [("scheduler", "scheduler_config.json", "steps_offset"), ("unet", "config.json", "upcast_attention")],
)
def test_what_this_diffusers_wrote_is_known_to_be_whole(part: str, file: str, key: str, copy: Path) -> None:
    """A key that it always writes was lost; in a file of an older version its default may be meant."""
    edit(copy / part / file, key)
    found = find_checkpoint(Model(str(copy)))
    with pytest.raises(ModelError, match=f"{file} .* without {key}"):
        (found.scheduler() if part == "scheduler" else found.network(part, torch.float32))
    edit(copy / part / file, _diffusers_version="0.12.1")
    assert found.scheduler() if part == "scheduler" else found.network(part, torch.float32)


def test_a_tokenizer_of_the_older_layout_is_read_with_its_special_tokens(tmp_path: Path) -> None:
    """Of SD 2.x one file names another padding than the other, and transformers takes that of the token map."""
    folder = early_tokenizer(tmp_path / "old")
    found, hashed = load_tokenizer(folder, 77), hash_tokenizer(folder)
    assert found.pad_token == "!"
    found.save_pretrained(tmp_path / "new")
    assert hash_tokenizer(tmp_path / "new") == hashed
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:3]))
    with pytest.raises(ModelError, match="do not belong together"):
        load_tokenizer(folder, 77)
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ModelError, match=r"special_tokens_map\.json cannot be read"):
        hash_tokenizer(folder)


@pytest.mark.parametrize("layout", ["original", "bare", "diffusers"])
def test_a_vae_in_one_file_takes_the_place_of_the_models_own(
    layout: str, sd: Path, tmp_path: Path, data: Path, encode: Callable[..., None]
) -> None:
    """It is read in any layout, described by the model that it is for, and training knows it from the cache."""
    other = tiny.checkpoint(tmp_path / "other", seed=3)
    whole = load_file(tiny.single_file(other, tmp_path / "whole.safetensors"))
    parts = {name: weight for name, weight in whole.items() if name.startswith("first_stage_model.")}
    if layout == "bare":
        parts = {name.removeprefix("first_stage_model."): weight for name, weight in parts.items()}
    if layout == "diffusers":
        parts = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(parts, file := tmp_path / "vae.safetensors")
    options = {"pretrained_vae_model_name_or_path": str(file), "cache_dir": tmp_path / "hub"}
    assert use(sd, **options).identity() == Checkpoint(sd, vae_folder=other / "vae").identity()
    if layout == "bare":
        encode(sd, data, tmp_path / "cache", max_train_samples=2, **options)
        train(flags(sd, tmp_path / "cache", tmp_path / "out", max_train_steps=1, cache_dir=tmp_path / "hub"))
        saved = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
        assert_same(saved, load_file(other / "vae" / "diffusion_pytorch_model.safetensors"))
