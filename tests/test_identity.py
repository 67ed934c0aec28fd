"""Tests of what a cache belongs to: the weights and vocabulary of its encoders, whatever they are called."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import tiny
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.train.__main__ import main as train

Encode = Callable[..., None]


@pytest.fixture
def copy(sd: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, under another name."""
    return Path(shutil.copytree(sd, tmp_path / "another name"))


def one_value(folder: Path) -> None:
    """Change a single weight by the least that its type can hold."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    value = weights[name].view(-1)[7:8]
    value.copy_(torch.nextafter(value, torch.full_like(value, torch.inf)))
    save_file(weights, file, {"format": "pt"})


def run_train(model: Path, cache: Path, output: Path, **changed: object) -> None:
    flags = {"max_train_steps": 1, "train_batch_size": 2, "report_to": "none"} | changed
    train(tiny.arguments({"pretrained_model_name_or_path": model, "cache": cache, "output_dir": output} | flags))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_training_refuses_encoders_that_differ_in_a_single_value(
    part: str, copy: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the field, both values and what mends it; nothing else is named."""
    old = Checkpoint(copy).identity()[part]
    one_value(copy / part)
    with pytest.raises(SystemExit) as stopped:
        run_train(copy, cache, tmp_path / "out")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    new = Checkpoint(copy).identity()[part]
    differences = [line for line in said.splitlines() if line.startswith("  ")]
    assert differences == [f"  {part}: {old} in the cache, {new} in {copy}"]
    assert "ip2p-encode" in said
    assert "--cache" in said


def test_training_accepts_a_checkpoint_that_was_moved(copy: Path, cache: Path, tmp_path: Path) -> None:
    """A cache that was encoded from one folder is trained from another with the same weights."""
    run_train(copy, cache, tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_vae_of_another_checkpoint_may_move_as_well(
    sd: Path, copy: Path, data: Path, tmp_path: Path, encode: Encode
) -> None:
    """Where the VAE was given by name, another name with the same weights does."""
    one_value(copy / "vae")
    encode(sd, data, tmp_path / "cache", pretrained_vae_model_name_or_path=copy)
    moved = copy.rename(tmp_path / "moved")
    run_train(sd, tmp_path / "cache", tmp_path / "out", pretrained_vae_model_name_or_path=moved)
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("safe", [True, False])
def test_saving_a_checkpoint_again_changes_nothing(
    family: str, safe: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """What diffusers writes anew, in either file format, is the same to a cache."""
    folder = request.getfixturevalue(family)
    kind: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    kind.from_pretrained(folder).save_pretrained(tmp_path / "again", safe_serialization=safe)
    assert Checkpoint(tmp_path / "again").identity() == Checkpoint(folder).identity()


def test_sharded_weights_are_the_same_weights(copy: Path, sd: Path) -> None:
    """Whether a model lies in one file or in several decides nothing."""
    (file,) = (copy / "vae").glob("*.safetensors")
    weights = load_file(file)
    names = sorted(weights)
    for n, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: weights[name] for name in part}, file.with_name(f"{file.stem}-0000{n}-of-00002.safetensors"))
    file.unlink()
    assert Checkpoint(copy).identity() == Checkpoint(sd).identity()


def test_precision_of_the_weights_is_part_of_them(copy: Path, sd: Path) -> None:
    """A checkpoint that was saved in half precision has other numbers."""
    (file,) = (copy / "vae").glob("*.safetensors")
    save_file({name: weight.half() for name, weight in load_file(file).items()}, file, {"format": "pt"})
    assert Checkpoint(copy).identity()["vae"] != Checkpoint(sd).identity()["vae"]


@pytest.mark.parametrize("change", ["merge", "order of merges", "pad token", "length"])
def test_a_tokenizer_that_works_otherwise_is_another(change: str, copy: Path, sd: Path) -> None:
    """Merges, special tokens and length decide what the text encoder sees."""
    folder = copy / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    whole = json.loads((folder / "tokenizer.json").read_text())
    merges = whole["model"]["merges"]
    match change:
        case "merge":
            merges.append(["m", "n"])
            whole["model"]["vocab"]["mn"] = len(whole["model"]["vocab"])
        case "order of merges":
            merges[0], merges[1] = merges[1], merges[0]
        case "pad token":
            config["pad_token"] = "!"
        case "length":
            config["model_max_length"] = 64
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    fields = {name for name, value in Checkpoint(copy).identity().items() if value != Checkpoint(sd).identity()[name]}
    assert fields == {"tokenizer"}


def test_training_refuses_another_tokenizer(
    copy: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One merge more is enough."""
    file = copy / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["model"]["merges"].append(["m", "n"])
    whole["model"]["vocab"]["mn"] = len(whole["model"]["vocab"])
    file.write_text(json.dumps(whole))
    with pytest.raises(SystemExit):
        run_train(copy, cache, tmp_path / "out")
    assert "  tokenizer: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"resolution": 32}, "  resolution: 16 in the cache, 32 asked for"),
        ({"resize_mode": "center_crop"}, "  resize_mode: squash in the cache, center_crop asked for"),
        ({"background": "black"}, "  background: white in the cache, black asked for"),
        ({"mixed_precision": "bf16"}, "  mixed_precision: no in the cache, bf16 asked for"),
    ],
)
def test_encoding_otherwise_into_a_cache_is_refused(
    flags: dict[str, object],
    line: str,
    sd: Path,
    data: Path,
    cache: Path,
    tmp_path: Path,
    encode: Encode,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The field is named with both values, and the cache stays as it is."""
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    before = contents(own)
    with pytest.raises(SystemExit) as stopped:
        encode(sd, data, own, random_flip=True, **flags)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert line in said
    assert any("--cache" in part for part in said)
    assert contents(own) == before


def test_encoding_with_another_vae_into_a_cache_is_refused(
    sd: Path, copy: Path, data: Path, cache: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it comes with the checkpoint or by its own flag."""
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    one_value(copy / "vae")
    for model, flags in ((copy, {}), (sd, {"pretrained_vae_model_name_or_path": copy / "vae"})):
        with pytest.raises(SystemExit):
            encode(model, data, own, random_flip=True, **flags)
        assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if line[:2] == "  "] == ["  vae"]


@pytest.mark.parametrize("flags", [{"encode_batch_size": 3}, {"dataloader_num_workers": 1}, {"on_error": "fail"}])
def test_what_decides_nothing_invalidates_nothing(
    flags: dict[str, object],
    copy: Path,
    data: Path,
    cache: Path,
    tmp_path: Path,
    encode: Encode,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither the folder of the model nor flags about speed and errors cause a sample to be encoded again."""
    own = Path(shutil.copytree(cache, tmp_path / "cache"))
    encode(copy, data, own, random_flip=True, **flags)
    assert "nothing to encode" in capsys.readouterr().out


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
