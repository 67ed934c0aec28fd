"""Tests of train/unet/update.py and fused.py: a step does in one pass what PyTorch's functions do."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

import tiny
from ip2p.encode.base.errors import SettingsError
from ip2p.train.unet import make as module
from ip2p.train.unet import optimizers
from ip2p.train.unet.make import disagreement, takes_one_pass
from ip2p.train.unet.update import LossScale, Update
from ip2p.train.unet.weights import Average, Weights

CPU = torch.device("cpu")


def adamw(weights: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=True)


def give_gradients(parameters: list[Tensor], seed: int, factor: float = 1.0) -> None:
    """The same random gradients for the same seed, in the precision of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for weight in parameters:
        weight.grad = (factor * torch.randn(weight.shape, generator=generator)).to(weight)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_a_step_is_clipping_adamw_and_averaging_one_after_the_other(max_norm: float) -> None:
    """As diffusers' scripts do it with `clip_grad_norm_` and `EMAModel`, whether it clips or not."""
    unet = tiny.unet(8)
    reference = copy.deepcopy(unet)
    theirs, ema = adamw(list(reference.parameters())), EMAModel(reference.parameters(), decay=0.99, foreach=True)
    weights = Weights(unet)
    average = Average(weights.masters, 0.99)
    update = Update(weights, adamw(weights.masters), max_norm, average)
    for step in range(4):
        give_gradients(weights.parameters, step)
        norm, skipped = update()
        give_gradients(list(reference.parameters()), step)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
        theirs.step()
        ema.step(reference.parameters())
        torch.testing.assert_close(norm, expected)
        assert skipped == 0
    assert all(weight.grad is None for weight in weights.parameters)
    for one, other in zip(unet.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average.tensors, ema.shadow_params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [None, torch.float16])
