"""Tests of how Python calls what the commands do: flags by keyword, runs one after the other, exceptions."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import tiny
from ip2p.encode import EncodeConfig, Ip2pError
from ip2p.encode.base.errors import Stopped, TrainError
from ip2p.encode.base.flags import parse
from ip2p.train import TrainConfig, train
from ip2p.train.__main__ import main
from ip2p.train.config import refused
from ip2p.train.watch.metrics import Metrics

ENCODE = {"pretrained_model_name_or_path": "m", "dataset_name": "d", "cache": "c"}
TRAIN = {"pretrained_model_name_or_path": "m", "cache": "c", "output_dir": "o"}


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (EncodeConfig, ENCODE | {"cache": Path("c"), "random_flip": True, "split": None, "keep_columns": ["a", "b"]}),
        (EncodeConfig, ENCODE | {"resolution": 512, "cache_text": False, "background": "black"}),
        (TrainConfig, TRAIN | {"cache": ("c", "e"), "cache_weights": [1, 2.5], "learning_rate": 1e-5}),
        (TrainConfig, TRAIN | {"max_grad_norm": float("inf"), "keep": "a > -1", "allow_tf32": False, "seed": 0}),
    ],
)
def test_keywords_are_the_flags_of_the_command(config: Any, flags: dict[str, Any]) -> None:
    """Values of Python stand for what a command line says of them."""
    given = {name: value for name, value in flags.items() if value is not False}
    taken_back = [f"--no_{name}" for name, value in flags.items() if value is False]
    assert config.of(**flags) == parse(config, [*tiny.arguments(given), *taken_back], "ip2p")


@pytest.mark.parametrize(
    ("config", "flags", "told"),
    [
        (EncodeConfig, {"resolution": 0}, "--resolution 0: expected 1 or more"),
        (EncodeConfig, {"resolutoin": 8}, "unknown flag --resolutoin; did you mean --resolution"),
        (EncodeConfig, {"learning_rate": 1e-4}, "--learning_rate belongs to ip2p-train"),
        (EncodeConfig, {"crops": 2}, "--crops 2 belongs to --resize_mode random_crop"),
        (TrainConfig, {"dataset_name": "d"}, "--dataset_name belongs to ip2p-encode: give it to EncodeConfig"),
        (TrainConfig, {"lr_scheduler": "cosin"}, "did you mean cosine"),
        (TrainConfig, {"seed": True}, "--seed: expected one value"),
        (TrainConfig, {"output_dir": None}, "give --output_dir"),
    ],
)
def test_wrong_keywords_are_told_as_wrong_flags_are(config: Any, flags: dict[str, Any], told: str) -> None:
    """As an exception, none of which is a SystemExit."""
    with pytest.raises(Ip2pError, match=told) as error:
        config.of(**(ENCODE if config is EncodeConfig else TRAIN) | flags)
    assert isinstance(error.value, RuntimeError)


def test_the_command_names_the_flag_that_it_has_itself() -> None:
    """In Python the advice is another one than on the command line."""
    assert refused()["resolution"].endswith("or a --dataset_name here as well")


def test_one_process_trains_in_one_precision_and_then_in_another(sd: Path, cache: Path, tmp_path: Path) -> None:
    """accelerate would keep the first one for the whole process."""
    for precision in ("no", "bf16"):
        flags = {"pretrained_model_name_or_path": sd, "cache": cache, "output_dir": tmp_path / precision}
        train(TrainConfig.of(**flags, mixed_precision=precision, max_train_steps=1, report_to="none"))
        assert (tmp_path / precision / "unet").is_dir()


def test_a_signal_raises_after_its_checkpoint(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is the line that the command prints before it exits with the signal's status."""

    def step(self: Metrics, step: int, *rest: Any, original: Any = Metrics.step) -> None:
        original(self, step, *rest)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "step", step)
    flags: dict[str, Any] = {"pretrained_model_name_or_path": sd, "cache": cache, "max_train_steps": 5}
    flags |= {"report_to": "none", "train_batch_size": 2}
    with pytest.raises(Stopped, match="stopped at step 1: continue with --resume_from_checkpoint latest") as stopped:
        train(TrainConfig.of(**flags, output_dir=tmp_path / "a"))
    assert isinstance(stopped.value, TrainError)
    assert (tmp_path / "a" / "checkpoint-1").is_dir()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        main(tiny.arguments(flags | {"output_dir": tmp_path / "b"}))
    assert f"{stopped.value}\n" in capsys.readouterr().out
