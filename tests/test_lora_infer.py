"""Tests of infer/lora.py: adapters that ip2p-train saved, added to a base by ip2p-infer."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import tiny
from ip2p.encode.base.errors import EditError, SettingsError
from ip2p.encode.base.flags import parse
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.infer import Editor
from ip2p.infer.__main__ import main as infer
from ip2p.infer.config import InferConfig
from ip2p.infer.outputs import settings_in
from ip2p.train.__main__ import main as train
from test_lora import ADAPTERS, CONV_IN, command

PICTURE = tiny.picture(0, (16, 16))


@pytest.fixture(scope="module")
def outputs(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs from one plain Stable Diffusion, of other ranks, targets and seeds; their adapters are far from zero."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {"learning_rate": 0.05, "max_train_steps": 4}
    train(command(sd, cache, folder / "first", lora_alpha=5, **flags))
    train(command(sd, cache, folder / "second", lora_rank=3, lora_targets="all", **flags | {"seed": 2}))
    return folder / "first", folder / "second"


def editor(model: Path, *lora: Path, **options: Any) -> Editor:
    """An editor that shows no progress."""
    made = Editor(model, lora=[str(folder) for folder in lora], **options)
    made.pipeline.set_progress_bar_config(disable=True)
    return made


def weights(made: Editor) -> dict[str, torch.Tensor]:
    return made.pipeline.unet.state_dict()


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], most: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    assert max((first[name].float() - second[name].float()).abs().max().item() for name in second) <= most


def edited(made: Editor) -> np.ndarray:
    (picture,) = made.edit(PICTURE, "make it snowy", seed=1, num_inference_steps=4)
    return np.asarray(picture).astype(int)


def test_adapters_on_the_base_are_the_fused_pipeline(sd: Path, outputs: tuple[Path, Path]) -> None:
    """The same weights, size, kind of pipeline and pictures, which are not those of half the adapters."""
    whole, added = editor(outputs[0]), editor(sd, outputs[0])
    assert_close(weights(added), weights(whole))
    assert type(added.pipeline) is type(whole.pipeline)
    assert (added.resolution, added.pipeline.unet.config.in_channels) == (16, 8)
    assert np.abs(edited(added) - edited(whole)).max() <= 1
    half = editor(sd, outputs[0], lora_weights=[0.5])
    assert np.abs(edited(half) - edited(whole)).max() > 3


def test_adapters_of_sdxl_edit_as_the_fused_pipeline(
    sdxl: Path, data: Path, encode: Callable[..., None], tmp_path: Path
) -> None:
    """With the empty text of training, whatever the base does with none."""
    encode(sdxl, data, tmp_path / "cache")
    train(command(sdxl, tmp_path / "cache", tmp_path / "out", learning_rate=0.05))
    whole, added = editor(tmp_path / "out"), editor(sdxl, tmp_path / "out")
    assert dict(added.pipeline.config)["force_zeros_for_empty_prompt"] is False
    assert_close(weights(added), weights(whole))
    assert np.abs(edited(added) - edited(whole)).max() <= 1


def test_adapters_bring_the_end_of_the_schedule_along(data: Path, encode: Callable[..., None], tmp_path: Path) -> None:
    """A run down to pure noise is edited from there."""
    base = tiny.checkpoint(tmp_path / "base", prediction_type="v_prediction")
    encode(base, data, tmp_path / "cache")
    train(command(base, tmp_path / "cache", tmp_path / "out", rescale_betas_zero_snr=True, max_train_steps=1))
    configs = [
        dict(editor(*folders).pipeline.scheduler.config) for folders in ([tmp_path / "out"], [base, tmp_path / "out"])
    ]
    assert configs[1]["rescale_betas_zero_snr"]
    names = {name for name in configs[0] if not name.startswith("_")}
    assert {name: configs[1][name] for name in names} == {name: configs[0][name] for name in names}


def test_several_adapters_add_up_by_their_weights(sd: Path, outputs: tuple[Path, Path]) -> None:
    """On a base of 4 channels, and on one that takes pictures already; half precision rounds the sum alone."""
    plain = editor(sd, outputs[0], lora_weights=[0.0])
    base, first, second = (weights(made) for made in (plain, *map(editor, outputs)))
    shares = {name: first[name] + 0.5 * (second[name] - base[name]) for name in base}
    both = editor(sd, *outputs, lora_weights=[1, 0.5])
    assert_close(weights(both), shares)
    assert_close(weights(editor(outputs[0], outputs[1], lora_weights=[0.5])), shares)
    half = weights(editor(sd, *outputs, lora_weights=[1, 0.5], dtype="float16"))
    assert {weight.dtype for weight in half.values()} == {torch.float16}
    assert_close(half, {name: weight.half() for name, weight in weights(both).items()}, 0)


def test_the_base_of_adapters_may_take_pictures_already(
    model: str, sd: Path, data: Path, encode: Callable[..., None], tmp_path: Path
) -> None:
    """An InstructPix2Pix model that is adapted further; a plain one has nothing that its adapters are for."""
    encode(Path(model), data, tmp_path / "cache")
    train(command(Path(model), tmp_path / "cache", tmp_path / "out", learning_rate=0.05))
    assert_close(weights(editor(Path(model), tmp_path / "out")), weights(editor(tmp_path / "out")))
    assert not torch.equal(
        weights(Editor(model))["conv_in.weight"], weights(editor(tmp_path / "out"))["conv_in.weight"]
    )


def run(*arguments: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return infer(list(map(str, arguments)))


def test_the_command_edits_with_adapters_and_edits_anew_with_others(
    sd: Path, outputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What adapters and weights a picture was made with is kept in it; without any, nothing of them is."""
    PICTURE.save(tmp_path / "a.png")
    options = ["--image", tmp_path / "a.png", "--prompt", "make it red", "--num_inference_steps", 2]
    options += ["--output", tmp_path / "out" / "a.png"]

    def said(*arguments: object) -> str:
        assert run(*options, *arguments) == 0
        return capsys.readouterr().out.splitlines()[-1]

    lora = ["--model", sd, "--lora", *outputs]
    assert said(*lora).startswith("1 edited")
    assert said(*lora).startswith("1 already there")
    assert said(*lora, "--lora_weights", 1, 0.5).startswith("1 edited")
    found = json.loads(settings_in(tmp_path / "out" / "a.png") or "")
    assert (found["lora"], found["lora_weights"]) == ([str(folder) for folder in outputs], [1.0, 0.5])
    again = shutil.copytree(outputs[0], tmp_path / "again")
    one = ["--model", sd, "--lora", again]
    assert said(*one).startswith("1 edited")
    (again / ADAPTERS).touch()
    assert said(*one).startswith("1 edited")
    assert said("--model", outputs[0]).startswith("1 edited")
    assert not [name for name in json.loads(settings_in(tmp_path / "out" / "a.png") or "") if "lora" in name]


