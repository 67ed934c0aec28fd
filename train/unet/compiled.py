"""What compilers make is held against PyTorch's own functions before it trains: some have been wrong, silently."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...encode.base.console import say
from ...encode.base.errors import TrainError, reason
from .average import Average
from .update import Update
from .weights import Weights

WRONG = 0.5  # error of a parameter's gradient over its size; bfloat16 makes 0.03, a gradient that is lost 1
NEGLIGIBLE = 1e-3  # share of the whole gradient, below which a parameter's is rounding
# Of the loss in float16: enough that gradients are no zeros. The scale that training begins with, 65,536, makes many of
# them overflow in the first step, and then nothing could be compared.
SCALE = 1024


def check_gradients(unet: torch.nn.Module, loss: Callable[[], Tensor], precision: str) -> None:
    """Compare the gradients of the compiled UNet with those of the same UNet run eagerly, before it is trained.

    One gradient is accumulated over minus the other, so that this takes no more memory than a step.
    PyTorch's threads 190796 and 193061 tell of such gradients.

    Args:
        unet: compiled, without gradients, and left without.
        loss: the loss of one batch, the same whenever it is called.
        precision: no, fp16 or bf16, in which it computes.

    Raises:
        TrainError: a gradient is wrong.
    """
    scale = SCALE if precision == "fp16" else 1
    with torch.compiler.set_stance("force_eager"):
        (scale * loss()).backward()
    gradients = {name: weight for name, weight in unet.named_parameters() if weight.grad is not None}
    size = norms(gradients.values())
    (-scale * loss()).backward()
    error = norms(gradients.values())
    unet.zero_grad(set_to_none=True)
    finite = size.isfinite()
    if not finite.any():
        say("--compile: no gradient of the first batch is finite, so the compiled ones could not be checked")
    # Not `error > …`: what is finite eagerly and not so compiled is wrong too.
    wrong = finite & ~(error <= WRONG * size + NEGLIGIBLE * size[finite].norm())
    if wrong.any():
        worst = int((error / size).nan_to_num(torch.inf).where(wrong, 0).argmax())
        device = next(unet.parameters()).device.type
        raise TrainError(
            f"--compile: torch {torch.__version__} compiles this UNet wrongly for {device} in {precision}: "
            f"{int(wrong.sum())} of {len(wrong)} gradients are not those of the uncompiled UNet, most of all that of "
            f"{list(gradients)[worst]}, by {error[worst] / size[worst]:.0%}. "
            "Leave --compile out, set TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 in the environment, or try another torch"
        )


def norms(weights: Iterable[Tensor]) -> Tensor:
    """The size of each weight's gradient, on the CPU."""
    return torch.stack([torch.linalg.vector_norm(weight.grad, dtype=torch.float32) for weight in weights]).cpu()  # type: ignore[arg-type]


def takes_one_pass(device: torch.device, half: torch.dtype | None) -> bool:
    """Whether the kernel for one pass can be had, and does on small tensors what PyTorch's functions do."""
    if device.type != "cuda":
        return False
    try:
        error = disagreement(device, half)
    except Exception as error:  # whatever goes wrong between a driver, a compiler and a kernel: there is another way
        problem = reason(error)
    else:
        if error < 1e-5:
            return True
        problem = f"its kernel is off by {error:.1e}"
    say(f"the optimizer takes several passes over the weights instead of one: {problem}")
    return False


def disagreement(device: torch.device, half: torch.dtype | None) -> float:
    """How far the weights, moments and averages of both ways are apart after four steps, of which one is skipped."""
    found = []
    for fused in (False, True):
        generator = torch.Generator().manual_seed(0)
        unet = torch.nn.Sequential(torch.nn.Conv2d(8, 20, 3), torch.nn.Linear(41, 1000), torch.nn.Linear(5, 3))
        for weight in unet.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)
        unet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = Weights(unet, half)
        average = Average(weights.masters, 0.9)
        optimizer = torch.optim.AdamW(weights.masters, lr=0.1, weight_decay=0.1, fused=True)
        update = Update(weights, optimizer, 10.0, average, fused=fused)
        for step in range(4):
            for weight in weights.parameters:
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.grad = torch.empty_like(weight).copy_(noise * (torch.nan if step == 2 else 1))
            update(averages=step != 1)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        stale = [
            copy.float() - master.to(copy).float()
            for copy, master in zip(weights.parameters, weights.masters, strict=True)
        ]
        found.append([*weights.masters, *average.tensors, *moments, *stale])
    apart = [(one - other).abs().max() for one, other in zip(*found, strict=True)]
    return torch.stack(apart).max().item()  # which is no number where one of them is none
