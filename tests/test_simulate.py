"""Tests of the simulated training step: what it counts is what can be counted by hand, and what real tensors give."""

import contextlib
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ip2p.train.memory import as_on_cuda

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
baselines, counting, shapes, simulate = map(importlib.import_module, ("baselines", "counting", "shapes", "simulate"))
TEXT = shapes.text_config(16, 2, 2)
TINY = shapes.Shape(
    {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 2,  # heads
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    (4, 8, 8, 8),
    (TEXT,),
)
PIXELS = 4 * 8 * 8 * 8  # of a batch of 4 with 8 channels


def counted(work: Callable[[], object]) -> Any:
    """The count of what runs, on tensors without contents."""
    with counting.Count() as count:
        work()
    return count


def image(**options: Any) -> Tensor:
    return torch.zeros(4, 8, 8, 8, **options)


def test_an_addition_reads_two_tensors_and_writes_one() -> None:
    """Bytes are those of the elements: of a tensor that is given twice, and of what `expand` repeats, each once."""
    with FakeTensorMode():
        a, b, row = torch.zeros(100), torch.zeros(100), torch.zeros(1)
        for work, elements in (
            (lambda: a + b, 300),
            (lambda: a + a, 200),
            (lambda: a + row.expand(100), 201),
            (lambda: a.add_(b), 300),
            (lambda: a.copy_(b), 200),
            (lambda: a.zero_(), 100),
            (lambda: torch._foreach_add_([a], [b]), 300),
        ):
            count = counted(work)
            assert (count.kernels, count.outside) == (1, 4 * elements)


def test_views_and_copies_that_are_none_cost_nothing() -> None:
    """What only describes memory that is there launches no kernel; a change of layout does."""
    with FakeTensorMode():
        a = image()
        for work in (
            lambda: a.view(4, -1).transpose(0, 1)[3:].detach(),
            lambda: a.contiguous().float().to(memory_format=torch.contiguous_format),
            lambda: torch.empty_like(a),
        ):
            count = counted(work)
            assert (count.kernels, count.outside) == (0, 0)
        assert counted(lambda: a.to(memory_format=torch.channels_last)).outside == 2 * 4 * PIXELS


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_block_under_autocast_casts_as_on_cuda(layout: torch.memory_format) -> None:
    """Image, weight and bias are cast down, the norm's input up, and SiLU stays there; NHWC is undone for the norm."""
    with as_on_cuda():
        block = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.GroupNorm(4, 8), torch.nn.SiLU())
        block.to(memory_format=layout)  # type: ignore[call-overload]
        given = image().contiguous(memory_format=layout)
        with counting.Count() as count, torch.autocast("cpu", torch.bfloat16):
            assert block(given).dtype == torch.float32
    relaid = layout == torch.channels_last
    assert count.kernels == len("image weight bias convolution up norm SiLU".split()) + relaid
    assert count.bytes["casts"] == (4 + 2) * (PIXELS + 8 * 8 * 9 + 8) + (2 + 4) * PIXELS
    assert count.bytes["copies"] == relaid * 2 * 4 * PIXELS
    assert count.bytes["SiLU and GELU"] == 2 * 4 * PIXELS
    assert count.flops == {"convolutions": 2 * PIXELS * 8 * 9}
    assert count.hidden == 0


def test_in_half_precision_a_norm_runs_as_it_is() -> None:
    """Without autocast nothing is cast."""
    with as_on_cuda():
        norm, given = torch.nn.GroupNorm(4, 8, dtype=torch.bfloat16), image(dtype=torch.bfloat16)
        count = counted(lambda: norm(given))
    assert (count.kernels, count.bytes["casts"]) == (1, 0)
    assert count.bytes["hidden further passes"] == 2 * PIXELS


def test_a_convolution_in_channels_last_copies_what_is_not() -> None:
    """cuDNN takes the layout of the weight: the image is copied in both passes, a gradient that fits is not."""
    conv = torch.nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with counting.Count() as forward:
        result = conv(image(requires_grad=True))
    assert result.is_contiguous(memory_format=torch.channels_last)
    backward = counted(lambda: result.backward(torch.zeros_like(result)))
    assert (forward.hidden, backward.hidden) == (1, 1)
    assert forward.bytes["hidden layout copies"] == backward.bytes["hidden layout copies"] == 2 * 4 * PIXELS
    assert forward.bytes["hidden further passes"] == 2 * 4 * PIXELS  # the bias is added in place
    assert backward.bytes["hidden further passes"] == 4 * PIXELS  # its gradient is a sum


def test_only_what_the_backward_pass_needs_is_kept() -> None:
    """A linear layer keeps its input and SiLU its own; a sum needs nothing, and weights are there anyway."""
    with FakeTensorMode():
        linear = torch.nn.Linear(8, 8)
        saved = counting.Saved(linear.parameters())
        with saved:
            (torch.nn.functional.silu(linear(torch.zeros(5, 8))) + 1).sum()
    assert saved.bytes == 2 * 4 * 5 * 8


strided = torch.empty_strided