def test_a_step_without_a_finite_gradient_changes_nothing_but_is_told(half: torch.dtype | None) -> None:
    """Weights, copies, moments and Adam's count of steps stay; the next step goes on as if it had not been."""
    weights = Weights(tiny.unet(8), half)
    update = Update(weights, adamw(weights.masters), 1.0)
    give_gradients(weights.parameters, 0)
    update()
    state = copy.deepcopy((weights.state_dict(), update.state_dict()["state"]))
    give_gradients(weights.parameters, 1)
    weights.parameters[3].grad.flatten()[0] = torch.nan  # type: ignore[union-attr]
    norm, skipped = update()
    assert not norm.isfinite()
    assert skipped == 1
    now = weights.state_dict(), update.state_dict()["state"]
    for before, after in zip(state[0].values(), now[0].values(), strict=True):
        assert torch.equal(before, after)
    for before, after in zip(state[1].values(), now[1].values(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    for copied, master in zip(weights.parameters, weights.masters, strict=True):
        assert torch.equal(copied, master.to(copied))


def test_the_average_moves_in_the_steps_that_are_asked_for_alone() -> None:
    """`--ema_steps` counts optimizer steps."""
    weights = Weights(tiny.unet(8))
    average = Average(weights.masters, 0.5)
    update = Update(weights, adamw(weights.masters), 1.0, average)
    for step in range(6):
        give_gradients(weights.parameters, step)
        update(averages=step % 3 == 2)
    assert average.updates == 2


def test_gradients_of_scaled_losses_are_the_same_gradients() -> None:
    """What is multiplied for float16 is divided again before it is clipped, and the norm is told without it."""
    results = []
    for scaled in (False, True):
        weights = Weights(tiny.unet(8))
        scale = LossScale(CPU) if scaled else None
        update = Update(weights, adamw(weights.masters), 1.0, scale=scale)
        with torch.no_grad():
            for weight in weights.masters:
                weight.fill_(0.5)
        give_gradients(weights.parameters, 0, scale.value.item() if scale else 1.0)
        results.append((update()[0], *weights.masters))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scale_of_losses_moves_as_that_of_pytorch() -> None:
    """Through overflows and long stretches without, and from one to the other by way of a checkpoint."""
    mine, theirs = LossScale(CPU), torch.amp.GradScaler("cpu", growth_interval=LossScale.INTERVAL)
    weight = torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([weight], lr=0.0)
    for step in range(2 * LossScale.INTERVAL + 10):
        overflows = step in (3, 4, 2500)
        mine.update(torch.tensor(float(overflows)))
        theirs.scale((weight * (torch.inf if overflows else 1)).sum()).backward()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        if step in (0, 3, 4, 2004, 2005, 2500):
            assert mine.state_dict() == theirs.state_dict(), step
    assert mine.value == theirs.get_scale() == 2.0**14
    again = LossScale(CPU)
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == mine.state_dict()


def test_moments_from_a_checkpoint_take_the_order_of_the_weights() -> None:
    """A file holds them contiguous; the kernels want them as the weights lie, in channels_last."""
    unet = tiny.unet(8).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = Weights(unet)
    update = Update(weights, adamw(weights.masters), 1.0)
    give_gradients(weights.parameters, 0)
    update()
    saved = copy.deepcopy(update.state_dict())
    for state in saved["state"].values():
        state.update({name: value.contiguous() for name, value in state.items()})
    update.load_state_dict(saved)
    for master, state in update.optimizer.state.items():
        assert state["exp_avg"].stride() == master.stride()
    give_gradients(weights.parameters, 1)
    update()


def test_a_checkpoint_of_another_optimizer_is_refused_with_what_to_do() -> None:
    """That of bitsandbytes kept its moments under other names, in an earlier version."""
    weights = Weights(tiny.unet(8))
    update = Update(weights, adamw(weights.masters), 1.0)
    with pytest.raises(SettingsError, match="moments of bitsandbytes: go on with the version that wrote it"):
        update.load_state_dict({"state": {0: {"step": 1, "state1": torch.zeros(1)}}, "param_groups": []})


INTERPRETED = """
import torch
from ip2p.train.unet.make import disagreement
from ip2p.train.unet.optimizers import optimizer_over
from ip2p.train.unet.update import Update
from ip2p.train.unet.weights import Weights
for half in (None, torch.float16, torch.bfloat16):
    print(disagreement(torch.device("cpu"), half))
for half, name in ((torch.bfloat16, "adamw"), (torch.bfloat16, "adamw8bit"), (None, "adamw8bit")):
    print(disagreement(torch.device("cpu"), half, name, rounded=half is not None))
found = []
for backwards in (False, True):  # tensor by tensor it draws the same
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(70, 50), torch.nn.Linear(50, 3))
    weights = Weights(net, torch.bfloat16, rounded=True)
    optimizer = optimizer_over(weights.masters, "adamw8bit", lr=0.1)
    update = Update(weights, optimizer, float("inf"), fused=True, backwards=backwards)
    for step in range(2):
        update.backward(torch.stack([weight.float().sin().sum() for weight in weights.parameters]).sum())
        update()
    found.append([*weights.masters, *(value for kept in optimizer.state.values() for value in kept.values())])
print(max((one.float() - other.float()).abs().max().item() for one, other in zip(*found)))
"""


@pytest.mark.slow
def test_the_kernel_does_what_pytorch_does() -> None:
    """Interpreted on the CPU: tensors of all sizes, channels_last, a skipped step, steps with and without the average.

    The interpreter cuts numbers off where it makes them bfloat16, which a GPU rounds: these copies may be one step of
    their last digit away, which for numbers up to 4 is 2 ** -6.
    """
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exact, half, bfloat, *rounded, inside = map(float, done.stdout.split())
    assert exact < 2e-6
    assert half < 2e-6
    assert bfloat <= 2**-6
    assert max(rounded) < 2e-6
    assert inside == 0


@pytest.mark.parametrize(
    ("architecture", "gradient", "aligned", "weight", "moment"),
    [
        (75, "fp16", 4, "fp32", "fp32"),
        (80, "fp32", 1, "fp32", "fp32"),
        (90, "bf16", 16, "fp32", "fp32"),
        (100, "bf16", 8, "fp32", "fp32"),
        (80, "bf16", 16, "bf16", "bf16"),
        (90, "bf16", 8, "bf16", "bf16"),
        (80, "fp32", 16, "fp32", "u8"),
        (90, "bf16", 16, "bf16", "u8"),
    ],
)
def test_the_kernel_compiles_for_gpus_that_are_not_here(
    architecture: int, gradient: str, aligned: int, weight: str, moment: str
) -> None:
    """Down to machine code; and whole blocks are read and written 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ip2p.train.unet.fused import BLOCK, WARPS, _kernel

    constants: dict[str, object] = {"ALIGNED": aligned, "BLOCK": BLOCK, "AVERAGES": True, "EIGHT": moment == "u8"}
    constants |= {"COPIES": gradient != weight}
    kinds = dict.fromkeys(_kernel.arg_names, "fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("average", "numbers", "scale1", "scale2", "levels"), "*fp32")
    kinds |= dict.fromkeys(("first", "second"), f"*{moment}") | {"weight": f"*{weight}"}
    kinds |= {"gradient": f"*{gradient}", "copy": f"*{gradient}", "gradients": "*i64", "places": "*i64"}
    kinds |= {"sizes": "*i32", "blocks": "*i32", "keys": "*i32", "number": "i32"}
    source = ASTSource(
        fn=_kernel,
        signature=kinds,
        constexprs={(_kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds.values()) if kind[0] == "*"},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert len(built.asm["cubin"]) > 1000
    # Two each of weights, moments and average, where they are float32; 8 numbers of 16 bits are one of them.
    assert built.asm["ptx"].count("st.global.v4") >= {"fp32": 8, "bf16": 5, "u8": 2}[moment]


def test_where_the_kernel_cannot_be_had_the_run_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No compiler, another answer, or none at all: a line says why, and PyTorch's functions do it."""

    def raises(*_: object, **__: object) -> float:
        raise RuntimeError("Failed to find C compiler.\nand so on")

    found: dict[str, tuple[Callable[..., float], str]] = {
        "raises": (raises, "instead of one: Failed to find C compiler."),
        "differs": (lambda *_, **__: 0.1, "instead of one: its kernel is off by 1.0e-01"),
        "is no number": (lambda *_, **__: float("nan"), "instead of one: its kernel is off by nan"),
    }
    for answer, said in found.values():
        monkeypatch.setattr(module, "disagreement", answer)
        assert not takes_one_pass(torch.device("cuda"), None)
        assert said in capsys.readouterr().out.splitlines()[0]
    monkeypatch.setattr(module, "disagreement", lambda *_, **__: 1e-7)
    assert takes_one_pass(torch.device("cuda"), None)
    assert not takes_one_pass(CPU, None)


@pytest.mark.parametrize(
    ("half", "name"),
    [(torch.float16, "adamw"), (torch.bfloat16, "adamw"), (torch.bfloat16, "adamw8bit"), (None, "adamw8bit")],
)
def test_the_comparison_of_both_ways_finds_a_wrong_one(
    half: torch.dtype | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that the kernel changes is compared: a planted mistake in any of them shows."""
    rounded, eight = half == torch.bfloat16, name == "adamw8bit"
    original = Update._by_torch

    def wrong(what: str, by: float) -> Callable[..., None]:
        def change(self: Update, *rest: object) -> None:
            original(self, *rest)  # type: ignore[arg-type]
            state = self.optimizer.state[self.weights.masters[2]]
            assert self.average
            targets = {"weight": self.weights.masters[2], "average": self.average.tensors[2]} | state
            targets["copy"] = self.weights.parameters[2]
            target = targets[what].detach().view(-1)
            target[0] += 70 if target.dtype == torch.uint8 else by

        return change

    monkeypatch.setattr(Update, "_one_pass", original)
    assert disagreement(CPU, half, name, rounded=rounded) == 0
    scales = ("exp_avg_scale", "exp_avg_sq_scale") if eight else ()
    for what in ("weight", "average", "exp_avg", "exp_avg_sq", "step", *scales, *(("copy",) if not rounded else ())):
        for by in (0.5, torch.nan):
            monkeypatch.setattr(Update, "_one_pass", wrong(what, by))
            assert not disagreement(CPU, half, name, rounded=rounded) < 1e-5, (what, by)


def test_a_kernel_that_rounds_in_another_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearest, though no number is then more than a step of its last digit away."""
    original = Update._by_torch

    def nearest(self: Update, *rest: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizers, "to_bfloat16", lambda values, _: values.bfloat16())
            original(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Update, "_one_pass", nearest)
    assert disagreement(CPU, torch.bfloat16, rounded=True) > 1e-5
