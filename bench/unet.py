"""What makes the UNet's own step faster or slower: one thing changed at a time, against the step of `ip2p-train`.

Forward, backward, clip and optimizer on tensors that are there. Each variant takes turns with the step as it is: the
UNet in channels_last, PyTorch's fused attention, fused AdamW, not compiled, in float32 unless --precision says so.
"""

import argparse
import functools
import gc
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
from baselines import bare
from common import GPU, Row, parser, ratio, report, take_turns
from diffusers import UNet2DConditionModel
from shapes import SIZES
from step import model_flags, rate, trainable, trainer, tune
from torch import Tensor


class Variant(NamedTuple):
    """What is changed."""

    flags: Mapping[str, Any] = {}
    contiguous: bool = False  # weights and activations instead of channels_last
    masters: bool = False  # bfloat16 weights with float32 copies for the optimizer, instead of autocast
    adamw: Mapping[str, bool] = {"fused": True}
    reads_loss: bool = False  # at each step, which waits for the device
    batch: float = 1  # times as many samples in a batch
    recomputes: bool = False  # gradient checkpointing


LOOP = {"fused": False, "foreach": False}  # PyTorch's default on a CPU
VARIANTS = {
    "contiguous": Variant(contiguous=True),
    "AdamW by foreach": Variant(adamw={"foreach": True}),
    "AdamW in a loop": Variant(adamw=LOOP),
    "unfused attention": Variant({"attention": "plain"}),
    "xformers": Variant({"attention": "xformers"}),
    "compiled": Variant({"compile": "default"}),
    "compiled, CUDA graphs": Variant({"compile": "reduce-overhead"}),
    "bf16 autocast": Variant({"precision": "bf16"}),
    "bf16 weights, float32 masters": Variant(masters=True),
    "a quarter of the batch": Variant(batch=0.25),
    "four times the batch": Variant(batch=4),
    "gradient checkpointing": Variant(recomputes=True),
    "as diffusers' script": Variant(contiguous=True, adamw={"foreach": True} if GPU else LOOP, reads_loss=True),
}
ON_GPU = ("xformers", "compiled, CUDA graphs")


def main() -> None:
    flags = parser(__doc__, rounds=5)
    model_flags(flags)
    flags.add_argument("--steps", type=int, default=20 if GPU else 2, help="of each kind in a round")
    there = [name for name in VARIANTS if GPU or name not in ON_GPU]
    if not find_spec("xformers"):
        there = [name for name in there if name != "xformers"]
    flags.add_argument("--only", nargs="+", choices=there, default=there, metavar="VARIANT", help=", ".join(there))
    args = flags.parse_args()
    rows = []
    for name in args.only:
        try:
            rates = compare(name, args)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            continue
        rows += [
            Row(name, median(rates[name]), "samples/s"),
            Row(f"{name}, the step as it is beside", median(rates["as it is"]), "samples/s"),
            Row(f"{name}, rate / as it is", ratio(rates, name, "as it is"), "times"),
        ]
    report("unet", args, rows)


def compare(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Samples/s by round of one variant and of the step as it is; two UNets at a time are all that fits."""
    torch.compiler.reset()
    gc.collect()
    cases = {"as it is": case(Variant(), args), name: case(VARIANTS[name], args)}
    take_turns(1, cases)  # compiles, allocates
    return take_turns(args.rounds, cases)


def case(variant: Variant, args: argparse.Namespace) -> Callable[[], float]:
    """Samples/s of some steps of a variant."""
    args = argparse.Namespace(**{**vars(args), **variant.flags})
    args.batch_size = max(1, round(variant.batch * args.batch_size))
    if variant.masters:
        args.precision = "no"  # of autocast
    unet = trainable(args)
    if variant.contiguous:
        unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if variant.recomputes:
        unet.enable_gradient_checkpointing()
    optimizer = Masters(unet, variant.adamw) if variant.masters else adamw(unet.parameters(), variant.adamw)
    tune(unet, args)
    loss = bare(unet, SIZES[args.size], batch_size=args.batch_size, resolution=args.resolution)

    def read() -> Tensor:
        value = loss()
        value.item()
        return value

    train = trainer(unet, args.precision, optimizer)
    return functools.partial(rate, train, read if variant.reads_loss else loss, args.steps, args.batch_size)


def adamw(parameters: Iterable[Tensor], options: Mapping[str, bool]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-5, **options)  # type: ignore[arg-type]


class Masters:
    """Turns the weights of a UNet into bfloat16, and applies AdamW to copies that stay float32."""

    def __init__(self, unet: UNet2DConditionModel, options: Mapping[str, bool]):
        self.masters = [weight.detach().clone() for weight in unet.parameters()]
        torch.nn.Module.to(unet, torch.bfloat16)  # diffusers' own warns that some models lose by it
        self.weights: list[Tensor] = list(unet.parameters())
        self.optimizer, self.forward = adamw(self.masters, options), unet.forward
        unet.forward = self._half  # type: ignore[method-assign, assignment]

    def _half(self, sample: Tensor, timesteps: Tensor, text: Tensor, **rest: Any) -> Any:
        return self.forward(sample.bfloat16(), timesteps, text.bfloat16(), **rest)

    @torch.no_grad()
    def step(self) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None


if __name__ == "__main__":
    main()
