"""Tests of train/save/averages.py and `PowerAverage`: averages of any length, made after the training."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import tiny
from ip2p.train.__main__ import main
from ip2p.train.save.averages import AVERAGES, FOLDER, SNAPSHOTS, Averages, Profile, product, solve
from ip2p.train.save.best import BEST, read
from ip2p.train.save.checkpoint import AVERAGE
from ip2p.train.unet.make import make_update
from ip2p.train.unet.weights import LENGTHS, PowerAverage, Precision, exponent
from test_lora import ADAPTERS
from test_need import config
from test_train import assert_same, flags, states, unet_file

POWER = {"ema_power": True, "max_train_steps": 16, "checkpointing_steps": 5, "learning_rate": 0.01}


def density(profile: Profile, count: int = 200_000) -> np.ndarray:
    """A profile as numbers over equal parts of the time from 0 to 1."""
    times = (np.arange(count) + 0.5) / count
    power = exponent(profile.length)
    inside = times < profile.time
    return np.where(inside, (power + 1) * (times / profile.time) ** power / profile.time, 0)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.1, 0.2])
def test_a_length_is_the_standard_deviation_of_the_profile(length: float) -> None:
    """Relative to the time, which the profile has as its end; and the profile's sum is 1."""
    values = density(Profile(1, length))
    times = (np.arange(len(values)) + 0.5) / len(values)
    mean = (values * times).mean()
    assert values.mean() == pytest.approx(1, rel=1e-6)
    assert ((times - mean) ** 2 * values).mean() ** 0.5 == pytest.approx(length, rel=1e-4)


def test_products_and_shares_are_those_of_the_profiles_themselves() -> None:
    """The closed form is the integral, and the shares are least squares on the numbers, summed to 1."""
    profiles = [Profile(time, length) for time in (0.25, 0.6, 1) for length in LENGTHS]
    drawn = np.stack([density(profile) for profile in profiles])
    products = [[product(one, other) for other in profiles] for one in profiles]
    np.testing.assert_allclose(products, drawn @ drawn.T / drawn.shape[1], rtol=1e-4)
    for length in (0.04, 0.07, 0.15):
        target = density(Profile(1, length))
        expected = np.linalg.lstsq(drawn.T, target, rcond=None)[0]
        shares, error = solve(profiles, Profile(1, length))
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=2e-3)
        apart = np.linalg.norm(np.asarray(shares) @ drawn - target) / np.linalg.norm(target)
        assert error == pytest.approx(apart, rel=1e-3)


def test_an_average_counts_each_update_as_its_profile_says() -> None:
    """Update s of t has the part of the power function between (s - 1) / t and s / t."""
    average = PowerAverage([torch.zeros(30)], 0.1)
    for update in range(30):
        average.step([torch.nn.functional.one_hot(torch.tensor(update), 30).float()])
    ends = (torch.arange(31, dtype=torch.float64) / 30) ** (exponent(0.1) + 1)
    torch.testing.assert_close(average.tensors[0].double(), ends.diff(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("length", "most"), [(0.04, 0.06), (0.06, 0.015), (0.075, 0.015), (0.15, 0.04), (0.2, 0.09)])
def test_a_length_that_was_not_tracked_is_as_near_as_its_profile(tmp_path: Path, length: float, most: float) -> None:
    """Against one that was tracked, of weights that are noise, whose average strays as much as the profile does."""
    generator, unet, steps = torch.Generator().manual_seed(0), torch.nn.Linear(100, 100), 800
    update = make_update(config(ema_power=True), unet, Precision("no", copies=False), 1)
    averages, direct = Averages(update, tmp_path), PowerAverage(update.weights.masters, length)
    averages.begin(None, trains=True)
    for step in range(1, steps + 1):
        for master in update.weights.masters:
            master.data.normal_(generator=generator)
        for average in (*update.powers, direct):
            average.step(update.weights.masters)
        averages.snapshot(step, steps)
    assert len(list((tmp_path / FOLDER).iterdir())) == SNAPSHOTS - 1
    found, expected = averages.of_length(length)[0], direct.tensors[0]
    measured = ((found - expected).norm() / expected.norm()).item()
    profiles = [Profile(steps * part / SNAPSHOTS, each) for part in range(1, SNAPSHOTS + 1) for each in LENGTHS]
    assert measured == pytest.approx(solve(profiles, Profile(steps, length))[1], rel=0.15)
    assert measured < most
    for tracked, each in zip(update.powers, LENGTHS, strict=True):
        torch.testing.assert_close(averages.of_length(each), tracked.tensors, rtol=0, atol=1e-6)


def run(sd: Path, cache: Path, output: Path, **changed: object) -> None:
    """Train, as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, cache, output, **POWER | changed))


@pytest.fixture(scope="module", params=[None, 2], ids=["all weights", "lora"])
def trained(
    request: pytest.FixtureRequest, sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run with averages, of which one checkpoint is kept, and the flags that are its own."""
    own = {"lora_rank": request.param, "ema_length": 0.07}
    output = tmp_path_factory.mktemp("runs") / "out"
    run(sd, cache, output, checkpoints_total_limit=2, **own)
    return output, own


def kept(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / FOLDER).iterdir()}


