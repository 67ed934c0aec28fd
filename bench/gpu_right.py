"""The sections of bench/gpu.py that say whether a GPU computes what a CPU does, with a tiny model."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from baselines import bare
from common import DEVICE, DTYPES, GPU
from diffusers import DDPMScheduler
from gpu_exact import run, trains, waits
from gpu_frame import Bench
from gpu_machine import seconds
from shapes import TINY
from torch import Tensor
from training import Training

import tiny
from ip2p.encode.__main__ import main as encode
from ip2p.encode.cache.format import Cache
from ip2p.train.learning import Objective as Flags
from ip2p.train.objective import Batch, Draws, Null, Objective
from ip2p.train.unet.make import disagreement
from ip2p.train.unet.norm import choose_norms, group_norm
from ip2p.train.unet.norm import disagreement as disagreement_of_norms
from ip2p.train.unet.weights import Weights

# The most by which the norm of a difference may be off, of the norm itself.
ENCODED = {"no": 2e-3, "fp16": 5e-3, "bf16": 5e-2}
GRADIENT = {"no": 1e-3, "fp16": 1e-2, "bf16": 3e-2}


def correctness(bench: Bench) -> None:
    """Everything that a test cannot see without a GPU."""
    tiny.checkpoint(bench.folder / "tiny")
    tiny.dataset(bench.folder / "pairs", tiny.pairs(10))
    for check in (encodes, norms, gradients, one_pass, skips, waits, trains):
        with bench.part(check.__name__):
            check(bench)


def encodes(bench: Bench) -> None:
    """Encodings in each precision are the CPU's in float32, but for rounding."""
    flags = {
        "pretrained_model_name_or_path": bench.folder / "tiny",
        "dataset_name": bench.folder / "pairs",
        "cache_dir": bench.folder / "downloads",
        "resolution": 16,
        "dataloader_num_workers": 0,
    }
    run(encode, cpu=True, **flags, cache=bench.folder / "encoded-cpu")
    there = arrays(bench.folder / "encoded-cpu")
    for precision in bench.sizes.precisions:
        folder = bench.folder / f"encoded-{precision}"
        run(encode, **flags, cache=folder, mixed_precision=precision)
        error = max(off(one, other) for one, other in zip(arrays(folder), there, strict=True))
        bench.add(f"encoding in {precision}, off from the CPU", error, "of 1", at_most=ENCODED[precision])


def arrays(folder: Path) -> list[Tensor]:
    """All that a cache holds."""
    cache = Cache.open(folder)
    found = cache.arrays("images") | cache.arrays("text")
    return [torch.tensor(found[name][:]).float() for name in sorted(found)]


def off(one: Tensor, other: Tensor) -> float:
    """How large a difference is against the thing itself."""
    return ((one.cpu() - other).norm() / other.norm()).item()


def gradients(bench: Bench) -> None:
    """The gradients of one batch, with draws that are given, are the CPU's but for rounding."""
    right = gradient(torch.device("cpu"), "no", copies=False)
    for precision in bench.sizes.precisions:
        for copies in [False] if precision == "no" else [True, False]:
            name = f"gradients in {precision}" + (", autocast" if precision != "no" and not copies else "")
            error = off(gradient(DEVICE, precision, copies=copies), right)
            bench.add(f"{name}, off from the CPU", error, "of 1", at_most=GRADIENT[precision])


def gradient(device: torch.device, precision: str, *, copies: bool) -> Tensor:
    """All gradients of a tiny UNet, the same wherever it is computed."""
    generator, dtype = torch.Generator().manual_seed(0), DTYPES[precision]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny.unet(8).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    original, edited, *noise = [torch.randn(4, size, 8, 8, generator=generator) for size in (4, 8, 4, 4)]
    text, empty = torch.randn(4, 77, 16, generator=generator), torch.randn(1, 77, 16, generator=generator)
    timesteps, dropout = torch.tensor([1, 300, 600, 990]), torch.tensor([0.01, 0.08, 0.12, 0.9])
    batch = Batch(*(part.to(device) for part in (original, edited, text)))
    draws = Draws(*(part.to(device) for part in (*noise, timesteps, dropout)))
    choose_norms(unet, device, dtype)
    weights = Weights(unet, dtype if copies else None)
    if precision != "no" and not copies:
        unet.forward = torch.autocast(device.type, dtype)(unet.forward)
    objective = Objective(DDPMScheduler(), Null(empty.to(device)), 0.18215, Flags(), dtype)
    scale = 1024 if precision == "fp16" else 1
    with full_float32():
        (scale * objective.loss(unet, batch, draws)).backward()
    return torch.cat([weight.grad.flatten().float().cpu() / scale for weight in weights.parameters])  # type: ignore[union-attr]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in float32, not in TF32, for a while."""
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def norms(bench: Bench) -> None:
    """The kernels for norms do what PyTorch's functions do, and how long both take where there are most pixels."""
    if not GPU:
        return bench.note("the kernels for norms: need a GPU")
    for precision in bench.sizes.precisions:
        error = disagreement_of_norms(DEVICE, DTYPES[precision])
        bench.add(f"norms against PyTorch's functions, {precision}", error, "of 1", at_most=1e-2)
    numbers = torch.randn(2, 64, 320, 32, 32, device=DEVICE, dtype=torch.bfloat16)
    x, slope = (part.to(memory_format=torch.channels_last) for part in numbers)
    weight, bias = torch.randn(2, 320, device=DEVICE, dtype=torch.bfloat16).requires_grad_().unbind()
    given = x.requires_grad_(), weight, bias
    ways = {
        "PyTorch": lambda: F.silu(F.group_norm(x, 32, weight, bias)),
        "its kernels": lambda: group_norm(x, weight, bias, 32, 1e-5, silu=True),
    }
    for name, way in ways.items():
        took = seconds(way)
        bench.add(f"norm and SiLU of 42 MB by {name}", 1000 * took, "ms")
        both = seconds(lambda way=way: torch.autograd.grad(way(), given, slope))
        bench.add(f"norm and SiLU of 42 MB by {name}, forward and backward", 1000 * both, "ms")


