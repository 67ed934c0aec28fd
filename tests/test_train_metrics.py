"""Tests of train/metrics.py: what a run tells is the same on the bar, in metrics.jsonl and in the trackers."""

import json
import re
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ip2p.train.__main__ import main
from ip2p.train.metrics import peak_memory
from test_train import flags


def test_bar_file_and_tracker_show_the_same_numbers(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss, learning rate, rate, share of waiting and memory every few steps, and the time left between them."""
    told = {"report_to": "tensorboard", "logging_steps": 4, "num_validation_samples": 2, "validation_steps": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.train.validate.Validation.draw", lambda *_: None)
        main(flags(sd, cache, tmp_path, **told))
    bar = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [4, 8, 12, 16, 20]
    for line in trained:
        shown = (
            f"loss {line['loss']:.4f}, gradient {line['gradient_norm']:.2g}, lr {line['lr']:.1e}, "
            f"{line['samples_per_second']:.1f} samples/s, "
            f"waiting for data {line['waiting_for_data']:.1%}, {line['memory_gib']:.1f} GiB"
        )
        assert shown in bar
    assert re.search(r"8/20 \[\d\d:\d\d<\d\d:\d\d, ", bar)  # time passed and left

    (events,) = {path.parent for path in (tmp_path / "logs").rglob("events*") if path.parent.name == "ip2p"}
    tracker = EventAccumulator(str(events)).Reload()
    for name in ("loss", "lr", "gradient_norm", "seconds_left", "memory_gib", "validation_loss", "ema_validation_loss"):
        told = {event.step: event.value for event in tracker.Scalars(name)}
        assert told == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6), name


def test_memory_is_the_most_that_was_held_at_once() -> None:
    """Without a GPU it is that of the process, in bytes: at least what it holds now."""
    now = psutil.Process().memory_info().rss
    assert now - 2**20 <= peak_memory(torch.device("cpu")) < 100 * now
