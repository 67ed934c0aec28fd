"""Tests of train/watch/metrics.py: what a run tells is the same on the bar, in metrics.jsonl and in the trackers."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from ip2p.train.__main__ import main
from ip2p.train.save import checkpoint
from ip2p.train.unet.update import Update
from ip2p.train.watch.metrics import peak, peak_memory, training_flops
from test_train import flags


def test_bar_file_and_tracker_show_the_same_numbers(
    sd: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss, learning rate, rate, share of waiting and memory every few steps, and the time left between them."""
    told = {"report_to": "tensorboard", "logging_steps": 4, "num_validation_samples": 2, "validation_steps": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.train.watch.validate.Validation.draw", lambda *_: None)
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


def test_waiting_for_checkpoints_and_the_time_left_are_told(sd: Path, cache: Path, tmp_path: Path) -> None:
    """Seconds since the line before, and until the end; that of the last step is none."""

    def slow(folder: Path, state: object, original: Callable[..., None] = checkpoint.write) -> None:
        time.sleep(0.5)
        original(folder, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", slow)
        patch.setattr(checkpoint, "SPARE", 2**60)  # no memory for copies
        main(flags(sd, cache, tmp_path, max_train_steps=6, logging_steps=2, checkpointing_steps=3))
    second, fourth, sixth = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert second["checkpoint_seconds"] == sixth["checkpoint_seconds"] == 0
    assert 0.5 < fourth["checkpoint_seconds"] < 5
    assert second["seconds_left"] > 0
    assert sixth["seconds_left"] == 0


@pytest.mark.parametrize("overflows", [1, 4])
def test_norms_that_overflowed_are_left_out(sd: Path, cache: Path, tmp_path: Path, overflows: int) -> None:
    """Of the mean; and where there is no other, of the line: JSON knows no infinity."""
    seen: list[int] = []

    def overflow(self: Update, original: Callable[..., Any] = Update.__call__, **rest: Any) -> Any:
        norm, skipped = original(self, **rest)
        seen.append(len(seen))
        return (norm * torch.inf if len(seen) <= overflows else norm), skipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "__call__", overflow)
        main(flags(sd, cache, tmp_path, max_train_steps=4))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert ("gradient_norm" in text) == (overflows == 1)


def test_the_share_of_a_gpus_peak_is_arithmetic_over_time(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic of a sample is that of its UNet, counted forward and three times; in float32 nothing is said."""
    monkeypatch.setattr("ip2p.train.watch.metrics.peak", lambda _: 2.0)
    main(flags(sd, cache, tmp_path / "half", mixed_precision="bf16", max_train_steps=2))
    (line,) = (json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines())
    tera = training_flops(tiny.unet(8).config, (8, 8, 8), (77, 16), None)
    assert line["share_of_peak"] == pytest.approx(line["samples_per_second"] * tera / 2.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, cache, tmp_path / "full", max_train_steps=2))
    assert "share_of_peak" not in (tmp_path / "full" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("sdxl", [False, True])
def test_arithmetic_is_counted_as_it_would_be_done(sdxl: bool) -> None:
    """As on real tensors with unfused attention, three times; and nothing is left in memory."""
    unet = tiny.unet(8, sdxl=sdxl)
    width = unet.config["cross_attention_dim"]
    added = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)} if sdxl else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(torch.zeros(1, 8, 8, 8), torch.zeros(1), torch.zeros(1, 77, width), added_cond_kwargs=added)
    counted = training_flops(unet.config, (8, 8, 8), (77, width), 32 if sdxl else None)
    assert counted == 3 * counter.get_total_flops() / 1e12 > 0


def test_gpus_are_known_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most special name counts; one that is not listed, and a CPU, have no peak."""
    names = {"NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA GeForce RTX 4090": 165, "Tesla K80": None}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak(torch.device("cuda")) == expected
    assert peak(torch.device("cpu")) is None


def test_memory_is_the_most_that_was_held_at_once() -> None:
    """Without a GPU it is that of the process, in bytes: at least what it holds now."""
    now = psutil.Process().memory_info().rss
    assert now - 2**20 <= peak_memory(torch.device("cpu")) < 100 * now
