"""Tests of train/unet/norm.py: the norms for GPUs do what PyTorch's do, and the UNet stays the same with them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D

import tiny
from ip2p.train.unet import norm
from ip2p.train.unet.norm import Norm, choose_norms, plan, stay_in_channels_last

CUDA = torch.device("cuda")
# The kernels are interpreted on a CPU, which has to be asked for before Triton is imported.
SHAPES = """
import torch
from ip2p.train.unet import norm

def off(batch, channels, height, width, groups, dtype, mean=0.0, silu=True, shifted=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    x = (draw(batch, channels, height, width) * 2 + mean).to(memory_format=torch.channels_last)
    given = [x, draw(channels), draw(channels)] + ([draw(batch, channels)] if shifted else [])
    slope, shift = draw(*x.shape), (given[3] if shifted else None)

    def run(function, given, slope):
        given = [one.clone().requires_grad_() for one in given]
        y = function(*given[:3], groups, 1e-5, silu=silu, shift=given[3] if shifted else None)
        return [y, *torch.autograd.grad(y, given, slope)]

    found = run(norm.group_norm, given, slope)
    expected = run(norm._by_torch, [one.double() for one in given], slope.double())
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert [one.dtype for one in found] == [dtype] * len(found)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))

exact = torch.float32
print(
    off(2, 32, 4, 4, 8, exact),  # many groups in a program
    off(2, 40, 9, 7, 4, exact, silu=False, shifted=False),  # pixels that no tile fits
    off(1, 320, 16, 16, 32, exact, shifted=False),  # as in Stable Diffusion
    off(3, 260, 5, 40, 2, exact),  # groups that are wider than a program usually is
    off(2, 32, 1, 1, 8, exact),  # a single pixel
    off(1, 32, 40, 40, 8, exact, mean=100.0) / 100,  # in parts; and a mean that would swallow the digits
    off(2, 32, 8, 8, 8, torch.float16) / 1000,
    off(2, 32, 8, 8, 8, torch.bfloat16) / 10000,
)
"""
UNET = """
import copy
import torch
import tiny
from ip2p.train.unet.norm import stay_in_channels_last

for xl in (False, True):
    torch.manual_seed(0)
    unet = tiny.unet(8, sdxl=xl)
    unet.to(memory_format=torch.channels_last)
    if xl:
        unet.enable_gradient_checkpointing()
    other = copy.deepcopy(unet)
    stay_in_channels_last(other)
    given = torch.randn(2, 8, 8, 8), torch.tensor([3, 500]), torch.randn(2, 77, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)} if xl else None
    found = []
    for one in (unet, other):
        y = one(*given, added_cond_kwargs=added).sample
        y.square().mean().backward()
        found.append((y, torch.cat([weight.grad.flatten() for weight in one.parameters()])))
    assert list(unet.state_dict()) == list(other.state_dict())
    print(*(((a - b).norm() / a.norm()).item() for a, b in zip(*found, strict=True)))
"""


def interpreted(code: str) -> list[float]:
    """What a script prints that runs Triton's kernels on the CPU."""
    pytest.importorskip("triton")
    command = [sys.executable, "-c", code]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
def test_the_kernels_do_what_pytorch_does() -> None:
    """Forward and all gradients, in every shape and precision that is divided in another way."""
    errors = interpreted(SHAPES)
    assert len(errors) == 8
    assert max(errors) < 1e-6


@pytest.mark.slow
def test_a_unet_with_them_gives_the_same() -> None:
    """Prediction and gradients of SD and, with checkpointing, of SDXL; the names of its weights stay."""
    errors = interpreted(UNET)
    assert len(errors) == 4
    assert max(errors) < 1e-5


def test_all_norms_and_what_copies_between_memory_formats_are_replaced() -> None:
    """None of diffusers' own is left in a UNet of Stable Diffusion."""
    unet = tiny.unet(8)
    stay_in_channels_last(unet)
    kinds = {type(module) for module in unet.modules()}
    assert not kinds & {torch.nn.GroupNorm, ResnetBlock2D, Transformer2DModel}
    silent = [module for module in unet.modules() if isinstance(module, Norm) and not module.silu]
    assert len(silent) == sum(isinstance(module, Transformer2DModel) for module in unet.modules())


