"""Tests of train/unet/weights.py: what is trained stays float32, whatever the UNet computes in."""

import contextlib
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

import tiny
from ip2p.train import machine
from ip2p.train.__main__ import main
from ip2p.train.unet.fit import Misfit
from ip2p.train.unet.load import widen
from ip2p.train.unet.weights import Average, Precision, Weights
from test_train import assert_same, flags, states, unet_file

STARTER = Path(__file__).parents[1] / "examples" / "openmoji" / "starter" / "unet"


def inputs(unet: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text and target of four samples."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(4, 77, unet.config["cross_attention_dim"], generator=generator)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    latents, target = (torch.randn(4, channels, 8, 8, generator=generator) for channels in (8, 4))
    return latents, timesteps, text, target


def gradients(unet: Any, seed: int) -> list[Tensor]:
    """Those of a mean squared error, float32."""
    latents, timesteps, text, target = inputs(unet, seed)
    unet.zero_grad()
    (unet(latents, timesteps, text, return_dict=False)[0].float() - target).square().mean().backward()
    return [weight.grad.float().clone() for weight in unet.parameters()]


def test_without_copies_the_masters_are_the_parameters() -> None:
    """In float32 there is one set of weights, and nothing to bring up to date."""
    unet = tiny.unet(8)
    weights = Weights(unet)
    assert all(one is other for one, other in zip(weights.masters, unet.parameters(), strict=True))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_unet_of_copies_takes_and_gives_float32(half: torch.dtype) -> None:
    """Who calls it need not know: the pipeline's own way to call it works, and no weight is float32."""
    unet = tiny.unet(8)
    expected = unet(*inputs(unet)[:3], return_dict=False)[0]
    weights = Weights(unet, half)
    assert {weight.dtype for weight in unet.parameters()} == {half}
    assert {weight.dtype for weight in weights.masters} == {torch.float32}
    for output in (unet(*inputs(unet)[:3], return_dict=False)[0], unet(*inputs(unet)[:3]).sample):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected, rtol=0, atol=0.05)


