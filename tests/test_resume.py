"""Tests of train/save/resume.py: what a run goes on with, in which branch, and what is said of what it cannot use."""

import copy
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_leaves

import tiny
from configs import train_config
from damage import damages
from ip2p.encode.base.errors import Ip2pError
from ip2p.encode.base.files import whole
from ip2p.infer.__main__ import main as infer
from ip2p.train.__main__ import main
from ip2p.train.machine import make_accelerator
from ip2p.train.run import Run
from ip2p.train.save import checkpoint
from ip2p.train.save.checkpoint import AVERAGE, MODEL, OPTIMIZER, PROGRESS
from ip2p.train.save.resume import load
from ip2p.train.watch.metrics import Metrics
from ip2p.train.watch.validate import Validation
from test_interrupt import at_step
from test_train import FLAGS, assert_same, flags, states, unet_file

STEPS = {"max_train_steps": 9, "checkpointing_steps": 3, "logging_steps": 1}
WATCHED = STEPS | {"num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 4}


@pytest.fixture(scope="module")
def nine(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of nine steps with three checkpoints, pictures and tensorboard; copy it before changing it."""
    output = tmp_path_factory.mktemp("runs") / "nine"
    main(flags(sd, cache, output, **WATCHED | {"report_to": "tensorboard"}))
    return output


@pytest.fixture
def run(nine: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(nine, tmp_path / "run")


@pytest.fixture
def go_on(sd: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Train on from a checkpoint, as in a process of its own; no pictures are drawn."""
    monkeypatch.setattr(Validation, "draw", lambda *_: None)

    def train(output: Path, wanted: str | Path, **changed: object) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        main(flags(sd, cache, output, **STEPS | changed, resume_from_checkpoint=wanted))

    return train


def refused(
    capsys: pytest.CaptureFixture[str], train: Callable[..., object], *arguments: object, **changed: object
) -> str:
    """The line that a command ends with, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        train(*arguments, **changed)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("ip2p-"))
    return line


def names(output: Path) -> set[str]:
    return {path.name for path in output.glob("*checkpoint-*")}


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def trained_steps(output: Path) -> list[int]:
    return [line["step"] for line in metrics(output) if "loss" in line]


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    """The average of a checkpoint by name, in the order of a UNet's parameters."""
    names = dict(tiny.unet(8).named_parameters())
    return dict(zip(names, torch.load(folder / AVERAGE)["shadow_params"], strict=True))


def tracked_steps(output: Path) -> list[int]:
    (events,) = {path.parent for path in (output / "logs").rglob("events*") if path.parent.name == "ip2p"}
    return [event.step for event in EventAccumulator(str(events)).Reload().Scalars("loss")]


def test_who_goes_back_leaves_a_branch_that_is_never_taken_for_the_newest(
    run: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """From 3 again, stopped at 5: what lay beyond has another name, `latest` is 5, and no step is told twice."""
    (run / "abandoned-checkpoint-9").mkdir()
    before = states(run / "checkpoint-9")
    changed = {"checkpoints_total_limit": 1, "report_to": "tensorboard", "learning_rate": 1e-3} | {
        name: value for name, value in WATCHED.items() if name not in STEPS
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "step", at_step(5, signal.SIGINT))
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            go_on(run, "checkpoint-3", **changed)
    said = capsys.readouterr().out
    assert "checkpoint-6 is not of the run that goes on from checkpoint-3: it is abandoned-checkpoint-6" in said
    assert "abandoned-checkpoint-9-2" in said
    assert names(run) == {"checkpoint-5", *(f"abandoned-checkpoint-{end}" for end in ("6", "9", "9-2"))}
    assert_same(states(run / "abandoned-checkpoint-9-2"), before)
    assert trained_steps(run) == [1, 2, 3, 4, 5]
    go_on(run, "latest", **changed)
    assert names(run) == {"checkpoint-9", *(f"abandoned-checkpoint-{end}" for end in ("6", "9", "9-2"))}
    assert trained_steps(run) == tracked_steps(run) == [*range(1, 10)]
    rates = [
        [line["lr"] for line in metrics(folder) if line["step"] == 4 and "lr" in line]
        for folder in (run, run / "abandoned-checkpoint-9-2")
    ]
    assert rates[0] == pytest.approx([10 * rates[1][0]])
    left = run / "abandoned-checkpoint-9-2" / "validation"
    assert {path.name for path in left.iterdir()} == {f"step-00000{step}.png" for step in (4, 8, 9)}
    assert not any((run / "validation").iterdir())


def test_a_branch_that_was_left_can_be_taken_up_again(run: Path, go_on: Callable[..., None]) -> None:
    """With its own metrics; the other one is left then."""
    held_out = {"num_validation_samples": 2}
    go_on(run, "checkpoint-3", max_train_steps=4, learning_rate=1e-3, **held_out)
    go_on(run, "abandoned-checkpoint-6", max_train_steps=7, **held_out)
    left = {f"abandoned-checkpoint-{step}" for step in (3, 4, 9)}
    assert names(run) == {"checkpoint-6", "checkpoint-7"} | left  # what is gone on with is of the branch again
    straight = metrics(run / "abandoned-checkpoint-9")
    assert [line["loss"] for line in metrics(run) if "loss" in line] == [
        line["loss"] for line in straight if "loss" in line and line["step"] <= 7
    ]


def test_what_was_abandoned_is_neither_lost_nor_begun_anew_unasked(
    run: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill before the next checkpoint of a branch that was taken up leaves one that `auto` goes on from."""
    go_on(run, "checkpoint-3", max_train_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            go_on(run, "abandoned-checkpoint-9", max_train_steps=20, checkpointing_steps=20)
    assert "checkpoint-9" in names(run)
    go_on(run, "auto", max_train_steps=10)
    assert trained_steps(run) == [*range(1, 11)]
    for step in (9, 10):
        (run / f"checkpoint-{step}").rename(run / f"abandoned-checkpoint-{step}")
    for wanted in ("auto", None):
        line = refused(capsys, go_on, run, wanted)
        assert "abandoned-checkpoint-9 alone: continue with --resume_from_checkpoint abandoned-checkpoint-9" in line


def test_what_nothing_is_trained_with_is_recorded_nowhere(
    run: Path, go_on: Callable[..., None], tmp_path: Path
) -> None:
    """The record, and the card, of a pipeline that is made of a checkpoint are those of the run that trained it."""
    recorded = (run / "train.yaml").read_text()
    for output, wanted in ((run, "latest"), (tmp_path / "new", run / "checkpoint-9")):
        go_on(output, wanted, learning_rate=0.5, train_batch_size=1, max_train_samples=3)
        assert (output / "train.yaml").read_text() == recorded
        assert " | 8 | 2 | ip2p " in (output / "README.md").read_text()
        assert "| learning_rate | 0.5 |" not in (output / "README.md").read_text()


def test_weights_that_are_not_finite_end_no_run_as_a_pipeline(
    run: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """However late they come to be: no guard of the last steps would see it."""
    weights = load_file(file := run / "checkpoint-9" / MODEL)
    save_file(weights | {"conv_out.bias": weights["conv_out.bias"] * torch.nan}, file)
    (run / "model_index.json").unlink()
    line = refused(capsys, go_on, run, "latest", use_ema=False)
    assert "no pipeline is saved: numbers of the UNet are not finite, the first in conv_out.bias" in line
    assert not (run / "model_index.json").exists()


def test_a_run_that_does_not_begin_leaves_everything_as_it_was(
    run: Path, go_on: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails before the first step, however late, renames and cuts nothing."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    def fail(_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda _, **__: None)
    monkeypatch.setattr(Run, "check_compiled", fail)
    with pytest.raises(RuntimeError, match="no compiler"):
        go_on(run, "checkpoint-3", compile=True)
    assert {path: path.read_bytes() for path in before} == before
    assert names(run) == {"checkpoint-3", "checkpoint-6", "checkpoint-9"}


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_while_a_branch_is_left_is_made_good_by_the_same_command(
    run: Path, go_on: Callable[..., None], moment: int
) -> None:
    """At each change of the folder: what is there is one branch, or both by their own names."""
    calls = iter(range(100))

    def killed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(calls) == moment:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.train.save.resume.abandon", killed(checkpoint.abandon))
        patch.setattr("ip2p.train.save.resume.whole", killed(whole))
        patch.setattr("ip2p.train.save.resume.shutil.copy2", killed(shutil.copy2))
        with pytest.raises(SystemExit, match="130"):
            go_on(run, "checkpoint-3", max_train_steps=4)
    assert names(run) >= {"checkpoint-3"} | ({"checkpoint-6"} if "checkpoint-9" in names(run) else set())
    go_on(run, "checkpoint-3", max_train_steps=4)
    assert names(run) == {"checkpoint-3", "checkpoint-4", "abandoned-checkpoint-6", "abandoned-checkpoint-9"}
    assert trained_steps(run) == [1, 2, 3, 4]
    assert max(line["step"] for line in metrics(run / "abandoned-checkpoint-9")) == 9


def test_steps_that_a_kill_took_are_told_once(run: Path, go_on: Callable[..., None]) -> None:
    """Lines after the last checkpoint are written anew, and a torn one is no obstacle."""
    shutil.rmtree(run / "checkpoint-9")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    go_on(run, "latest")
    assert trained_steps(run) == [*range(1, 10)]


def begun(sd: Path, cache: Path, output: Path, **changed: Any) -> Run:
    """A run that has loaded what its flags ask for, and would begin now."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = train_config(sd, cache, output, **FLAGS | STEPS | changed)
    return Run(config, *make_accelerator(config))


def test_each_flag_of_the_optimizer_acts_on_a_run_that_goes_on(
    sd: Path, cache: Path, nine: Path, tmp_path: Path
) -> None:
    """It works with the numbers of a run that had these flags from the first step on, and not with those before."""
    changed = {"learning_rate": 3e-3, "adam_beta1": 0.5, "adam_beta2": 0.8, "adam_weight_decay": 0.3}
    changed |= {"adam_epsilon": 1e-3, "scale_lr": True, "lr_scheduler": "polynomial", "lr_warmup_steps": 2}
    changed |= {"max_grad_norm": 0.01, "ema_decay": 0.1}
    shutil.copytree(nine / "checkpoint-3", tmp_path / "checkpoint-3")
    fresh = begun(sd, cache, tmp_path / "fresh", **changed)
    for _ in range(3):
        fresh.update.optimizer.step()
        fresh.lr_scheduler.step()
    before, after = (begun(sd, cache, tmp_path, resume_from_checkpoint="latest", **flags) for flags in ({}, changed))
    numbers = [
        {name: value for name, value in run.update.optimizer.param_groups[0].items() if name != "params"}
        | {"norm": run.update.max_grad_norm, "decay": run.update.average and run.update.average.decay}
        for run in (fresh, after, before)
    ]
    assert numbers[0] == numbers[1]
    touched = {"lr", "initial_lr", "betas", "weight_decay", "eps", "norm", "decay"}
    assert {name for name, value in numbers[1].items() if numbers[2][name] != value} == touched
    for run in (fresh, after):
        run.update.optimizer.step()
        run.lr_scheduler.step()
    assert after.lr_scheduler.get_last_lr() == fresh.lr_scheduler.get_last_lr()


def test_an_average_can_begin_and_end_where_a_run_goes_on(
    nine: Path, tmp_path: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are said: without --use_ema the weights come out, and with it an average that begins with them."""
    ends, begins = tmp_path / "ends", tmp_path / "begins"
    go_on(ends, nine / "checkpoint-3", max_train_steps=4, use_ema=False)
    assert (
        "checkpoint-3 was trained with --use_ema: without it, its average of the weights ends"
        in capsys.readouterr().out
    )
    assert not (ends / "checkpoint-4" / AVERAGE).exists()
    go_on(begins, ends / "checkpoint-4", max_train_steps=4)
    assert "checkpoint-4 was trained without --use_ema: the average begins with its weights" in capsys.readouterr().out
    weights = states(ends / "checkpoint-4")["unet"]
    assert_same(load_file(unet_file(ends)), weights)
    assert_same(load_file(unet_file(begins)), weights)


def test_a_checkpoint_is_exported_whole_where_nothing_is_left_to_train(
    nine: Path, tmp_path: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Into another folder or its own, with the card of that step; nothing is renamed or forgotten, and it is said."""
    for output in (tmp_path / "new", shutil.copytree(nine, tmp_path / "run")):
        before = names(output)
        go_on(output, nine / "checkpoint-6" if output.name == "new" else "checkpoint-6", max_train_steps=5)
        assert "nothing is trained: " in (said := capsys.readouterr().out)
        assert "checkpoint-6 has 6 steps, and 5 are asked for in all" in said
        assert_same(load_file(unet_file(output)), averaged(nine / "checkpoint-6"))
        loss = next(line["loss"] for line in metrics(nine) if line["step"] == 6 and "loss" in line)
        card = (output / "README.md").read_text()
        assert f"| loss | {loss:.4f} |" in card
        assert "6 steps, 12 samples seen" in card
        assert names(output) == before
    assert "step-000004.png" in card
    assert metrics(output) == metrics(nine)


def test_what_cannot_edit_yet_says_which_command_makes_it_a_pipeline(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint, and the folder of a run that was stopped; the command is one that works as it stands."""
    (run / "model_index.json").unlink()
    tiny.picture(0).save(picture := tmp_path / "picture.png")
    for model, step in ((run / "checkpoint-6", 6), (run, 9)):
        line = refused(
            capsys,
            infer,
            tiny.arguments({"model": model, "image": picture, "prompt": "x", "output": tmp_path / "edited"}),
        )
        assert line.count("`") == 2, line
        command = line.split("`")[1].replace("A_NEW_FOLDER", str(tmp_path / f"made-{step}"))
        assert command.startswith("ip2p-train --config ")
        AcceleratorState._reset_state(reset_partial_state=True)
        main(command.split()[1:])
        assert f"{step} steps," in (tmp_path / f"made-{step}" / "README.md").read_text()
        assert (tmp_path / f"made-{step}" / "model_index.json").is_file()


def test_the_output_folder_stands_for_its_newest_checkpoint(
    run: Path, tmp_path: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own or that of another run, unless the own one holds checkpoints already; other folders are none."""
    go_on(run, run, max_train_steps=9)
    assert "checkpoint-9 has 9 steps, and 9 are asked for" in capsys.readouterr().out
    go_on(tmp_path / "other", run, max_train_steps=10)
    assert trained_steps(tmp_path / "other") == [*range(1, 11)]
    line = refused(capsys, go_on, tmp_path / "other", run)
    assert line == (
        f"ip2p-train: {tmp_path / 'other'} holds checkpoint-10 already: continue with --resume_from_checkpoint latest, "
        "or name another --output_dir"
    )
    refused(capsys, go_on, tmp_path / "never", "checkpoint-1")
    assert not (tmp_path / "never").exists()  # known before a folder is made
    (tmp_path / "empty").mkdir()
    line = refused(capsys, go_on, tmp_path / "new", tmp_path / "empty")
    assert line.startswith(f"ip2p-train: {tmp_path / 'empty' / PROGRESS} is missing: ")


@pytest.mark.parametrize("name", [PROGRESS, MODEL, OPTIMIZER, AVERAGE])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_goes_on(
    run: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """An empty file is said to be empty, and what is advised works."""
    file = run / "checkpoint-9" / name
    file.unlink()
    file.touch()
    line = refused(capsys, go_on, run, "latest")
    assert line.startswith(f"ip2p-train: {file} cannot be read: its 0 bytes are no whole file of ")
    advice = f"resume from the one before, --resume_from_checkpoint {run / 'checkpoint-6'}"
    assert line.endswith(advice)
    if name == OPTIMIZER:
        go_on(run, run / "checkpoint-6")
        assert names(run) == {"checkpoint-3", "checkpoint-6", "checkpoint-9", "abandoned-checkpoint-9"}


def test_random_damage_to_a_checkpoint_changes_nothing_or_is_named(sd: Path, cache: Path, run: Path) -> None:
    """Of 150 kinds, what is resumed from is as it was, bit for bit, or a few lines name the file."""
    parts = begun(sd, cache, run, resume_from_checkpoint="latest").state
    expected = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items() if part}
    answers = list[bool]()
    for what, path in damages(run / "checkpoint-9", 150, seed=20):
        for value in tree_leaves([parts[name].state_dict() for name in (MODEL, OPTIMIZER, AVERAGE)]):
            if isinstance(value, torch.Tensor):
                value.fill_(7)
        parts[PROGRESS].step = 7
        problem = None
        try:
            load(path.parent, parts)
        except Ip2pError as error:
            problem = str(error)
        if problem is None:
            if what.endswith(" without told"):  # as older versions wrote it
                parts[PROGRESS].told = expected[PROGRESS]["told"]
            assert_same({name: part.state_dict() for name, part in parts.items() if part}, expected, what)
        else:
            assert str(path) in problem, what
            assert len(problem.splitlines()) <= 3, what
        answers.append(problem is None)
    assert min(answers.count(True), answers.count(False)) > 5


def test_random_damage_is_answered_by_the_command_before_any_work(
    run: Path, go_on: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, a line that names the file, and a folder that is as it was."""
    before = names(run)
    for what, path in damages(run / "checkpoint-9", 6, seed=3, among=lambda path: path.name in (MODEL, OPTIMIZER)):
        assert str(path) in refused(capsys, go_on, run, "latest", max_train_steps=10), what
        assert names(run) == before
