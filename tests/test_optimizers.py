"""Tests of train/unet/optimizers.py and the flags around it: what is kept of weights and moments, how a run goes on
with it, and which flags go together."""

import copy
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

import tiny
from configs import train_config
from ip2p.encode.base.errors import SettingsError
from ip2p.train.__main__ import main
from ip2p.train.config import TrainConfig
from ip2p.train.unet.make import make_update
from ip2p.train.unet.optimizers import optimizer_over
from ip2p.train.unet.update import Update
from ip2p.train.unet.weights import Average, Weights, choose_precision
from test_optimizer import give_gradients
from test_train import assert_same, flags, states, unet_file

NAMES = ("adamw", "adamw8bit", "adafactor")
KINDS = [("adamw", True), ("adamw8bit", False), ("adamw8bit", True), ("adafactor", False), ("adafactor", True)]


def update_of(unet: torch.nn.Module, name: str, *, rounded: bool, **how: Any) -> Update:
    """The update of a UNet by an optimizer, without clipping."""
    weights = Weights(unet, torch.bfloat16 if rounded else None, rounded=rounded)
    optimizer = optimizer_over(weights.masters, name, lr=1e-2, weight_decay=0.1)
    return Update(weights, optimizer, math.inf, **how)


def laid_out() -> torch.nn.Module:
    """A tiny UNet as runs lay it out."""
    torch.manual_seed(0)
    return tiny.unet(8).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def everything(update: Update) -> dict[str, Any]:
    """A copy of all that a step changes."""
    return copy.deepcopy({"weights": update.weights.state_dict(), "moments": update.state_dict()["state"]})


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("adamw", torch.float32, 8),
        ("adamw", torch.bfloat16, 4),
        ("adamw8bit", torch.float32, 2 + 8 / 256),
        ("adamw8bit", torch.bfloat16, 2 + 8 / 256),
        ("adafactor", torch.float32, 4 / 320 + 4 / 2880),
        ("adafactor", torch.bfloat16, 4 / 320 + 4 / 2880),
    ],
)
def test_what_is_kept_of_each_weight_takes_as_many_bytes(name: str, dtype: torch.dtype, expected: float) -> None:
    """For the weights of a convolution of Stable Diffusion 1.5, in channels_last."""
    conv = torch.nn.Conv2d(320, 320, 3, bias=False).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = Weights(conv)
    update = Update(weights, optimizer_over(weights.masters, name, lr=1e-3), math.inf)
    give_gradients(weights.parameters, 0)
    update()
    (kept,) = update.optimizer.state.values()
    found = sum(value.nbytes for value in kept.values() if isinstance(value, Tensor)) / weights.masters[0].numel()
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "rounded"), KINDS)
def test_steps_are_those_of_float32_but_for_what_is_rounded(name: str, rounded: bool) -> None:
    """Of the library's own optimizer over float32 weights, after steps that go one way; and layouts stay."""
    unet = laid_out()
    reference = copy.deepcopy(unet)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        options = {"scale_parameter": False, "relative_step": False}
        views = [weight.detach().flatten(min(1, weight.dim() - 1)).clone() for weight in reference.parameters()]
        theirs: Any = Adafactor([torch.nn.Parameter(view) for view in views], lr=1e-2, weight_decay=0.1, **options)
    else:
        theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    begin = [weight.detach().clone() for weight in unet.parameters()]
    update = update_of(unet, name, rounded=rounded)
    strides = [weight.stride() for weight in update.weights.masters]
    expected: list[Tensor] = theirs.param_groups[0]["params"]
    for step in range(6):
        give_gradients(update.weights.parameters, 0, 1 + 0.1 * step)
        for weight, gradient in zip(expected, update.weights.parameters, strict=True):
            weight.grad = gradient.grad.float().reshape(weight.shape)  # type: ignore[union-attr]
        assert update()[1] == 0
        theirs.step()
    assert [weight.stride() for weight in update.weights.masters] == strides
    assert any(
        weight.is_contiguous(memory_format=torch.channels_last) for weight in unet.parameters() if weight.ndim == 4
    )
    moved = [one.flatten() - start.flatten() for one, start in zip(expected, begin, strict=True)]
    error = [
        one.detach().float().flatten() - two.flatten() for one, two in zip(unet.parameters(), expected, strict=True)
    ]
    bound = 0.12 if name == "adamw8bit" or rounded else 1e-5
    assert torch.cat(error).norm() < bound * torch.cat(moved).norm()


