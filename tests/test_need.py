"""Tests of train/need.py: what a run needs is said, and where it does not fit, what would."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import build, changed
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.train import need
from ip2p.train.__main__ import main
from ip2p.train.config import TrainConfig
from ip2p.train.memory import Shapes
from ip2p.train.need import GIB, Model, changes, check_memory, needed
from ip2p.train.unet.make import make_update
from ip2p.train.unet.weights import Precision, choose_precision
from ip2p.train.watch.frozen import Frozen
from test_train import flags

CUDA = torch.device("cuda")
TEXT = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FROZEN = Frozen(dict(tiny.vae().config), (TEXT,), vae_overflows=False)
TINY = Model(dict(tiny.unet(8).config), Shapes((8, 8, 8), (77, 16)), FROZEN)

# Of so large pictures that its VAE takes more than its adapters.
BIG = Model(dict(tiny.unet(8).config), Shapes((8, 32, 32), (77, 16)), FROZEN)


def config(**values: Any) -> TrainConfig:
    places = {"pretrained_model_name_or_path": "model", "cache": "cache", "output_dir": "out"}
    return build(TrainConfig, {**places, "train_batch_size": 4, "mixed_precision": "bf16", **values})


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_weights_moments_and_average_are_those_of_a_run(optimizer: str, weights: str) -> None:
    """To the byte, but for the counts of steps."""
    run = config(optimizer=optimizer, weights=weights, use_ema=True, ema_power=True)
    found, unet = needed(run, TINY), tiny.unet(8)
    update = make_update(run, unet, choose_precision(run, cuda=True), 1)
    kept = [value for state in update.optimizer.state.values() for value in state.values()]
    assert found.moments == sum(value.nbytes for value in kept if isinstance(value, torch.Tensor) and value.dim())
    held = {id(weight): weight.nbytes for weight in (*update.weights.masters, *update.weights.parameters)}
    assert found.weights == sum(held.values())
    assert update.average
    means = [mean for average in (update.average, *update.powers) for mean in average.tensors]
    assert found.average == sum(mean.nbytes for mean in means)


def test_an_average_on_the_host_takes_nothing() -> None:
    assert needed(config(use_ema=True, ema_device="cpu"), TINY).average == needed(config(), TINY).average == 0
    assert needed(config(ema_power=True, ema_device="cpu"), TINY).average == 0


def test_sums_of_gradients_are_there_beside_activations() -> None:
    """From the second batch on."""
    one = needed(config(optimizer="adamw8bit"), TINY)
    summed = needed(config(optimizer="adamw8bit", gradient_accumulation_steps=2), TINY)
    assert one.activations < summed.activations <= one.activations + one.gradients == one.activations + one.weights


def test_adapters_are_all_that_has_moments() -> None:
    """And gradients; the frozen weights are in half precision."""
    pytest.importorskip("peft")
    whole, adapters = needed(config(), TINY), needed(config(lora_rank=2), TINY)
    assert adapters.moments < whole.moments
    assert adapters.weights < whole.weights


@pytest.mark.parametrize("given", [{}, {"use_ema": True}, {"lora_rank": 4}, {"mixed_precision": "fp16"}])
def test_each_change_needs_less(given: dict[str, Any]) -> None:
    """And is a configuration that the command takes."""
    found = [(words, needed(other, TINY).most) for words, other in changes(config(**given))]
    whole = [size for words, size in found if "--lora_rank" not in words]
    assert whole == sorted(whole, reverse=True)
    assert len({words for words, _ in found}) == len(found) > 2
    for words, other in changes(config(**given)):
        assert other == build(TrainConfig, dump_of(other)), words


def test_without_peft_no_adapters_are_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate needs no more than the run does."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not any("--lora_rank" in words for words, _ in changes(config()))


@pytest.mark.parametrize("given", [{"use_8bit_adam": True}, {"optimizer": "adafactor"}])
def test_who_spares_moments_already_is_not_told_to(given: dict[str, Any]) -> None:
    """The same optimizer under its other name is no change, and 8 bits need more than Adafactor."""
    assert not any("adamw8bit" in words for words, _ in changes(config(**given)))


def dump_of(configuration: TrainConfig) -> dict[str, Any]:
    from ip2p.encode.base.flags import dump

    return dump(configuration)


def test_steps_inside_the_backward_pass_sum_no_gradients() -> None:
    """That change is left out, and what remains needs less than with all gradients."""
    run = config(fused_backward=True, max_grad_norm=math.inf)
    assert not any("accumulation" in words for words, _ in changes(run))
    kept, dropped = (needed(changed(one, gradient_checkpointing=True), TINY) for one in (config(), run))
    assert dropped.most < kept.most


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(free)))
    monkeypatch.setattr(need, "LIBRARIES", 0)


def test_what_fits_is_said_and_begun(
    sd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside what is free; on a CPU nothing is said."""
    reader, base = Reader(Cache.open(cache)), Checkpoint(sd)
    check_memory(config(), base, reader, torch.device("cpu"))
    assert capsys.readouterr().out == ""
    with_free(monkeypatch, GIB)
    check_memory(config(), base, reader, CUDA)
    assert "this run needs about 0.0 GiB" in (said := capsys.readouterr().out)
    assert "1.0 GiB are free" in said


