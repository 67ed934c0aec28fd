"""Tests of train/watch/interrupt.py: a signal at any moment leaves a run that goes on exactly."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from ip2p.train.__main__ import main
from ip2p.train.save import checkpoint
from ip2p.train.watch.metrics import Metrics
from ip2p.train.watch.validate import Validation
from test_train import assert_same, flags, states

WATCHED = {"checkpointing_steps": 9, "num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 13}


@pytest.fixture(scope="module")
def straight(sd: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of 20 undisturbed steps."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    main(flags(sd, cache, output, **WATCHED))
    return output


def at_step(number: int, kind: signal.Signals) -> Callable[..., None]:
    """`Metrics.step`, with a signal before its work at some step."""

    def step(self: Metrics, step: int, *rest: object, original: Callable[..., None] = Metrics.step) -> None:
        if step == number:
            signal.raise_signal(kind)
        original(self, step, *rest)

    return step


def save(folder: Path, state: object, original: Callable[..., None] = checkpoint.write) -> None:
    """`checkpoint.write`, with a signal when its files are there under their temporary name."""
    original(folder, state)
    if "checkpoint-9" in folder.name:
        assert not folder.with_name("checkpoint-9").exists()
        os.kill(os.getpid(), signal.SIGTERM)


def look(self: Validation, *rest: object, original: Callable[..., object] = Validation.decode) -> object:
    """`Validation.decode`, with a signal while the encoders are loaded and the average is in the UNet."""
    signal.raise_signal(signal.SIGTERM)
    return original(self, *rest)


@pytest.mark.parametrize(
    ("place", "change", "number", "last"),
    [
        ((Metrics, "step"), at_step(7, signal.SIGTERM), signal.SIGTERM, (7, 7)),
        ((Metrics, "step"), at_step(7, signal.SIGINT), signal.SIGINT, (7, 7)),
        ((checkpoint, "write"), save, signal.SIGTERM, (9, 17)),  # written beside the training, which is some steps on
        ((Validation, "decode"), look, signal.SIGTERM, (13, 13)),
    ],
    ids=["SIGTERM in a step", "Ctrl-C in a step", "SIGTERM in a checkpoint", "SIGTERM in a validation"],
)
def test_a_signal_ends_the_run_with_a_checkpoint_that_goes_on_exactly(
    sd: Path,
    cache: Path,
    straight: Path,
    tmp_path: Path,
    place: tuple[object, str],
    change: Callable[..., object],
    number: signal.Signals,
    last: tuple[int, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is at hand is finished, then a checkpoint is saved; resumed, the run equals the undisturbed one."""
    arguments = flags(sd, cache, tmp_path, **WATCHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, change)
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    assert stopped.value.code == 128 + number
    stopped_at = int(capsys.readouterr().out.split("stopped at step ")[1].split(":")[0])
    assert last[0] <= stopped_at <= last[1]
    expected = {step for step in (9, stopped_at) if step <= stopped_at}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in expected}
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert_same(states(tmp_path / "checkpoint-20"), states(straight / "checkpoint-20"))


TWICE = """
import os, signal, sys, time
from ip2p.train.save import checkpoint

def save(folder, state, original=checkpoint.write):
    original(folder, state)
    if "checkpoint-9" in folder.name:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # the first one is noted
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

checkpoint.write = save
from ip2p.train.save import checkpoint
from ip2p.train.__main__ import main
main(sys.argv[1:])
"""


def test_a_second_signal_stops_at_once_and_the_torn_checkpoint_is_not_resumed_from(
    sd: Path, cache: Path, straight: Path, tmp_path: Path
) -> None:
    """In the midst of a checkpoint the process is gone; the run goes on from the one before, to the same end."""
    arguments = flags(sd, cache, tmp_path, **WATCHED | {"checkpointing_steps": 3})
    killed = subprocess.run([sys.executable, "-c", TWICE, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGTERM, killed.stderr
    assert "once more stops at once" in killed.stderr
    left = {"checkpoint-3", "checkpoint-6", "checkpoint-9.incomplete"}
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert_same(states(tmp_path / "checkpoint-20"), states(straight / "checkpoint-20"))
    assert not list(tmp_path.glob("*.incomplete"))