@pytest.mark.parametrize(("name", "rounded"), KINDS)
def test_a_step_without_a_finite_gradient_changes_no_number_that_is_kept(name: str, rounded: bool) -> None:
    """Neither weights nor moments, in whatever they are kept; and nobody has to wait to know it."""
    update = update_of(laid_out(), name, rounded=rounded)
    give_gradients(update.weights.parameters, 0)
    update()
    before = everything(update)
    give_gradients(update.weights.parameters, 1)
    update.weights.parameters[5].grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
    assert update()[1] == 1
    after = everything(update)
    if name == "adafactor":  # on the host it counts steps that are taken, whether the device skips them or not
        for kept in (before, after):
            for state in kept["moments"].values():
                del state["step"]
    assert_same(after, before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "rounded"), [("adamw", False), *KINDS])
def test_steps_inside_the_backward_pass_are_the_ordinary_ones(name: str, rounded: bool, checkpointing: bool) -> None:
    """Bit for bit, the average included, and no gradient is left when the backward pass ends."""
    found = []
    for backwards in (False, True):
        unet: Any = laid_out()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        update = update_of(unet.train(), name, rounded=rounded, backwards=backwards)
        update.average = Average(update.weights.masters, 0.9)
        norms = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            sample, text = torch.randn(2, 8, 8, 8, generator=generator), torch.randn(2, 77, 16, generator=generator)
            update.backward(unet(sample, torch.tensor([10, 900]), text, return_dict=False)[0].float().square().mean())
            assert all((weight.grad is None) == backwards for weight in update.weights.parameters)
            norms.append(update()[0])
        found.append(everything(update) | {"average": update.average.tensors, "norms": norms})
    assert_same(*found)


def test_a_gradient_that_is_not_finite_moves_nothing_but_the_other_weights_inside_the_backward_pass() -> None:
    """Nobody knows of it before the others have moved; it is told."""
    unet = laid_out()
    update = update_of(unet, "adamw", rounded=True, backwards=True)
    before = copy.deepcopy(update.weights.state_dict())
    factors = torch.ones(len(update.weights.parameters))
    factors[3] = torch.nan
    sums = [weight.float().sum() for weight in update.weights.parameters]
    update.backward((torch.stack(sums) * factors).sum())
    assert update()[1] == 1
    same = [torch.equal(one, other) for one, other in zip(before.values(), update.weights.masters, strict=True)]
    assert [number for number, equal in enumerate(same) if equal] == [3]


def test_gradients_that_are_only_looked_at_change_nothing() -> None:
    """As `--compile` compares them before the first step."""
    unet = laid_out()
    update = update_of(unet, "adamw", rounded=False, backwards=True)
    before = everything(update)
    torch.stack([weight.sum() for weight in unet.parameters()]).sum().backward()
    assert all(weight.grad is not None for weight in unet.parameters())
    assert_same(everything(update), before)


