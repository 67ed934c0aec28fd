"""Tests of train/unet/rounding.py: what is rounded at random is right in the mean, and trains as float32 does."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ip2p.train.unet.optimizers import optimizer_over
from ip2p.train.unet.rounding import BLOCK, code, draw, from_8_bits, step_key, tensor_key, to_8_bits, to_bfloat16

DRAWS = 10_000_000
Rounding = Callable[[Tensor, Tensor], Tensor]


def key(step: int, number: int = 0, seed: int = 0) -> Tensor:
    return tensor_key(step_key(seed, torch.tensor(float(step))), number)


def bias(rounding: Rounding, value: float, drawn: Tensor) -> float:
    """How far the mean of what a number is rounded to is from it, in steps of its last digit in bfloat16."""
    number = torch.tensor(value)
    ulp = 2.0 ** (torch.frexp(number).exponent - 8).item()
    rounded = rounding(number.expand(len(drawn)).contiguous(), drawn)
    return (rounded.double().mean().item() - number.double().item()) / ulp


@pytest.mark.parametrize("which", range(3))
def test_rounding_is_right_in_the_mean(which: int) -> None:
    """To a thousandth of a step over ten million draws, in each of the three streams; to nearest it is not."""
    drawn = draw(key(5), DRAWS)[which]
    values = 1.0 + torch.tensor([0.0, 0.1, 0.25, 0.5, 0.77]) / 128, torch.tensor([-0.0123, 3.3e-9, -6.02e23])
    for value in torch.cat(values).tolist():
        assert abs(bias(to_bfloat16, value, drawn)) < 1e-3, value
    assert bias(lambda values, _: values.bfloat16(), 1 + 0.1 / 128, drawn[:10]) == pytest.approx(-0.1, abs=1e-4)


def test_what_is_drawn_depends_on_seed_step_tensor_and_position_alone() -> None:
    """Streams of neighbors in any of them have nothing in common, shifted or not, and a part is drawn as the whole."""
    size = 100_000
    streams = [draw(key(*place), size)[0] for place in ((7,), (8,), (7, 1), (7, 0, 1))] + list(draw(key(7), size)[1:])
    centered = [stream.double() - 32767.5 for stream in streams]
    for one, other in itertools.combinations(centered, 2):
        for shift in (0, 1, 2, 256):
            product = (one[shift:] * other[: size - shift]).mean() / 65536**2 * 12
            assert abs(product) < 5 / size**0.5
    for stream in centered:
        for shift in (1, 2, 3, 256, 2048):
            assert abs((stream[shift:] * stream[:-shift]).mean()) * 12 / 65536**2 < 5 / size**0.5
    assert torch.equal(draw(key(7), size)[0], draw(key(7), 3 * size)[0][:size])


def test_what_bfloat16_holds_stays_as_it_is() -> None:
    """Zeros, infinities and all others, so that a step that changes nothing leaves every bit."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    rounded = to_bfloat16(numbers.float(), draw(key(1), len(numbers))[0])
    assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_are_right_in_the_mean_and_stay_as_they_are(signed: bool) -> None:
    """Each number comes back as a level beside it, in the mean itself; levels come back as they are."""
    levels, generator = code(signed=signed), torch.Generator().manual_seed(0)
    assert len(levels) == 256
    assert levels.max() == 1
    assert (levels.diff()[:253] > 0).all()
    values = torch.randn(3 * BLOCK + 17, generator=generator) * 10.0 ** torch.randint(-3, 1, (1,), generator=generator)
    values = values if signed else values.abs() + 1e-3 * values.abs().max()
    total, count = torch.zeros_like(values, dtype=torch.float64), 4000
    for step in range(count):
        numbers, scale = to_8_bits(values, levels, draw(key(step), len(values))[1])
        total += from_8_bits(numbers, levels, scale)
    assert (numbers.dtype, scale.shape) == (torch.uint8, (4,))  # pyright: ignore[reportPossiblyUnboundVariable]
    scales = scale.repeat_interleave(BLOCK)[: len(values)]  # pyright: ignore[reportPossiblyUnboundVariable]
    step = 0.015 * scales  # the widest between two levels
    assert ((total / count - values).abs() < 5 * 0.5 * step / count**0.5).all()
    back = from_8_bits(numbers, levels, scale)  # pyright: ignore[reportPossiblyUnboundVariable]
    again = to_8_bits(back, levels, draw(key(99), len(values))[1])
    assert torch.equal(from_8_bits(again[0], levels, again[1]), back)


def test_the_root_of_a_second_moment_is_never_zero() -> None:
    """A step is divided by it: where one gradient is a billion times another, that would be a leap."""
    values = torch.full((BLOCK,), 1e-9)
    values[0] = 1.0
    numbers, scale = to_8_bits(values, code(signed=False), draw(key(0), BLOCK)[2])
    assert from_8_bits(numbers, code(signed=False), scale).min() > 1e-7


class Denoiser(torch.nn.Sequential):
    """Tells noise from pictures of 16 numbers that are edited by adding something: 14,128 weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(33, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU()]
        super().__init__(*layers, torch.nn.Linear(96, 16))

    def loss(self, edit: Tensor, generator: torch.Generator) -> Tensor:
        """Computed in float32 whatever the weights are; their gradients are in their precision."""
        picture, noise = torch.randn(2, 32, 16, generator=generator)
        time = torch.rand(32, 1, generator=generator)
        edited = picture + edit / 2
        wide = {name: weight.float() for name, weight in self.named_parameters()}
        noisy = torch.cat([(1 - time) * edited + time * noise, picture, time], dim=1)
        return F.mse_loss(functional_call(self, wide, noisy), noise - edited)

    def fit(self, edit: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> float:
        """Learn an edit; the loss on other pictures after that."""
        generator = torch.Generator().manual_seed(7)
        for _ in range(steps):
            self.loss(edit, generator).backward()
            optimizer.step()
            optimizer.zero_grad()
        generator.manual_seed(99)
        with torch.no_grad():
            return sum(self.loss(edit, generator).item() for _ in range(50)) / 50


@pytest.mark.slow  # about two minutes
@pytest.mark.parametrize("rate", [1e-5, 1e-4])
def test_training_in_bfloat16_is_as_good_as_in_float32(rate: float) -> None:
    """2,000 steps on another edit than the one learned before, at rates for fine-tuning: within 1 % of its loss.

    The control: bfloat16 weights that are rounded to nearest end far off, since most of them never move.
    """
    before, edit = (torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    base = Denoiser()
    base.fit(before, torch.optim.AdamW(base.parameters(), lr=1e-3, fused=True), 1500)
    losses = {}
    for name in ("float32", "plain bfloat16", "adamw", "adamw8bit"):
        model = copy.deepcopy(base)
        weights = list((model if name == "float32" else model.bfloat16()).parameters())
        if name in ("float32", "plain bfloat16"):
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(weights, lr=rate, fused=True)
        else:
            optimizer = optimizer_over(weights, name, lr=rate)
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
        losses[name] = model.fit(edit, optimizer, 2000)
    print(f"learning rate {rate}: {losses}")
    exact = losses["float32"]
    assert losses["adamw"] == pytest.approx(exact, rel=0.01)
    assert losses["adamw8bit"] == pytest.approx(exact, rel=0.01)
    assert losses["plain bfloat16"] > 2.5 * exact
