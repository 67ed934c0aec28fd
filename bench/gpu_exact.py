"""The real commands on a GPU with a tiny model: whether they train, go on as if never stopped, and never wait."""

import contextlib
import gc
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from common import GPU
from gpu_frame import Bench, last_line
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tiny
from ip2p.train import run as loop
from ip2p.train.__main__ import main as train
from ip2p.train.save.checkpoint import AVERAGE, MODEL, OPTIMIZER
from ip2p.train.watch.metrics import Metrics

STEPS = 6


def run(main: Any, cpu: bool = False, **flags: object) -> None:
    """Run a command in this process, and tell what it said only if it fails."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its settings for a whole process
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), on_cpu(cpu):
            main(tiny.arguments(flags))
    except SystemExit as error:
        if error.code:
            raise RuntimeError(said.getvalue()[-500:].strip()) from None
    finally:
        gc.unfreeze()  # the command froze what was there, which includes memory of the GPU
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def on_cpu(wanted: bool) -> Iterator[None]:
    """Let accelerate leave the GPU alone for a while."""
    if wanted:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_CPU", None)


def trains(bench: Bench) -> None:
    """Training in each precision, its loss beside that of float32, and what is left after stopping halfway."""
    losses: dict[str, float] = {}
    for precision in bench.sizes.precisions:
        for deterministic in [True] if bench.demo else [True, False]:
            with bench.part(f"training in {precision}"):
                name = f"training in {precision}" + (", deterministic" if deterministic else "")
                flags = {"mixed_precision": precision, "deterministic": deterministic}
                straight, halves = bench.folder / f"{name}, straight", bench.folder / f"{name}, in two"
                run(train, **training_flags(bench, straight, STEPS), **flags)
                run(train, **training_flags(bench, halves, STEPS // 2), **flags)
                run(train, **training_flags(bench, halves, STEPS), **flags, resume_from_checkpoint="latest")
                unequal, total = differing(straight, halves)
                bar = 0 if deterministic else None
                bench.add(f"{name}: resumed, unequal", unequal, f"of {total} numbers", at_most=bar)
                losses[precision] = last_line(straight / "metrics.jsonl")["loss"]
    for precision, loss in losses.items():
        if "no" in losses:
            bench.add(f"loss in {precision} / in float32", loss / losses["no"], "times", 0.98, 1.02)


def training_flags(bench: Bench, out: Path, steps: int) -> dict[str, Any]:
    """A short training of the tiny model, from what the CPU has encoded."""
    return {
        "pretrained_model_name_or_path": bench.folder / "tiny",
        "cache": bench.folder / "encoded-cpu",
        "output_dir": out,
        "train_batch_size": 4,
        "max_train_steps": steps,
        "logging_steps": steps,
        "learning_rate": 1e-3,
        "use_ema": True,
        "report_to": "none",
        "seed": 0,
    }


def differing(one: Path, other: Path) -> tuple[int, int]:
    """How many numbers of two last checkpoints' weights, moments and averages differ, of how many."""
    unequal = total = 0
    for name in (MODEL, OPTIMIZER, AVERAGE):
        load: Any = load_file if name == MODEL else torch.load
        pairs = [tensors(load(folder / f"checkpoint-{STEPS}" / name)) for folder in (one, other)]
        for first, second in zip(*pairs, strict=True):
            unequal, total = unequal + int((first != second).sum()), total + first.numel()
    return unequal, total


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a tree."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


class Watched(Metrics):
    """Lets no step from the third to the last but one wait for the GPU."""

    def step(self, step: int, loss: Tensor, norm: Tensor, skipped: Tensor, lr: float) -> None:
        super().step(step, loss, norm, skipped, lr)
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < STEPS - 1 else "default")


def waits(bench: Bench) -> None:
    """No step of the command waits for the GPU."""
    if not GPU:
        return bench.note("steps that wait for the GPU: there is none")
    for precision in bench.sizes.precisions:
        out = bench.folder / f"waiting-{precision}"
        try:
            with bench.part(f"steps in {precision} that wait for the GPU"), patch.object(loop, "Metrics", Watched):
                run(train, **training_flags(bench, out, STEPS), mixed_precision=precision)
                bench.add(f"steps in {precision} that wait for the GPU", 0, "", at_most=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
