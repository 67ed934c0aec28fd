"""Tests of train/memory.py: what a step takes is known without taking it."""

from typing import Any

import pytest
import torch

import tiny
from ip2p.train import memory
from ip2p.train.memory import Live, Shapes, as_on_cuda, passes, simulate
from ip2p.train.unet.weights import Precision

PRECISIONS = [Precision("no", copies=False), Precision("bf16", copies=False), Precision("bf16", copies=True)]
SHAPES = {False: Shapes((8, 8, 8), (77, 16)), True: Shapes((8, 8, 8), (77, 48), 32)}  # of tiny SD and SDXL


def unet(sdxl: bool) -> Any:
    return tiny.unet(8, sdxl=sdxl).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "autocast", "copies"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_tensors_without_contents_take_what_real_ones_take(
    sdxl: bool, checkpointing: bool, precision: Precision
) -> None:
    """To the byte, for each number of samples; but that norms in half precision keep their statistics in float32.

    So they do on a GPU, where on a CPU these are in half precision as well.
    """
    for batch in (1, 3):
        real = torch.nn.Module.to(unet(sdxl), precision.half)
        found = passes(real, SHAPES[sdxl], batch, precision, checkpointing=checkpointing)
        config, how = dict(unet(sdxl).config), {"checkpointing": checkpointing, "norms": False}
        simulated = simulate(config, SHAPES[sdxl], batch, precision, **how)  # type: ignore[arg-type]
        assert simulated._replace(peak=found.peak) == found
        assert simulated.peak == pytest.approx(found.peak, rel=0.02 if precision.half else 0)


def test_casts_are_those_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a CPU under PyTorch's own has as many bytes alive, once norms are as a GPU's."""
    ours = passes(unet(False), SHAPES[False], 2, PRECISIONS[1], checkpointing=False)
    monkeypatch.setattr(memory, "as_on_cuda", lambda _: as_on_cuda())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert passes(unet(False), SHAPES[False], 2, PRECISIONS[1], checkpointing=False) == ours
    assert passes(unet(False), SHAPES[False], 2, PRECISIONS[1], checkpointing=False).peak > ours.peak


def test_what_is_counted_is_what_is_alive() -> None:
    """Of memory that was there before nothing, of views nothing, and what is gone no more."""
    weight = torch.randn(10, 10)
    with Live([weight]) as live:
        one = weight.t() @ weight  # 400 bytes; the view of the weight is none of them
        other = one.view(100)[:50]
        assert live.now == 400
        del one
        assert live.now == 400
        del other
        assert live.now == 0
        big = torch.zeros(1000)
        del big
    assert live.most == 4000


def test_gradients_that_are_dropped_are_not_there_together() -> None:
    """With checkpointing the gradients are most of it, and then the largest one remains."""
    config, shapes, precision = dict(unet(False).config), SHAPES[False], PRECISIONS[0]
    kept = simulate(config, shapes, 1, precision, checkpointing=True)
    dropped = simulate(config, shapes, 1, precision, checkpointing=True, drop=True)
    gradients = 4 * kept.numbers
    assert kept.peak > gradients
    assert dropped.peak < kept.peak - gradients / 3


def test_the_kernels_for_norms_keep_less() -> None:
    """They keep their input once, where PyTorch keeps what SiLU is given as well."""
    config, shapes, precision = dict(unet(False).config), SHAPES[False], PRECISIONS[2]
    with_them = simulate(config, shapes, 16, precision, checkpointing=False)
    without = simulate(config, shapes, 16, precision, checkpointing=False, norms=False)
    assert 0.7 * without.peak < with_them.peak < 0.97 * without.peak


def test_weights_are_counted_with_their_masters() -> None:
    """Four bytes each, or two and four."""
    config = dict(unet(False).config)
    whole = simulate(config, SHAPES[False], 1, PRECISIONS[0], checkpointing=False)
    half = simulate(config, SHAPES[False], 1, PRECISIONS[2], checkpointing=False)
    assert whole.numbers == half.numbers == sum(weight.numel() for weight in unet(False).parameters())
    assert whole.static == 4 * whole.numbers
    assert half.static == 6 * half.numbers
