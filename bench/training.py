"""The training step of `ip2p-train`, composed as train/run.py composes it, on a UNet with random weights."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from common import DEVICE, GPU
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from shapes import Shape, make_unet
from torch import Tensor

from ip2p.encode.base.flags import build
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.train.config import TrainConfig
from ip2p.train.data.batches import Batches, null_conditioning
from ip2p.train.data.order import Order, Turns
from ip2p.train.data.text import Texts
from ip2p.train.learning import Objective as Flags
from ip2p.train.machine import make_accelerator
from ip2p.train.objective import Objective
from ip2p.train.unet.load import choose_attention
from ip2p.train.unet.make import make_update
from ip2p.train.unet.norm import choose_norms

DROPOUT = Flags().dropout
Loss = Callable[[], Tensor]
Step = Callable[[Loss], Any]
# What a GPU is to reach, by size and pixels: samples/s of one H100.
GOALS = {("sd15", 256): 800, ("sd15", 512): 160, ("sdxl", 1024): 17}


class Training:
    """A UNet on the device, and all that a step changes.

    Args:
        shape: of the UNet.
        folder: where accelerate may write.
        precision: as --mixed_precision.
        one_pass: whether the optimizer takes one pass over the weights. Default: as the command decides.
        channels_last: of weights and activations, as the command has them.
        norms: whether the kernels for them are taken, as the command does unless it compiles.
        flags: further ones of the command.
    """

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        precision: Any = "no",
        *,
        one_pass: bool | None = None,
        channels_last: bool = True,
        norms: bool = True,
        **flags: Any,
    ):
        config = build(
            TrainConfig,
            {
                "pretrained_model_name_or_path": "random",
                "cache": folder / "cache",
                "output_dir": folder / "out",
                "mixed_precision": precision,
                "report_to": "none",
                **flags,
            },
        )
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its settings for a whole process
        accelerator, self.precision = make_accelerator(config)
        with DEVICE:
            unet = make_unet(shape)
        if channels_last:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.machine.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        choose_attention(unet, DEVICE, precision)
        if norms and channels_last:
            choose_norms(unet, DEVICE, self.precision.dtype)
        self.update = make_update(config, unet, self.precision, processes=1)
        if one_pass is not None:
            self.update.fused = one_pass
        self.unet: Any = accelerator.prepare(unet)

    def step(self, loss: Loss, *, averages: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step on a loss: the loss, the gradients' norm, and 1 if the step was skipped, else 0."""
        value = loss()
        self.update.backward(value)
        return value.detach(), *self.update(averages=averages)

    def step_without_average(self, loss: Loss) -> None:
        """One optimizer step in which the average stays."""
        self.step(loss, averages=False)


@contextmanager
def from_cache(
    unet: torch.nn.Module, cache: Cache, size: int, text_dtype: torch.dtype, texts: Texts | None = None
) -> Iterator[tuple[Batches, Loss]]:
    """The batches of a cache, and the loss of the next one, whose draws are those of its step."""
    reader, samples = Reader(cache), Samples.of(cache, None)
    order, step = Order(len(samples.rows), views=1, seed=0), -1
    null = null_conditioning(reader, DEVICE)
    objective = Objective(DDPMScheduler(), null, 0.18215, Flags(), text_dtype)
    drawn = Turns([order], [np.arange(order.samples)], [1]).batches([0], size)
    batches = Batches(reader, samples, drawn, DEVICE, batch_size=size, texts=texts)

    def loss() -> Tensor:
        nonlocal step
        batch, step = next(batches), step + 1
        return objective.loss(unet, batch, objective.draw(batch, 0, step, 0, 0))

    try:
        yield batches, loss
    finally:
        batches.close()


def tune(unet: UNet2DConditionModel, args: argparse.Namespace) -> None:
    """Choose the attention and compile: after the operations were counted, which neither lets through."""
    if args.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif args.attention == "plain":
        unet.set_attn_processor(AttnProcessor())
    if args.compile == "regions":
        compile_regions(unet)
    elif args.compile:
        unet.compile(mode=args.compile)


def compile_regions(unet: torch.nn.Module, **options: Any) -> int:
    """Compile each residual block and each transformer for itself, in place; returns how many there are."""
    regions = [module for module in unet.modules() if isinstance(module, ResnetBlock2D | Transformer2DModel)]
    # All of them run the same code of torch.nn.Module, for which the compiler counts how often it has compiled it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(regions))
    for region in regions:
        region.compile(dynamic=False, **options)
    return len(regions)


def rate(step: Step, loss: Loss, steps: int, size: int) -> float:
    """Samples/s over some steps."""
    began = time.perf_counter()
    for _ in range(steps):
        step(loss)
    if GPU:
        torch.cuda.synchronize()
    return steps * size / (time.perf_counter() - began)


def free() -> None:
    """Give the memory of what nobody holds any more back to the GPU, and forget what was compiled."""
    torch.compiler.reset()
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
