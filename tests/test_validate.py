"""Tests of train/watch/validate.py: looking at a run without touching it."""

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import tiny
from ip2p.encode.base.errors import EditError, SettingsError
from ip2p.encode.cache.format import Cache
from ip2p.train.__main__ import main
from ip2p.train.data.samples import Samples, hold_out
from ip2p.train.watch import validate
from ip2p.train.watch.validate import BANDS
from test_train import assert_same, flags, states, unet_file

WATCHED = {"num_validation_samples": 3, "validation_steps": 4, "num_validation_images": 2, "max_train_steps": 8}


@pytest.fixture(scope="module")
def watched(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with validation losses and pictures every 4."""
    output = tmp_path_factory.mktemp("runs") / "watched"
    picture = output.parent / "picture.png"
    tiny.picture(5, (20, 30)).save(picture)
    looked_at = {"val_image_url_or_path": picture, "validation_prompt": "make it red", "report_to": "tensorboard"}
    main(flags(sd, cache, output, **WATCHED, **looked_at))
    return output


def test_weights_with_and_without_validation_are_equal_bit_for_bit(
    sd: Path, cache: Path, watched: Path, tmp_path: Path
) -> None:
    """Validation has its own randomness and puts the weights back; only what is held out is the same in both runs."""
    main(flags(sd, cache, tmp_path, **WATCHED | {"validation_steps": 10**6}))
    assert_same(states(tmp_path / "checkpoint-8"), states(watched / "checkpoint-8"))
    assert_same(load_file(unet_file(tmp_path)), load_file(unet_file(watched)))


def test_losses_are_reported_raw_and_averaged_and_by_band(watched: Path) -> None:
    """metrics.jsonl holds the mean and one loss per band of timesteps, at the steps asked for."""
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in found] == [4, 8]
    for line in found:
        for name in ("validation_loss", "ema_validation_loss"):
            bands = [line[f"{name}_{start}_{start + 250}"] for start in range(0, 1000, 250)]
            assert len(bands) == BANDS
            assert np.mean(bands) == pytest.approx(line[name])
        assert line["validation_loss"] != line["ema_validation_loss"]


def test_pictures_are_drawn_to_a_sheet(watched: Path) -> None:
    """One sheet per validation: the picture of the flags and the held-out pairs with their targets."""
    names = sorted(path.name for path in (watched / "validation").iterdir())
    assert names == ["step-000004.png", "step-000008.png"]
    with Image.open(watched / "validation" / names[0]) as sheet:
        assert len(sheet.getcolors(2**24) or []) > 100
    assert any((watched / "logs").rglob("events.out.tfevents*"))


def test_pictures_are_drawn_once_at_each_validation_and_on_the_main_process_alone(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many batches a step has; other processes have nothing to load and draw."""
    loaded: list[int] = []

    def spy(*arguments: Any, original: Callable[..., Any] = validate.make_pipeline) -> Any:
        loaded.append(len(arguments))
        return original(*arguments)

    monkeypatch.setattr(validate, "make_pipeline", spy)
    changed = WATCHED | {"gradient_accumulation_steps": 3, "num_validation_images": 1}
    main(flags(sd, cache, tmp_path / "main", **changed))
    assert len(loaded) == 2
    monkeypatch.setattr("accelerate.Accelerator.is_main_process", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "other").mkdir()
    main(flags(sd, cache, tmp_path / "other", **changed))
    assert len(loaded) == 2
    assert not (tmp_path / "other" / "validation").exists()


def test_without_memory_for_pictures_the_run_goes_on(
    sd: Path, cache: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Hours of training are not lost to a sheet of pictures: it is said, and the weights are as they would be."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(validate.Validation, "held_out_pictures", full)
    main(flags(sd, cache, tmp_path, **WATCHED))
    assert capsys.readouterr().out.count("no pictures at step 4: out of memory") == 1
    assert_same(states(tmp_path / "checkpoint-8"), states(watched / "checkpoint-8"))


def test_an_edit_that_cannot_be_made_is_a_line_and_no_traceback(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `Editor.edit` refuses in a validation ends the run as any other mistake of the user does."""

    def refuse(*_: object, **__: object) -> None:
        raise EditError("the picture is too small: 4x4 px")

    monkeypatch.setattr(validate.Editor, "edit", refuse)
    with pytest.raises(SystemExit, match="2"):
        main(flags(sd, cache, tmp_path, **WATCHED | {"max_train_steps": 1}))
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1] == "ip2p-train: the picture is too small: 4x4 px"
    assert "Traceback" not in errors


@pytest.mark.slow  # compiles
def test_validation_compiles_nothing(sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches and its mode are others than those of training, for which the UNet would be compiled anew."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(UNet2DConditionModel, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    counts = []
    for name, changed in (("without", {"max_train_steps": 4}), ("with", WATCHED)):
        torch._dynamo.reset()
        compiled.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        main(flags(sd, cache, tmp_path / name, compile=True, **changed))
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0


def test_holding_out_everything_is_refused(cache: Path) -> None:
    """There must be something left to train on."""
    with pytest.raises(SettingsError, match=r"--num_validation_samples 10: .* all of the 10 samples"):
        hold_out(Samples.of(Cache.open(cache), None), 10)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_held_out_pairs_are_never_trained_on(cache: Path, count: int) -> None:
    """Both sides together are all samples, and no image row is on both."""
    samples = Samples.of(Cache.open(cache), None)
    samples = samples.select(np.array([*range(10), 0, 1]))  # two pairs have a second instruction
    kept, held = hold_out(samples, count)
    assert len(held.rows) >= count
    assert len(kept.rows) + len(held.rows) == 12
    assert not set(kept.rows) & set(held.rows)


@pytest.mark.slow  # a training of its own
def test_training_lowers_the_fixed_noise_loss_raw_and_averaged(
    sd: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """200 steps on the data lower the validation loss of held-out samples, and that of the average."""
    encode(sd, tiny.dataset(tmp_path / "data", tiny.pairs(40)), tmp_path / "cache")
    changed = {"num_validation_samples": 8, "validation_steps": 5, "max_train_steps": 200, "learning_rate": 2e-3}
    changed |= {"checkpointing_steps": 1000, "num_validation_images": 1, "ema_decay": 0.9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.train.watch.validate.Validation.draw", lambda *_: None)
        main(flags(sd, tmp_path / "cache", tmp_path / "out", **changed))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "validation_loss" in line]
    for name in ("validation_loss", "ema_validation_loss"):
        assert losses[-1][name] < 0.95 * losses[0][name]


def test_a_picture_without_an_instruction_is_refused(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer names the missing flag, before any step."""
    with pytest.raises(SystemExit):
        main(flags(sd, cache, tmp_path / "out", val_image_url="missing.png"))
    assert "needs a --validation_prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(flags(sd, cache, tmp_path / "out", val_image_url="missing.png", validation_prompt="make it red"))
    assert "missing.png cannot be opened" in capsys.readouterr().err