def test_sums_of_gradients_in_bfloat16_lose_little() -> None:
    """With --gradient_accumulation_steps 16 they are off by less than the gradients themselves are in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(100_000, generator=generator)
    parts = [(shared + torch.randn(100_000, generator=generator)).bfloat16() for _ in range(16)]
    total = torch.zeros(100_000, dtype=torch.bfloat16)
    for part in parts:
        total += part
    exact = torch.stack(parts).double().sum(0)
    assert (total.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("rounded", [False, True])
def test_an_average_of_bfloat16_weights_is_float32_and_shown_without_a_loss(rounded: bool) -> None:
    """What is less than a digit of the weights adds up in it; weights and average are back after a validation."""
    weights = Weights(laid_out(), torch.bfloat16, rounded=rounded)
    average = Average(weights.masters, 0.999)
    with torch.no_grad():
        torch._foreach_add_(weights.masters, 1.0)
    average.updates = 10**6
    begin = average.tensors[0].clone()
    average.step(weights.masters)
    torch.testing.assert_close(average.tensors[0], begin.lerp(weights.masters[0].detach().float(), 0.001))
    before = copy.deepcopy((weights.state_dict(), average.tensors))
    with weights.averaged(average):
        for shown, mean in zip(weights.parameters, before[1], strict=True):
            assert torch.equal(shown, mean.bfloat16())
    assert_same((weights.state_dict(), average.tensors), before)


def test_8_bits_are_as_close_to_float32_as_those_of_bitsandbytes() -> None:
    """Where that is installed: thirty steps by the same gradients, of which each weight has its own size."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    begin = torch.randn(64, 32, 3, 3).to(memory_format=torch.channels_last)
    sizes = 10 ** torch.empty_like(begin).uniform_(-3, 0)
    found = {}
    for name in ("float32", "ours", "theirs"):
        weight = torch.nn.Parameter(begin.clone())
        make = {
            "float32": lambda given: torch.optim.AdamW(given, lr=1e-3),
            "ours": lambda given: optimizer_over(given, "adamw8bit", lr=1e-3),
            "theirs": lambda given: bitsandbytes.optim.AdamW8bit(given, lr=1e-3, weight_decay=0.01),
        }
        optimizer: Any = make[name]([weight])
        if name == "ours":
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            weight.grad = sizes * (0.3 + torch.randn(begin.shape, generator=generator))
            optimizer.step()
        found[name] = weight.detach() - begin
    errors = {name: (found[name] - found["float32"]).norm() / found["float32"].norm() for name in ("ours", "theirs")}
    print(errors)
    assert errors["ours"] < errors["theirs"]