def one_pass(bench: Bench) -> None:
    """The kernel for the optimizer step does what PyTorch's functions do."""
    if not GPU:
        return bench.note("the optimizer's kernel: needs a GPU")
    for precision in bench.sizes.precisions:
        error = disagreement(DEVICE, None if precision == "no" else DTYPES[precision])
        bench.add(f"one pass against PyTorch's functions, {precision}", error, "", at_most=1e-5)
    for name, half in (("adamw", torch.bfloat16), ("adamw8bit", torch.bfloat16), ("adamw8bit", None)):
        error = disagreement(DEVICE, half, name, rounded=half is not None)
        weights = "bfloat16" if half else "float32"
        bench.add(f"one pass against PyTorch's functions, {name}, {weights} weights", error, "", at_most=1e-5)


def skips(bench: Bench) -> None:
    """A step whose gradients overflow float16 changes nothing but the scale of the loss, and the next one trains."""
    if not GPU:
        return bench.note("a step that overflows: needs a GPU, no other device trains in fp16")
    training = Training(TINY, bench.folder, "fp16", use_ema=True)
    update = training.update
    assert update.scale
    assert update.average
    loss = bare(training.unet, TINY, batch_size=4, resolution=64, text_dtype=torch.float16)
    before = [tensor.clone() for tensor in (*update.weights.masters, *update.average.tensors)]
    update.scale.value.fill_(2.0**100)
    skipped = training.step(loss)[2].item()
    kept = (*update.weights.masters, *update.average.tensors)
    changed = sum(not torch.equal(one, other) for one, other in zip(before, kept, strict=True))
    bench.add("a step that overflows: tensors that it changed", changed, f"of {len(before)}", at_most=0)
    bench.add("a step that overflows: skipped", skipped, "", at_least=1)
    bench.add(
        "a step that overflows: the scale after it / before",
        update.scale.value.item() / 2.0**100,
        "",
        0.5,
        0.5,
    )
    update.scale.value.fill_(1024.0)
    bench.add("the step after it: skipped", training.step(loss)[2].item(), "", at_most=0)
    moved = sum(not torch.equal(one, other) for one, other in zip(before, update.weights.masters, strict=False))
    bench.add("the step after it: tensors that it changed", moved, f"of {len(before) // 2}", at_least=1)


def attention(bench: Bench) -> None:
    """xformers against PyTorch's attention: the same gradients, and how long both take."""
    if not GPU or not find_spec("xformers"):
        return bench.note("xformers: not installed" if GPU else "xformers: needs a GPU")
    query, key, value = torch.randn(3, 16, 1024, 8, 40, device=DEVICE, dtype=torch.bfloat16).requires_grad_().unbind()
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    def own() -> Tensor:
        first, second, third = (part.transpose(1, 2) for part in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(first, second, third).transpose(1, 2)

    found = {}
    for name, way in {"PyTorch": own, "xformers": lambda: memory_efficient_attention(query, key, value)}.items():
        found[name] = torch.autograd.grad(way().square().sum(), (query, key, value))
        took = seconds(lambda way=way: torch.autograd.grad(way().sum(), (query, key, value)))
        bench.add(f"attention of {name}, forward and backward", 1000 * took, "ms")
    error = max(off(one.float(), other.float().cpu()) for one, other in zip(*found.values(), strict=True))
    bench.add("gradients of xformers, off from PyTorch's", error, "of 1", at_most=2e-2)
    with DEVICE:
        unet = tiny.unet(8)
    unet.enable_xformers_memory_efficient_attention()  # diffusers tries it out
