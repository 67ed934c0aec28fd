"""What makes the UNet's own step faster or slower: one thing changed at a time, against the step of `ip2p-train`.

Forward, backward and optimizer step on tensors that are there. Each variant takes turns with the step as it is: the
UNet in channels_last, PyTorch's fused attention, not compiled, with the precision of --precision.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from baselines import bare, script, trainable
from common import GPU, Results, Row, parser, ratios, take_turns
from shapes import SIZES
from step import model_flags
from torch import Tensor
from training import Step, Training, free, rate, tune


class Variant(NamedTuple):
    """What is changed."""

    flags: Mapping[str, Any] = {}
    contiguous: bool = False  # weights and activations instead of channels_last
    copies: bool | None = None  # weights that are half-precision copies, instead of autocast; None as the command does
    one_pass: bool | None = None  # of the optimizer over the weights; None as the command does
    adamw: Mapping[str, bool] | None = None  # the optimizer step of diffusers' script, in one of PyTorch's ways
    reads_loss: bool = False  # at each step, which waits for the device
    batch: float = 1  # times as many samples in a batch
    recomputes: bool = False  # gradient checkpointing


LOOP = {"fused": False, "foreach": False}  # PyTorch's default on a CPU
VARIANTS = {
    "contiguous": Variant(contiguous=True),
    "AdamW by foreach": Variant(adamw={"foreach": True}),
    "AdamW in a loop": Variant(adamw=LOOP),
    "several passes of the optimizer": Variant(one_pass=False),
    "unfused attention": Variant({"attention": "plain"}),
    "xformers": Variant({"attention": "xformers"}),
    "compiled": Variant({"compile": "default"}),
    "compiled by regions": Variant({"compile": "regions"}),
    "compiled, CUDA graphs": Variant({"compile": "reduce-overhead"}),
    "bf16 autocast": Variant({"precision": "bf16"}, copies=False),
    "bf16 weights, float32 masters": Variant({"precision": "bf16"}, copies=True),
    "a quarter of the batch": Variant(batch=0.25),
    "four times the batch": Variant(batch=4),
    "gradient checkpointing": Variant(recomputes=True),
    "as diffusers' script": Variant(contiguous=True, adamw={"foreach": True} if GPU else LOOP, reads_loss=True),
}
ON_GPU = ("several passes of the optimizer", "xformers", "compiled, CUDA graphs")


def main() -> None:
    flags = parser(__doc__, rounds=5)
    model_flags(flags)
    flags.add_argument("--steps", type=int, default=20 if GPU else 2, help="of each kind in a round")
    there = [name for name in VARIANTS if GPU or name not in ON_GPU]
    if not find_spec("xformers"):
        there = [name for name in there if name != "xformers"]
    flags.add_argument("--only", nargs="+", choices=there, default=there, metavar="VARIANT", help=", ".join(there))
    args = flags.parse_args()
    results = Results("unet", args)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            try:
                results.add(*compare(name, args, Path(folder)))
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory")


def compare(name: str, args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """The rates of one variant and of the step as it is; two UNets at a time are all that fits."""
    free()
    variant = VARIANTS[name]
    cases = {"as it is": case(Variant(), args, folder), name: case(variant, args, folder)}
    first = take_turns(1, cases)  # compiles, allocates
    rates = take_turns(args.rounds, cases)
    yield Row.of(name, rates[name], "samples/s")
    yield Row.of(f"{name}, the step as it is beside", rates["as it is"], "samples/s")
    yield Row.of(f"{name}, rate / as it is", ratios(rates, name, "as it is"), "times")
    if "compile" in variant.flags:
        samples = args.steps * args.batch_size
        yield Row(f"{name}, seconds to compile", samples / first[name][0] - samples / median(rates[name]), "s")


def case(variant: Variant, args: argparse.Namespace, folder: Path) -> Callable[[], float]:
    """Samples/s of some steps of a variant."""
    args = argparse.Namespace(**{**vars(args), **variant.flags})
    shape, size = SIZES[args.size], max(1, round(variant.batch * args.batch_size))
    step: Step
    if variant.adamw is None:
        training = Training(
            shape,
            folder,
            args.precision,
            copies=variant.copies,
            one_pass=variant.one_pass,
            channels_last=not variant.contiguous,
            gradient_checkpointing=variant.recomputes,
        )
        unet, step = training.unet, training.step
    else:
        unet = trainable(shape, args.precision)
        if variant.contiguous:
            unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        step = script(unet, args.precision, **variant.adamw)
    tune(unet, args)
    loss = bare(unet, shape, batch_size=size, resolution=args.resolution)

    def read() -> Tensor:
        value = loss()
        value.item()
        return value

    return functools.partial(rate, step, read if variant.reads_loss else loss, args.steps, size)


if __name__ == "__main__":
    main()