def test_blocks_of_another_form_stay() -> None:
    """What would compute something else than Stable Diffusion's blocks."""
    scaled = ResnetBlock2D(in_channels=8, groups=4, temb_channels=8, time_embedding_norm="scale_shift")
    relu = ResnetBlock2D(in_channels=8, groups=4, temb_channels=8, non_linearity="relu")
    up = ResnetBlock2D(in_channels=8, groups=4, temb_channels=8, up=True)
    unet = tiny.unet(8)
    unet.others = torch.nn.ModuleList([scaled, relu, up])
    stay_in_channels_last(unet)
    assert {type(block) for block in unet.others} == {ResnetBlock2D}
    assert not any(isinstance(module, Norm) for module in unet.others.modules())


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((64, 320, 32, 32), 32), ((64, 2560, 4, 4), 32), ((4, 960, 128, 128), 32), ((1, 8, 1, 1), 4), ((2, 260, 5, 7), 2)],
)
def test_the_work_is_divided_without_rest(shape: tuple[int, ...], groups: int) -> None:
    """Whole groups in a program, each pixel in one part, and no more parts than are put together."""
    work = plan(torch.empty(shape, device="meta"), groups)
    pixels, channels, rows, parts = work.sizes
    assert work.width["TAKEN"] % (channels // groups) == 0
    assert work.width["TAKEN"] <= work.width["WIDTH"]
    assert (work.whole[1] - 1) * work.width["TAKEN"] < channels <= work.whole[1] * work.width["TAKEN"]
    assert (parts - 1) * rows < pixels <= parts * rows
    assert parts <= work.parts["PARTS"]
    assert work.grid == (shape[0] * parts, work.whole[1])


@pytest.mark.parametrize("architecture", [75, 80, 90, 100])
def test_the_kernels_compile_for_gpus_that_are_not_here(architecture: int) -> None:
    """Down to machine code; and those that go over pixels read and write 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ip2p.train.unet import norm_kernels

    half = "*fp16" if architecture == 75 else "*bf16"
    width, tile = {"TAKEN": 120, "WIDTH": 128}, {"TALL": norm.TALL, "SHIFTED": True}
    cases = {
        "measure": width | tile,
        "settle": width | {"PARTS": 8},
        "normalise": width | tile | {"SILU": True},
        "differentiate": width | tile | {"SILU": True, "SUMS": False},
        "lean": width | {"PARTS": 8, "SHIFTED": True},
    }
    for name, constants in cases.items():
        kernel = getattr(norm_kernels, name)
        kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr") | {"epsilon": "fp32"}
        kinds |= dict.fromkeys(("x", "shift", "weight", "bias", "y", "gradient", "change"), half)
        kinds |= dict.fromkeys(("found", "facts", "sums", "slopes", "moved"), "*fp32")
        kinds = {name: kind for name, kind in kinds.items() if name in kernel.arg_names}
        source = ASTSource(
            fn=kernel,
            signature=kinds,
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={
                (n,): [["tt.divisibility", 16]]
                for n, (name, kind) in enumerate(kinds.items())
                if kind[0] == "*" or name in ("pixels", "channels", "rows")
            },
        )
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
        assert len(built.asm["cubin"]) > 1000
        wide = built.asm["ptx"].count("ld.global.v4"), built.asm["ptx"].count("st.global.v4")
        assert wide[0] >= (2 if "TALL" in constants else 0), name
        assert wide[1] >= (2 if name in ("normalise", "differentiate") else 0), name


def test_where_the_kernels_cannot_be_had_the_unet_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No compiler, another answer, or none at all: a line says why."""

    def raises(*_: object) -> float:
        raise RuntimeError("Failed to find C compiler.\nand so on")

    found: dict[str, tuple[Callable[..., float], str]] = {
        "raises": (raises, "and back: Failed to find C compiler."),
        "differs": (lambda *_: 0.1, "and back: the kernels are off by 1.0e-01"),
        "is no number": (lambda *_: float("inf"), "and back: the kernels are off by inf"),
    }
    unet = tiny.unet(8)
    for answer, said in found.values():
        monkeypatch.setattr(norm, "disagreement", answer)
        choose_norms(unet, CUDA, torch.float32)
        assert said in capsys.readouterr().out.splitlines()[0]
    choose_norms(unet, torch.device("cpu"), torch.float32)
    assert not any(isinstance(module, Norm) for module in unet.modules())
    monkeypatch.setattr(norm, "disagreement", lambda *_: 1e-7)
    choose_norms(unet, CUDA, torch.float32)
    assert isinstance(unet.conv_norm_out, Norm)
    assert capsys.readouterr().out == ""


def test_the_comparison_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that the kernels give is compared."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(norm, "group_norm", norm._by_torch)
    assert norm.disagreement(cpu, torch.float32) < 1e-6

    monkeypatch.setattr(norm, "group_norm", lambda *given, **more: norm._by_torch(*given, **(more | {"silu": True})))
    assert norm.disagreement(cpu, torch.float32) > 0.1
