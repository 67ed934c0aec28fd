"""Tests of train/watch/validate.py: looking at a run without touching it."""

import json
import weakref
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import tiny
from ip2p.encode.base.errors import EditError, SettingsError
from ip2p.encode.cache.format import Cache
from ip2p.encode.cached import Samples
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.infer import Editor
from ip2p.train.__main__ import main
from ip2p.train.data.keep import hold_out
from ip2p.train.watch import frozen, validate
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


def test_the_vae_takes_one_picture_at_a_time(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are drawn: what a validation needs of a GPU is predicted for one (`simulate_picture`)."""
    sizes: list[int] = []

    def spy(vae: AutoencoderKL, latents: torch.Tensor, original: Any = AutoencoderKL._decode, **kwargs: Any) -> Any:
        sizes.append(len(latents))
        return original(vae, latents, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "_decode", spy)
    main(flags(sd, cache, tmp_path, **WATCHED | {"max_train_steps": 1, "num_validation_samples": 2}))
    assert sizes == [1] * len(sizes)
    assert len(sizes) > 2


@pytest.mark.parametrize("place", ["the cached pictures", "the edits"])
def test_without_memory_for_pictures_the_run_goes_on(
    sd: Path, cache: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, place: str
) -> None:
    """Hours of training are not lost to a sheet of pictures: it is said, and the weights are as they would be."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    if place == "the edits":
        monkeypatch.setattr(StableDiffusionInstructPix2PixPipeline, "prepare_image_latents", full)
    else:
        monkeypatch.setattr(validate.Validation, "decode", full)
    main(flags(sd, cache, tmp_path, **WATCHED))
    assert capsys.readouterr().out.count("no pictures at step 4: out of memory") == 1
    assert_same(states(tmp_path / "checkpoint-8"), states(watched / "checkpoint-8"))


def edits(monkeypatch: pytest.MonkeyPatch, *words: Any, **changed: Any) -> np.ndarray:
    """What a run of one step draws: rows of original, target and edits."""
    rows: list[Any] = []
    monkeypatch.setattr(validate, "contact_sheet", lambda given, _: rows.extend(given) or Image.new("RGB", (1, 1)))
    main(flags(*words, **WATCHED | {"max_train_steps": 1, "learning_rate": 1e-9} | changed))
    return np.array([[np.asarray(picture) for picture in pictures] for _, pictures in rows], np.int16)


@pytest.fixture(scope="module")
def sdxl_cache(sdxl: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "sdxl"
    encode(sdxl, data, folder)
    return folder


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_pictures_are_those_of_the_whole_pipeline(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline that is saved draws the same, with its text encoders, several at once."""
    model = request.getfixturevalue(family)
    cache = request.getfixturevalue("cache" if family == "sd" else "sdxl_cache")
    found = edits(monkeypatch, model, cache, tmp_path)
    monkeypatch.undo()
    editor = Editor(str(tmp_path))
    editor.pipeline.set_progress_bar_config(disable=True)
    samples = hold_out(Samples.of(Cache.open(cache), None), 3)[1]
    instructions = samples.instructions([Cache.open(cache)])
    for row, instruction in zip(found, [instructions[0], instructions[1]], strict=True):
        expected = editor.edit(Image.fromarray(row[0].astype(np.uint8)), instruction, num_images=2)
        assert abs(row[2:] - np.array([np.asarray(picture) for picture in expected])).max() <= 1


@pytest.fixture(scope="module")
def whole(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Pictures in float32."""
    with pytest.MonkeyPatch.context() as patch:
        return edits(patch, sd, cache, tmp_path_factory.mktemp("whole"), use_ema=False, num_validation_images=1)


HALVES: list[dict[str, Any]] = [
    {"mixed_precision": "bf16"},
    {"weights": "bf16"},
    {"mixed_precision": "bf16", "lora_rank": 2, "lora_targets": "all"},
]


@pytest.mark.parametrize("changed", HALVES, ids=["autocast", "bf16 weights", "adapters"])
def test_precisions_are_mixed_as_on_a_gpu(
    sd: Path, cache: Path, whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """With VAE and text encoders in half precision beside a UNet in whichever, pictures are nearly the same."""
    if "lora_rank" in changed:
        pytest.importorskip("peft")
    for module in (validate, frozen):
        monkeypatch.setattr(module, "half", lambda _: torch.bfloat16)
    found = edits(monkeypatch, sd, cache, tmp_path, use_ema=False, num_validation_images=1, **changed)
    assert abs(found - whole).mean() < 4


def test_text_encoders_are_loaded_once_and_gone(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often pictures are drawn, and before the VAE is there; then again for the pipeline that is saved."""
    loaded, encoders, beside = list[str](), list[Any](), list[bool]()

    def network(self: Checkpoint, part: str, *rest: Any, original: Any = Checkpoint.network) -> Any:
        loaded.append(part)
        beside.extend([any(encoder() for encoder in encoders)] if part == "vae" else [])
        found = original(self, part, *rest)
        encoders.extend([weakref.ref(found)] if part == "text_encoder" else [])
        return found

    monkeypatch.setattr(Checkpoint, "network", network)
    main(flags(sd, cache, tmp_path, **WATCHED | {"num_validation_images": 1}))
    assert loaded == ["unet", "text_encoder", "vae", "vae", "text_encoder", "vae"]
    assert beside == [False, False, True]


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
    with pytest.raises(SettingsError, match=r"--num_validation_samples 10 would hold out all of the 10 samples"):
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