VARIANTS: list[dict[str, Any]] = [
    {"optimizer": "adamw8bit"},
    {"optimizer": "adafactor"},
    {"weights": "bf16"},
    {"weights": "bf16", "use_8bit_adam": True, "ema_device": "cpu"},
    {"weights": "bf16", "optimizer": "adafactor", "use_ema": False},
    {
        "weights": "bf16",
        "fused_backward": True,
        "max_grad_norm": "inf",
        "gradient_checkpointing": True,
        "ema_power": True,
    },
    {"ema_device": "cpu", "ema_power": True, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_a_resumed_run_equals_an_undisturbed_one(sd: Path, cache: Path, tmp_path: Path, variant: dict) -> None:
    """With each way to keep weights, moments and average, bit for bit; and the pipeline holds what was trained."""
    changed = {"max_train_steps": 4, "checkpointing_steps": 2} | variant
    validates = variant == VARIANTS[3]
    changed |= {"num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 3} if validates else {}
    main(flags(sd, cache, tmp_path / "straight", **changed))
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, cache, tmp_path / "resumed", resume_from_checkpoint="latest", **changed))
    found, expected = (states(tmp_path / name / "checkpoint-4") for name in ("resumed", "straight"))
    assert_same(found, expected)
    rounded = variant.get("weights") == "bf16"
    assert {weight.dtype for weight in expected["unet"].values()} == {torch.bfloat16 if rounded else torch.float32}
    exported = load_file(unet_file(tmp_path / "straight"))
    averaged = variant.get("use_ema", True)
    assert {weight.dtype for weight in exported.values()} == {
        torch.float32 if averaged or not rounded else torch.bfloat16
    }
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "straight")
    assert torch.equal(pipeline.unet.conv_in.weight, exported["conv_in.weight"].to(pipeline.unet.dtype))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {},
            {"optimizer": "adafactor"},
            "--optimizer adamw --weights fp32: go on with that, not with --optimizer adaf",
        ),
        (
            {"use_8bit_adam": True},
            {},
            "--optimizer adamw8bit --weights fp32: go on with that, not with --optimizer adamw",
        ),
        ({"weights": "bf16"}, {}, "--weights bf16: go on with that, not with --optimizer adamw --weights fp32"),
        ({}, {"weights": "bf16"}, "--weights fp32: go on with that, not with --optimizer adamw --weights bf16"),
    ],
)
def test_another_optimizer_or_other_weights_cannot_go_on(
    sd: Path, cache: Path, tmp_path: Path, before: dict, after: dict, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what was found and what was given."""
    shared = {"max_train_steps": 1, "checkpointing_steps": 1}
    main(flags(sd, cache, tmp_path, **shared | before))
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        main(flags(sd, cache, tmp_path, **shared | after, resume_from_checkpoint="latest"))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("ip2p-train: "))
    assert f"the checkpoint was trained with {said}" in line or said in line


class Net(torch.nn.Module):
    """Takes and gives what a UNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.text = torch.nn.Conv2d(8, 4, 3, padding=1), torch.nn.Linear(16, 4)

    def forward(self, sample: Tensor, _: Any, text: Tensor) -> tuple[Tensor]:
        return (self.conv(sample) + self.text(text).mean(1)[:, :, None, None],)


TABLE = {
    "weights": ("fp32", "bf16"),
    "optimizer": NAMES,
    "use_8bit_adam": (False, True),
    "ema_device": (None, "cpu"),
    "use_ema": (False, True),
    "fused_backward": (False, True),
    "mixed_precision": (None, "no", "fp16", "bf16"),
    "gradient_accumulation_steps": (1, 2),
    "max_grad_norm": (1.0, math.inf),
}


def why_not(given: dict[str, Any]) -> str:
    """The flag that an answer begins with, or nothing where all of them go together."""
    if given["use_8bit_adam"] and given["optimizer"] == "adafactor":
        return "--use_8bit_adam"
    if given["weights"] == "bf16" and given["mixed_precision"] in ("no", "fp16"):
        return "--weights bf16"
    alone = given["max_grad_norm"] == math.inf and given["gradient_accumulation_steps"] == 1
    if given["fused_backward"] and not (alone and given["mixed_precision"] != "fp16"):
        return "--fused_backward"
    return "--ema_device cpu" if given["ema_device"] and not given["use_ema"] else ""


def refusal(config: TrainConfig) -> str:
    """What is said of flags that cannot act."""
    return next(iter(config.idle()), "")


def test_flags_go_together_or_are_refused_in_a_line() -> None:
    """Each of 1,536 combinations: those that are taken train a net, which is a small one, in all of its weights."""
    taken = 0
    for values in itertools.product(*TABLE.values()):
        given = dict(zip(TABLE, values, strict=True))
        config, said = None, ""
        try:
            config = train_config(**given)
            said = refusal(config)
        except SettingsError as error:
            said = str(error)
        expected = why_not(given)
        assert said.startswith(expected), given
        assert (not said) == (not expected), given
        assert "\n" not in said
        if not config or expected:
            continue
        taken += 1
        torch.manual_seed(0)
        net = Net()
        before = copy.deepcopy(net.state_dict())
        precision = choose_precision(config, cuda=True)
        update = make_update(config, net, precision, 1)
        count = config.steps.gradient_accumulation_steps
        for _ in range(count):
            sample, text = torch.randn(2, 8, 4, 4), torch.randn(2, 7, 16)
            with torch.autocast("cpu", precision.dtype, enabled=not precision.half and precision.name != "no"):
                prediction = net(sample, torch.zeros(2), text)[0]
            update.backward(prediction.float().square().mean() / count)
        _, skipped = update()
        assert skipped == 0, given
        assert update.weights.masters[0].dtype == (torch.bfloat16 if given["weights"] == "bf16" else torch.float32)
        moved = [not torch.equal(before[name], weight) for name, weight in update.weights.state_dict().items()]
        assert all(moved), given
        assert (update.average is not None) == given["use_ema"]
    assert taken > 100


def test_several_processes_do_not_step_inside_the_backward_pass() -> None:
    """Each would take its own gradient for that of all."""
    config = train_config(fused_backward=True, max_grad_norm=math.inf)
    with pytest.raises(SettingsError, match=r"--fused_backward .* cannot wait for those of 2 processes: leave it out"):
        make_update(config, Net(), choose_precision(config, cuda=False), 2)


def test_adams_numbers_are_none_of_adafactors() -> None:
    """They would do nothing."""
    config = train_config(optimizer="adafactor", adam_beta1=0.5)
    assert refusal(config).startswith("--adam_beta1 0.5 does nothing with --optimizer adafactor")


@pytest.mark.parametrize("flag", [{"weights": "bf16"}, {"fused_backward": True, "max_grad_norm": math.inf}])
def test_the_launchers_float16_does_not_go_with_what_cannot_skip(flag: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no flag of ours, so it is seen later."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SettingsError, match=r"mixed precision fp16 does not go with --.*: give --mixed_precision bf16"):
        choose_precision(train_config(**flag), cuda=True)