@functools.cache
def step(setting: str, fake: bool = True, checkpointing: bool = False) -> Any:
    """Forward and backward counts of a tiny UNet, with contents or without, and the bytes kept in between."""
    case = simulate.Case("tiny", 64, 2, checkpointing=checkpointing)
    with pytest.MonkeyPatch.context() as patch:
        if not fake:
            patch.setattr(simulate, "FakeTensorMode", contextlib.nullcontext)
            patch.setattr(torch, "empty_strided", lambda *args, **options: strided(*args, **options).fill_(0.01))
        return simulate.step(TINY, case, setting)


@pytest.mark.parametrize("setting", simulate.SETTINGS)
def test_tensors_without_contents_count_as_real_ones_do(setting: str) -> None:
    """A step that is really computed has the same kernels, bytes, FLOPs and saved tensors.

    But for one thing: the real gradient of the loss is contiguous, so that the last convolution copies it.
    """
    fake, real = step(setting), step(setting, fake=False)
    real[1].hidden -= 1
    real[1].bytes["hidden layout copies"] -= 2 * 2 * (2 * 4 * 8 * 8)
    for name in ("kernels", "hidden", "bytes", "flops"):
        assert [getattr(count, name) for count in fake[:2]] == [getattr(count, name) for count in real[:2]]
    assert fake[2] == real[2]


def test_half_precision_and_checkpointing_change_what_they_should() -> None:
    """Half precision needs fewer kernels and keeps less; checkpointing keeps less still, and computes forward again."""
    (forward, backward, saved), autocast = step("half"), step("autocast")
    assert forward.kernels < autocast[0].kernels
    assert backward.kernels < autocast[1].kernels
    assert saved < autocast[2]
    again = step("half", checkpointing=True)
    assert again[0].kernels == forward.kernels
    assert backward.kernels < again[1].kernels <= forward.kernels + backward.kernels
    assert again[2] < saved / 2


def test_one_more_operation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activation that doubles its result costs one kernel in each direction for each time it is used."""
    before = step("half")
    silu, times = torch.nn.functional.silu, []

    def doubled(tensor: Tensor, inplace: bool = False) -> Tensor:
        times.append(1)
        return silu(tensor) * 2

    monkeypatch.setattr(torch.nn.functional, "silu", doubled)
    after = step.__wrapped__("half")
    assert times
    assert [now.kernels - then.kernels for now, then in zip(after[:2], before[:2], strict=True)] == [len(times)] * 2


def test_the_parts_of_the_update_move_what_is_said() -> None:
    """Clipping, diffusers' average and its replacement, counted on tensors without contents."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.zeros(100_000))
        weight.grad, average = torch.zeros(100_000), torch.zeros(100_000)
        ema = EMAModel([weight], foreach=True)
        clip = counted(lambda: torch.nn.utils.clip_grad_norm_([weight], 1.0, foreach=True))
        theirs = counted(lambda: ema.step([weight]))
        lerp = counted(lambda: torch._foreach_lerp_([average], [weight.detach()], 0.1))
    for count, part in (
        (clip, "clip_grad_norm_"),
        (theirs, "average, diffusers' EMAModel"),
        (lerp, "average, torch._foreach_lerp_"),
    ):
        assert count.outside == pytest.approx(100_000 * simulate.PARTS[part], abs=500)


@pytest.mark.parametrize(
    ("half", "ema", "per_weight"), [(True, True, 38), (True, False, 30), (False, True, 40), (False, False, 32)]
)
def test_the_one_kernel_reads_and_writes_each_state_once(half: bool, ema: bool, per_weight: int) -> None:
    """The norm reads the gradients before; then the states, and in half precision the copy."""
    assert simulate.fused_update(half=half, ema=ema) == per_weight


def test_the_time_of_a_step_is_that_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, all else and the update make up the step, and the batch over it is the rate beside the goal."""
    monkeypatch.setitem(shapes.SIZES, "tiny", TINY)
    monkeypatch.setattr(simulate, "CASES", [simulate.Case("tiny", 64, 2, goal=5), simulate.Case("sd15", 256, 64)])
    monkeypatch.setattr(sys, "argv", ["simulate", "--only", "tiny", "--results", str(tmp_path)])
    simulate.main()
    rows = json.loads((tmp_path / "simulate.jsonl").read_text())["rows"]
    assert not any("sd15" in name for name in rows)
    for setting in simulate.SETTINGS:
        name = f"tiny 64 px b2, {setting}"
        times = {row: rows[row]["value"] for row in rows if row.startswith(f"{name}: time of ")}
        step = times.pop(f"{name}: time of the step")
        assert len(times) == 5
        assert step == pytest.approx(sum(times.values()))
        assert rows[f"{name}: rate"]["value"] == pytest.approx(2000 / step)
        assert rows[f"{name}: rate"]["at_least"] == 5


def test_a_model_is_filled_as_it_is_laid_out() -> None:
    """With the strides, precision and names of its weights."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)).half()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strides = {name: weight.stride() for name, weight in model.named_parameters()}
    with FakeTensorMode():
        simulate.fill(model)
        assert {name: weight.stride() for name, weight in model.named_parameters()} == strides
        assert all(weight.device.type == "cpu" and weight.dtype == torch.half for weight in model.parameters())