def test_what_does_not_fit_is_refused_with_what_would(sd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest changes that do; and begun all the same if the user says so."""
    reader, base = Reader(Cache.open(cache)), Checkpoint(sd)
    model = Model.of(base, reader)
    monkeypatch.setattr(need, "LIBRARIES", 0)
    sizes = [(words, needed(other, model).card) for words, other in changes(config(use_ema=True))]
    with_free(monkeypatch, sizes[2][1] + 1)
    with pytest.raises(SettingsError, match=f"it would fit with {sizes[2][0]};"):
        check_memory(config(use_ema=True), base, reader, CUDA)
    with_free(monkeypatch, 1000)
    with pytest.raises(SettingsError, match="no flags make it fit; --ignore_memory begins all the same"):
        check_memory(config(), base, reader, CUDA)
    check_memory(changed(config(), ignore_memory=True), base, reader, CUDA)


def test_an_estimate_is_a_table_and_trains_nothing(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each set of flags, the given ones first."""
    main(flags(sd, cache, tmp_path / "out", estimate=True, mixed_precision="bf16"))
    title, head, first, *others = capsys.readouterr().out.splitlines()
    assert "for 16 x 16 px, batches of 2" in title
    names = "weights moments average text gradients activations validation in all card of with"
    assert head.split() == names.split()
    assert first.endswith("8 GB  the flags that are given")
    assert len(others) >= 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ({}, "weights moments average gradients activations"),
        ({"gradient_checkpointing": True, "lora_rank": 1}, "weights moments average validation"),
    ],
)
def test_a_run_needs_what_its_higher_peak_does(given: dict[str, Any], others: str) -> None:
    """Of a step, or of a validation where there is any, when gradients and activations are gone."""
    if "lora_rank" in given:
        pytest.importorskip("peft")
    found = needed(config(**given, train_batch_size=1, num_validation_samples=1), BIG)
    assert found.most == sum(getattr(found, name) for name in others.split())
    assert needed(config(**given, train_batch_size=1), BIG).validation == 0 < found.validation


def test_clip_comes_when_the_pictures_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the larger of both is what a validation needs; nothing is asked of a model where none sees the edits."""
    scored = {"num_validation_samples": 1, "score_samples": 1}
    drawn = needed(config(**scored), TINY).validation
    for size in (GIB, 1):
        monkeypatch.setattr(need, "clip_bytes", lambda name, _, size=size: {"large": size}[name])
        assert needed(config(**scored, clip_model="large"), TINY).validation == max(size, drawn)


def test_a_validation_alone_that_does_not_fit_is_refused(
    sd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than found out at the first one, which would be without pictures."""
    reader, base = Reader(Cache.open(cache)), Checkpoint(sd)
    monkeypatch.setattr(need, "simulate_picture", lambda *_, **__: GIB)
    need._simulated_picture.cache_clear()
    with_free(monkeypatch, GIB)
    with pytest.raises(SettingsError, match="it would fit without --num_validation_samples"):
        check_memory(config(num_validation_samples=1), base, reader, CUDA)
    need._simulated_picture.cache_clear()


def test_several_gpus_draw_beside_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are never gone there."""
    one = needed(config(num_validation_samples=1), TINY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = needed(config(num_validation_samples=1), TINY)
    assert two.validation == one.validation + one.gradients
    assert two.activations > one.activations


def test_an_estimate_reads_no_weights(sd: Path, cache: Path, tmp_path: Path, capsys: Any) -> None:
    """Configurations are enough, of a model that encoded the cache; of another one it is refused."""
    bare = tmp_path / "model"
    shutil.copytree(sd, bare, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    main(flags(bare, cache, tmp_path / "out", estimate=True, num_validation_samples=1))
    assert "with\n" in capsys.readouterr().out
    file = bare / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 24}))
    with pytest.raises(SystemExit):
        main(flags(bare, cache, tmp_path / "out", estimate=True))
    assert f"{cache} holds text of 16 numbers, and {bare} takes 24" in capsys.readouterr().err


def test_precision_of_a_gpu_is_what_is_estimated() -> None:
    """Also where there is none: copies of float32 masters."""
    assert choose_precision(config(), cuda=True) == Precision("bf16", copies=True)
    assert needed(config(), TINY).weights == 6 * sum(weight.numel() for weight in tiny.unet(8).parameters())
