"""The sections of bench/gpu.py that say what the machine could do, and what a step spends its time on."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, GPU
from gpu_fast import base, built
from gpu_frame import Bench
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from training import Step, rate

# Kernels by what they do, the first pattern that fits: of NVIDIA's libraries, PyTorch, Triton; and PyTorch on a CPU.
KINDS = {
    "optimizer step": r"^_kernel|multi_tensor|[Aa]dam|_foreach",
    "attention": r"flash|fmha|attention|sdpa|attn",
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad",
    "matrix product": r"gemm|nvjet|cublas|cutlass|splitK|addmm|bmm|::mm",
    "norm": r"norm|Norm|[Rr]owwise|[Mm]oments|welford|GammaBeta|^(measure|settle|differentiate|lean)$",
    "copy and layout": r"[Mm]emcpy|[Mm]emset|copy|[Tt]ranspose|nchw|nhwc|Cat|::cat",
    "elementwise": r"elementwise|reduce|triton|mul|add|div|gelu|silu|sum|fill|where",
}


def machine(bench: Bench) -> None:
    """What PyTorch finds, and the ceilings: bytes copied and products computed in a second."""
    properties = torch.cuda.get_device_properties(0) if GPU else None
    driver = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gpu": str(properties)}
    bench.note("machine", **driver)
    for package in ("triton", "xformers"):
        try:
            __import__(package)
        except Exception as error:  # a library that does not fit its CUDA may raise anything
            bench.note(f"{package} cannot be used: {type(error).__name__}: {error}")
    here = torch.empty(bench.sizes.copy, dtype=torch.uint8, device=DEVICE)
    there, host = torch.empty_like(here), torch.empty(bench.sizes.copy, dtype=torch.uint8, pin_memory=GPU)
    bench.add("memory, read and written", 2e-9 * bench.sizes.copy / seconds(lambda: there.copy_(here)), "GB/s")
    bench.add("from the GPU to the host", 1e-9 * bench.sizes.copy / seconds(lambda: host.copy_(here)), "GB/s")
    side, products = bench.sizes.product, {"tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    torch.backends.cuda.matmul.allow_tf32 = True
    for name, dtype in products.items() if GPU else [("float32", torch.float32)]:
        one = torch.randn(side, side, dtype=dtype, device=DEVICE)
        bench.add(f"matrix product, {name}", 2e-12 * side**3 / seconds(lambda one=one: one @ one), "TFLOP/s")


def seconds(call: Callable[[], Any], times: int = 10) -> float:
    """How long a call takes, once it is warm."""
    step: Step = lambda _: call()  # noqa: E731
    rate(step, torch.Tensor, 2, 1)
    return 1 / rate(step, torch.Tensor, times, 1)


def profile(bench: Bench) -> None:
    """Milliseconds of a step by kind of kernel, and in how many of them the GPU had nothing to do."""
    setting, steps = base(bench), 1 if bench.demo else 2
    with built(bench, setting) as (training, _, loss):
        rate(training.step, loss, 3, setting.batch)
        activities = [ProfilerActivity.CUDA] if GPU else [ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            took = steps * setting.batch / rate(training.step, loss, steps, setting.batch)
    kinds, names = Counter[str](), Counter[str]()  # milliseconds
    for event in profiler.key_averages():
        if GPU and event.device_type != DeviceType.CUDA:
            continue
        spent = (event.self_device_time_total if GPU else event.self_cpu_time_total) / 1000 / steps
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "anything else")
        kinds[kind] += spent
        names[f"{kind}: {event.key}"] += spent
    for kind, spent in kinds.most_common():
        bench.add(f"{setting.name}, a step: {kind}", spent, "ms")
    bench.add(f"{setting.name}, a step: nothing to do", 1000 * took / steps - kinds.total(), "ms")
    longest = {name[:160]: round(spent, 3) for name, spent in names.most_common(40)}
    bench.note("the kernels that take longest, ms in a step", kernels=longest)