def test_copies_follow_their_masters() -> None:
    """A change too small for the copies adds up in the masters."""
    unet = tiny.unet(8)
    weights = Weights(unet, torch.bfloat16)
    start = [weight.clone() for weight in weights.masters]
    for _ in range(100):
        with torch.no_grad():
            torch._foreach_add_(weights.masters, 1e-4)
    weights.refresh()
    for before, copied in zip(start, unet.parameters(), strict=True):
        torch.testing.assert_close(copied.float(), before + 0.01, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_the_average_is_shown_for_a_while_and_everything_is_back_after_an_error(half: torch.dtype | None) -> None:
    """Inside, the UNet computes with the average; outside, weights and average are as they were bit for bit."""
    unet = tiny.unet(8)
    weights = Weights(unet, half)
    average = Average([torch.full_like(master, 0.5) for master in weights.masters], 0.9)
    before = [weight.detach().clone() for weight in (*weights.masters, *unet.parameters())]
    inside = False
    with contextlib.suppress(KeyError), weights.averaged(average):
        inside = all((weight == 0.5).all() for weight in unet.parameters())
        raise KeyError
    assert inside
    after = [weight.detach() for weight in (*weights.masters, *unet.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all((mean == 0.5).all() for mean in average.tensors)


@pytest.mark.parametrize("averages", [False, True])
def test_what_was_trained_comes_out_in_float32(averages: bool) -> None:
    """The pipeline gets the masters, or the average, with all their digits."""
    weights = Weights(tiny.unet(8), torch.float16)
    expected = [master.detach() + (0.1 if averages else 0) for master in weights.masters]
    found = weights.trained(expected if averages else None)
    assert all(torch.equal(one, other) for one, other in zip(found.values(), expected, strict=True))


def test_a_checkpoint_is_read_into_masters_and_copies_and_must_fit() -> None:
    """Nothing is missing, nothing is repeated to make it fit."""
    unet = tiny.unet(8)
    weights = Weights(unet, torch.bfloat16)
    state = {name: torch.full_like(master, 2.0) for name, master in weights.state_dict().items()}
    weights.load_state_dict(state)
    assert all((weight == 2).all() for weight in (*weights.masters, *unet.parameters()))
    with pytest.raises(Misfit, match=r"holds conv_in\.bias in shape \(1,\), expected \(8,\)"):
        weights.load_state_dict(state | {"conv_in.bias": torch.ones(1)})
    with pytest.raises(Misfit, match=r"holds extra, which this UNet lacks"):
        weights.load_state_dict(state | {"extra": torch.ones(1)})
    del state["conv_in.bias"]
    with pytest.raises(Misfit, match=r"lacks conv_in\.bias"):
        weights.load_state_dict(state)


@pytest.fixture
def norms_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast computes norms in float32 and leaves their result so; that of CPUs does not."""

    def upcast(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(sample: Tensor, *rest: Any) -> Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return norm(sample, *rest)
            with torch.autocast("cpu", enabled=False):
                return norm(sample.float(), *rest)

        return compute

    for name in ("group_norm", "layer_norm"):
        monkeypatch.setattr(F, name, upcast(getattr(F, name)))


@pytest.mark.slow  # three quarters of a minute: single batches say little
@pytest.mark.usefixtures("norms_as_on_cuda")
def test_gradients_of_copies_are_as_good_as_those_of_autocast() -> None:
    """In bfloat16 on a trained UNet, their error against float32 is at most 1.1 times that of autocast.

    The ratio of a single batch is anything from 0.7 to 1.5, so it is the mean of 24, within its standard error.
    """
    unet = UNet2DConditionModel.from_pretrained(STARTER)
    widen(unet)
    cast, copied = copy.deepcopy(unet), copy.deepcopy(unet)
    cast.forward = torch.autocast("cpu", torch.bfloat16)(cast.forward)
    Weights(copied, torch.bfloat16)
    ratios = []
    for seed in range(24):
        exact = torch.cat([part.flatten() for part in gradients(unet, seed)])
        autocast, copies = (
            (torch.cat([part.flatten() for part in gradients(other, seed)]) - exact).norm() for other in (cast, copied)
        )
        assert autocast > 1e-3 * exact.norm()  # the comparison is one of rounding
        ratios.append((copies / autocast).log())
    logs = torch.stack(ratios)
    error = logs.std() / len(logs) ** 0.5
    print(f"ratio {logs.mean().exp():.3f}, standard error {error:.3f}")
    assert logs.mean().exp() <= 1.1 + error


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_with_copies_trains_draws_resumes_and_ends_in_float32(
    family: str, data: Path, tmp_path: Path, encode: Callable[..., None], request: Any, monkeypatch: Any
) -> None:
    """All that a run on a GPU does with its copies, here on the CPU: pictures and losses by the average on the way."""
    model = request.getfixturevalue(family)
    encode(model, data, tmp_path / "cache")
    monkeypatch.setattr(machine, "choose_precision", lambda *_, **__: Precision("bf16", copies=True))
    changed = {"max_train_steps": 6, "checkpointing_steps": 3, "checkpoints_total_limit": 0}
    changed |= {"num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 2}
    changed |= {"gradient_checkpointing": True, "snr_gamma": 5.0}
    main(flags(model, tmp_path / "cache", tmp_path / "straight", **changed))
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    main(flags(model, tmp_path / "cache", tmp_path / "resumed", resume_from_checkpoint="latest", **changed))
    assert_same(states(tmp_path / "resumed" / "checkpoint-6"), states(tmp_path / "straight" / "checkpoint-6"))
    assert len(list((tmp_path / "straight" / "validation").glob("*.png"))) == 3
    masters = load_file(tmp_path / "straight" / "checkpoint-6" / "model.safetensors")
    exported = load_file(unet_file(tmp_path / "straight"))
    for weights in (masters, exported):
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert any((weight != weight.bfloat16()).any() for weight in weights.values())
    base = load_file(unet_file(model))["conv_out.weight"]
    assert not torch.equal(masters["conv_out.weight"], base)