def broken(folder: Path, outputs: tuple[Path, Path], how: str) -> Path:
    """A copy of the first run's adapters that is no good."""
    folder.mkdir()
    for name in (ADAPTERS, CONV_IN):
        shutil.copy2(outputs[0] / name, folder)
    file = folder / ADAPTERS
    if how == "no conv_in":
        (folder / CONV_IN).unlink()
    elif how == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "torn conv_in":
        (folder / CONV_IN).write_bytes(b"")
    else:
        state = load_file(file)
        name = next(iter(state))
        if how == "nan":
            state[name] = state[name] * torch.nan
        elif how == "unknown":
            state["unet.elsewhere.lora_A.weight"] = state[name].clone()
        elif how == "other conv_in":
            base = load_file(folder / CONV_IN)
            save_file(
                {key: 2 * value for key, value in base.items()},
                folder / CONV_IN,
                metadata={"unet": "{}", "scheduler": "{}"},
            )
        save_file(state, file)
    return folder


@pytest.mark.parametrize(
    ("how", "answer"),
    [
        ("no conv_in", "holds no conv_in.safetensors: expected a folder that ip2p-train saved with --lora_rank"),
        ("torn", "cannot be read as weights"),
        ("torn conv_in", "cannot be read"),
        ("nan", "holds numbers that are not finite, in unet."),
        ("unknown", "does not fit the UNet of --model, give the one that it was trained from"),
        ("other conv_in", "these were not trained from the same model, take one of them"),
    ],
)
def test_adapters_that_are_no_good_are_refused_in_a_line(
    sd: Path, outputs: tuple[Path, Path], tmp_path: Path, how: str, answer: str
) -> None:
    """By the name of the folder or file."""
    folder = broken(tmp_path / "bad", outputs, how)
    with pytest.raises(EditError) as refusal:
        editor(sd, *([outputs[0]] if how == "other conv_in" else []), folder)
    assert answer in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_adapters_and_a_model_that_has_them_are_refused(
    sd: Path, sdxl: Path, outputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line with status 2, by the command."""
    PICTURE.save(tmp_path / "a.png")
    options = ["--image", tmp_path / "a.png", "--prompt", "make it red", "--output", tmp_path / "b.png"]
    for model, lora, answer in (
        (
            sd,
            "nowhere",
            f"--lora nowhere holds no {ADAPTERS}: expected a folder that ip2p-train saved with --lora_rank",
        ),
        (sd, sd, f"--lora {sd} holds no {ADAPTERS}"),
        (
            sd,
            outputs[0] / "checkpoint-3",
            f"--lora {outputs[0] / 'checkpoint-3'} holds no adapters yet: `ip2p-train --c",
        ),
        (outputs[0], outputs[0], f"--lora {outputs[0]} is in the model {outputs[0]} already: give the one that it was"),
        (sdxl, outputs[0], f"--lora {outputs[0]} does not fit the UNet of --model"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            run(*options, "--model", model, "--lora", lora)
        errors = capsys.readouterr().err
        assert ("editing" in errors) == (model == sdxl)  # files are looked at before anything else, weights are not
        (line,) = (line for line in errors.splitlines() if line.startswith("ip2p-infer: "))
        assert line.startswith(f"ip2p-infer: {answer}")
    with pytest.raises(SystemExit, match=r"^2$"):  # as before
        run(*options, "--model", sd)
    assert "is not an InstructPix2Pix model: conv_in takes 4 channels, 8 expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--lora_weights 0.5", "--lora_weights belongs to --lora: add that, or leave it out"),
        ("--lora a b --lora_weights 0.5", "--lora_weights 0.5: expected one finite number for each --lora (a b)"),
        ("--lora a --lora_weights inf", "--lora_weights inf: expected one finite number for each --lora (a)"),
        ("--lora a --lora_weights much", "--lora_weights much: expected a number"),
    ],
)
def test_weights_without_adapters_are_refused(flags: str, answer: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(SettingsError) as refusal:
        parse(InferConfig, f"--model m --image a.png --prompt red --output o {flags}".split(), "ip2p-infer")
    assert str(refusal.value) == answer


def test_without_peft_a_line_says_how_to_get_it(
    sd: Path, outputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is loaded."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    monkeypatch.setattr(Checkpoint, "network", None)
    with pytest.raises(EditError, match=r"^--lora needs peft: pip install peft$"):
        editor(sd, outputs[0])