def test_a_run_that_goes_on_has_the_same_averages_bit_for_bit(
    trained: tuple[Path, dict[str, Any]], sd: Path, cache: Path, tmp_path: Path
) -> None:
    """From an earlier checkpoint: later snapshots go and come again; all that is saved is as without a stop."""
    output, own = trained
    assert sorted(int(name.split("-")[0]) for name in kept(output)) == [*range(2, 16, 2)]
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-16"}
    again = shutil.copytree(output, tmp_path / "again")
    shutil.rmtree(again / "checkpoint-16")
    (again / FOLDER / "14-of-another.safetensors").touch()
    run(sd, cache, again, resume_from_checkpoint="latest", **own)
    assert kept(again) == kept(output)
    assert_same(states(again / "checkpoint-16"), states(output / "checkpoint-16"))
    assert AVERAGES in {path.name for path in (again / "checkpoint-16").iterdir()}
    assert_same(load_file(unet_file(again)), load_file(unet_file(output)))


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_who_goes_another_way_leaves_the_snapshots_of_the_first(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same folder they are deleted, and named, once checkpoints that have them are renamed; in another one those
    from before are copied."""
    first = tmp_path / "first"
    run(sd, cache, first, checkpoints_total_limit=0)
    before = kept(first)
    run(sd, cache, tmp_path / "second", resume_from_checkpoint=first / "checkpoint-5", max_train_steps=8)
    assert kept(first) == before
    common = {name: content for name, content in before.items() if int(name.split("-")[0]) <= 5}
    assert len(common) == 2
    others = kept(tmp_path / "second")
    assert {name: others.pop(name) for name in common} == common
    assert [name.split("-")[0] for name in sorted(others)] == ["6", "7"]
    with monkeypatch.context() as patch:
        patch.setattr(Averages, "begin", stop)
        with pytest.raises(SystemExit):
            run(sd, cache, first, resume_from_checkpoint="checkpoint-5", learning_rate=0.02)
    assert kept(first) == before
    assert {path.name for path in first.glob("*checkpoint-*")} == {
        *("checkpoint-5", "abandoned-checkpoint-10", "abandoned-checkpoint-15", "abandoned-checkpoint-16")
    }
    capsys.readouterr()
    run(sd, cache, first, resume_from_checkpoint="latest", learning_rate=0.02)
    gone = ", ".join(sorted(before.keys() - common.keys()))
    assert f"snapshots of averages that are not of this run are deleted: {gone}\n" in capsys.readouterr().out
    after = kept(first)
    assert before.items() & after.items() == common.items()
    assert len(after) == len(before)


def test_another_length_is_saved_afterwards(
    trained: tuple[Path, dict[str, Any]],
    sd: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In another folder or in its own, without training."""
    output, own = trained
    first = load_file(unet_file(output))
    run(sd, cache, tmp_path / "b", resume_from_checkpoint=output, **own | {"ema_length": 0.1})
    said = capsys.readouterr().out
    assert "nothing is trained" in said
    assert "the average of length 0.1 is made of 7 snapshots and the end of the run: its profile is met to 0.0%" in said
    assert not (tmp_path / "b" / FOLDER).exists()
    assert "ema_length: 0.1" in (tmp_path / "b" / "train.yaml").read_text()
    second = load_file(unet_file(tmp_path / "b"))
    assert not torch.equal(first["conv_in.weight"], second["conv_in.weight"])
    if own["lora_rank"]:
        adapters = [load_file(folder / ADAPTERS) for folder in (output, tmp_path / "b")]
        assert not any(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0] if "lora_B" in name)
    else:
        tracked = torch.load(output / "checkpoint-16" / AVERAGES)["tracked"][1]["shadow_params"]
        for name, mean in zip(dict(tiny.unet(8).named_parameters()), tracked, strict=True):
            torch.testing.assert_close(second[name], mean, rtol=0, atol=1e-6)
        again = shutil.copytree(output, tmp_path / "again")
        run(sd, cache, again, resume_from_checkpoint="latest", **own | {"ema_length": 0.1})
        assert_same(load_file(unet_file(again)), second)


def test_the_best_pipeline_has_what_was_validated_and_the_last_one_the_length(
    sd: Path, cache: Path, tmp_path: Path
) -> None:
    """With --keep_best beside --ema_length; another length, saved afterwards, leaves the best one as it is."""
    watched = {"num_validation_samples": 3, "validation_steps": 4, "num_validation_images": 1, "keep_best": "loss"}
    steps = {"max_train_steps": 8, "checkpointing_steps": 4}
    run(sd, cache, tmp_path, **steps, **watched, ema_length=0.07)
    record = read(tmp_path / BEST)
    assert record["score"] == "ema_validation_loss"
    best, last = load_file(unet_file(tmp_path / BEST)), load_file(unet_file(tmp_path))
    average = torch.load(tmp_path / f"checkpoint-{record['step']}" / AVERAGE)["shadow_params"]
    tracked = torch.load(tmp_path / "checkpoint-8" / AVERAGES)["tracked"]
    for name, *expected in zip(dict(tiny.unet(8).named_parameters()), average, *shadows(tracked), strict=True):
        assert torch.equal(best[name], expected[0])
        assert not any(torch.equal(last[name], other) for other in expected)
    run(sd, cache, tmp_path, **steps, **watched, ema_length=0.1, resume_from_checkpoint="latest")
    assert_same(load_file(unet_file(tmp_path / BEST)), best)
    assert read(tmp_path / BEST) == record
    longer = load_file(unet_file(tmp_path))
    for name, mean in zip(dict(tiny.unet(8).named_parameters()), shadows(tracked)[1], strict=True):
        torch.testing.assert_close(longer[name], mean, rtol=0, atol=1e-6)


def shadows(tracked: list[dict[str, Any]]) -> list[list[torch.Tensor]]:
    return [state["shadow_params"] for state in tracked]
