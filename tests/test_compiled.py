"""Tests of train/unet/load.py: a compiler that loses gradients is found out before it trains anything."""

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

import tiny
from ip2p.encode.base.errors import TrainError
from ip2p.train import run
from ip2p.train.__main__ import main
from ip2p.train.unet.load import check_gradients

pytestmark = pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a `functools.lru_cache`")  # diffusers'


def prepared(precision: str, backend: Any) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A tiny UNet compiled by `backend`, and its loss on fixed numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    accelerator, unet = Accelerator(cpu=True, mixed_precision=precision), tiny.unet(8)
    unet.compile(backend=backend)
    text = torch.randn(2, 77, unet.config["cross_attention_dim"])
    latents, noise = torch.randn(2, 8, 8, 8), torch.randn(2, 4, 8, 8)
    unet = accelerator.prepare(unet)
    timesteps = torch.tensor([20, 700])
    return unet, lambda: (unet(latents, timesteps, text).sample - noise).square().mean()


def backend_that(spoil: Callable[[Tensor], Tensor], name: str) -> Callable[..., Any]:
    """A backend of torch.compile that runs the graph as it is, but takes the weight `name` through `spoil`."""

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        places = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        spoiled = {i for i, place in enumerate(places) if name in place}
        assert spoiled, places
        return lambda *inputs: graph(*(spoil(x) if i in spoiled else x for i, x in enumerate(inputs)))

    return backend


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_right_gradients_pass_and_none_is_left(precision: str) -> None:
    """The compiler's graph, run faithfully, is no error, and the first step starts from no gradient."""
    unet, loss = prepared(precision, "eager")
    check_gradients(unet, loss, precision)
    assert all(weight.grad is None for weight in unet.parameters())


@pytest.mark.parametrize(
    "spoil",
    [Tensor.detach, lambda weight: 2 * weight - weight.detach(), lambda weight: weight * torch.nan],
    ids=["lost", "doubled", "nan"],
)
def test_a_wrong_gradient_is_refused(spoil: Callable[[Tensor], Tensor]) -> None:
    """One weight whose gradient is lost or doubled, with an output that is right, is named; so is a NaN."""
    unet, loss = prepared("no", backend_that(spoil, "conv_out_parameters_weight"))
    with pytest.raises(TrainError, match=r"--compile: .* gradients are not .*Leave --compile out") as error:
        check_gradients(unet, loss, "no")
    assert "conv_out.weight" in str(error.value) or spoil(torch.ones(1)).isnan()


def test_where_all_gradients_overflow_it_is_said_that_nothing_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """An overflow is no compiler's fault, and no proof of the opposite."""
    unet, loss = prepared("no", "eager")
    check_gradients(unet, lambda: loss() * torch.inf, "no")
    assert "the compiled ones could not be checked" in capsys.readouterr().out


def test_in_fp16_gradients_are_compared_at_a_scale_that_they_survive() -> None:
    """At the scale that training begins with, the lost gradient would hide among those that overflow."""
    unet, loss = prepared("no", backend_that(Tensor.detach, "conv_out_parameters_weight"))
    for weight in unet.parameters():
        weight.register_hook(lambda gradient: gradient.half().float())  # what float16 holds of it
    with pytest.raises(TrainError, match="gradients are not"):
        check_gradients(unet, lambda: 10 * loss(), "fp16")


@pytest.mark.slow
def test_each_shape_has_a_graph_that_is_checked(
    sd: Path, tmp_path: Path, encode: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the compiler allows by default are compiled, none is run eagerly, and no step compiles anew."""
    data = tiny.dataset(tmp_path / "data", tiny.pairs(4, sizes=[(20, 12), (16, 16)]))
    encode(sd, data, tmp_path / "cache", bucket_step=4)
    graphs, checked = list[tuple[int, ...]](), list[tuple[int, ...]]()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.extend({tuple(x.shape) for x in inputs if x.ndim == 4 and x.shape[:2] == (2, 8)})
        return graph

    def check(unet: torch.nn.Module, loss: Callable[[], Tensor], precision: str) -> None:
        check_gradients(unet, loss, precision)
        checked.append(graphs[-1])

    torch._dynamo.reset()
    monkeypatch.setattr(run, "check_gradients", check)
    monkeypatch.setattr(UNet2DConditionModel, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    values = {"pretrained_model_name_or_path": sd, "cache": tmp_path / "cache", "output_dir": tmp_path / "out"}
    values |= {"max_train_steps": 6, "train_batch_size": 2, "seed": 0, "report_to": "none", "compile": True}
    with torch._dynamo.config.patch(recompile_limit=1):
        main(tiny.arguments(values))
    assert len(set(checked)) == 2
    assert graphs == checked


def test_a_run_is_checked_and_not_changed_by_it(
    sd: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a compiler that is right the losses are the uncompiled run's; with one that is not, nothing is trained."""

    def losses(name: str, backend: Any) -> list[float]:
        torch._dynamo.reset()
        monkeypatch.setattr(UNet2DConditionModel, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
        values = {"pretrained_model_name_or_path": sd, "cache": cache, "output_dir": tmp_path / name}
        values |= {"max_train_steps": 3, "train_batch_size": 2, "logging_steps": 1, "seed": 0, "report_to": "none"}
        main(tiny.arguments(values | {"compile": bool(backend)}))
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    plain = losses("plain", None)
    assert len(plain) == 3
    assert losses("right", "eager") == pytest.approx(plain, rel=1e-4)
    with pytest.raises(SystemExit, match="2"):
        losses("wrong", backend_that(Tensor.detach, "conv_out_parameters_weight"))
    assert "conv_out.weight, by 100%. Leave --compile out" in capsys.readouterr().err
    assert not (tmp_path / "wrong" / "unet").exists()
