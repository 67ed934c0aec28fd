"""All that an optimizer step does to the weights, in one pass on a GPU: unscale, clip, AdamW, average, copy.

PyTorch's fused AdamW wants gradients in the precision of the weights, and writes them back where they are scaled; the
average and the copies in half precision take passes of their own. Each number that is kept is read and written once
here. `Update._by_torch` says the same by PyTorch's functions, and a run compares the two before it trains.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Tensors = Sequence[Tensor]
BLOCK = 2048  # numbers that one program changes
WARPS = 8


@triton.jit
def _change(
    gradient, weight, first, second, average, copy, i, ok, numbers, lr, decay, beta1, beta2, epsilon, share,
    AVERAGES: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    divisor, bias1, bias2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    skipped = tl.load(numbers + 3) > 0
    g = tl.load(gradient + i, mask=ok).to(tl.float32) / divisor
    w, m, v = tl.load(weight + i, mask=ok), tl.load(first + i, mask=ok), tl.load(second + i, mask=ok)
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    new_w = w * (1 - lr * decay) - lr / bias1 * new_m / (tl.sqrt(new_v) / tl.sqrt(bias2) + epsilon)
    new_w = tl.where(skipped, w, new_w)
    tl.store(first + i, tl.where(skipped, m, new_m), mask=ok)
    tl.store(second + i, tl.where(skipped, v, new_v), mask=ok)
    tl.store(weight + i, new_w, mask=ok)
    if AVERAGES:
        mean = tl.load(average + i, mask=ok)
        tl.store(average + i, mean + share * (new_w - mean), mask=ok)
    if COPIES:
        tl.store(copy + i, new_w.to(copy.dtype.element_ty), mask=ok)


@triton.jit
def _kernel(
    gradient, weight, first, second, average, copy,  # the first tensor of each list
    gradients, places, sizes, blocks,  # where the others begin, (T,) and (T, 5); how long they are; (P, 2)
    numbers, lr, decay, beta1, beta2, epsilon, share,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, AVERAGES: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, block = tl.load(blocks + 2 * program), tl.load(blocks + 2 * program + 1)
    size, place = tl.load(sizes + tensor), places + 5 * tensor
    gradient += tl.multiple_of(tl.load(gradients + tensor), ALIGNED)
    weight += tl.multiple_of(tl.load(place), 16)
    first += tl.multiple_of(tl.load(place + 1), 16)
    second += tl.multiple_of(tl.load(place + 2), 16)
    if AVERAGES:
        average += tl.multiple_of(tl.load(place + 3), 16)
    if COPIES:
        copy += tl.multiple_of(tl.load(place + 4), 16)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= size:  # whole: read and written 16 bytes at a time, which a mask would prevent
        _change(gradient, weight, first, second, average, copy, i, None,
                numbers, lr, decay, beta1, beta2, epsilon, share, AVERAGES, COPIES)  # fmt: skip
    else:
        _change(gradient, weight, first, second, average, copy, i, i < size,
                numbers, lr, decay, beta1, beta2, epsilon, share, AVERAGES, COPIES)  # fmt: skip


class FusedStep:
    """Changes lists of tensors that stay where they are.

    Args:
        weights: T float32 tensors, each dense in some order of its dimensions.
        first, second: Adam's moments, float32, and in the same order.
        average: float32, or None.
        copies: in the precision that the UNet computes in, or None.
    """

    def __init__(
        self, weights: Tensors, first: Tensors, second: Tensors, average: Tensors | None, copies: Tensors | None
    ):
        device = weights[0].device
        self.weights, self.averages, self.copies = weights, average is not None, copies is not None
        lists = [weights, first, second, average or weights, copies or weights]
        for tensors in lists:
            for tensor, weight in zip(tensors, weights, strict=True):
                if ordered(tensor, weight) is not tensor:
                    raise ValueError(f"strides {tensor.stride()} of {tuple(tensor.shape)}, expected {weight.stride()}")
        self.bases = [tensors[0] for tensors in lists]
        places = [offsets(tensors) for tensors in lists]
        if any(place % 16 for column in places for place in column):
            raise ValueError("a tensor of the optimizer begins at an address that is no multiple of 16 numbers")
        self.places = torch.tensor(places, dtype=torch.int64).T.contiguous().to(device)  # (T, 5)
        sizes = [weight.numel() for weight in weights]
        self.sizes = torch.tensor(sizes, dtype=torch.int32, device=device)
        blocks = [torch.arange(-(-size // BLOCK), dtype=torch.int32) for size in sizes]
        numbers = [torch.full_like(block, tensor) for tensor, block in enumerate(blocks)]
        self.blocks = torch.stack([torch.cat(numbers), torch.cat(blocks)], dim=1).to(device)  # (P, 2)

    def __call__(self, gradients: Tensors, numbers: Tensor, group: dict[str, Any], *, share: float | None) -> None:
        """Take one step.

        Args:
            gradients: T tensors of one precision.
            numbers: (4,) float32 on the device: what gradients are divided by, one minus beta1 and beta2 to the power
                of the step, and 1 if nothing but the average shall move, else 0.
            group: learning rate, betas, epsilon and decay, as in `torch.optim.AdamW.param_groups`.
            share: of the new weights in the average, or None to leave it alone.
        """
        gradients = [ordered(gradient, weight) for gradient, weight in zip(gradients, self.weights, strict=True)]
        places = offsets(gradients)
        table = torch.tensor(places, dtype=torch.int64)
        if table.device != numbers.device:
            table = table.pin_memory().to(numbers.device, non_blocking=True)
        aligned = next(width for width in (16, 8, 4, 2, 1) if not any(place % width for place in places))
        launch: Any = _kernel[(len(self.blocks),)]
        launch(
            gradients[0], *self.bases, table, self.places, self.sizes, self.blocks, numbers,
            group["lr"], group["weight_decay"], *group["betas"], group["eps"], share or 0.0,
            ALIGNED=aligned, BLOCK=BLOCK, AVERAGES=share is not None and self.averages, COPIES=self.copies,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def offsets(tensors: Tensors) -> list[int]:
    """Where tensors of one precision begin, counted in numbers from the first one."""
    begin, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - begin) // size for tensor in tensors]


def ordered(tensor: Tensor, weight: Tensor) -> Tensor:
    """A tensor with its numbers in the order of the weight's: itself where it is so already."""
    strides = zip(tensor.shape, tensor.stride(), weight.stride(), strict=True)
    if all(one == other for size, one, other in strides if size > 1):
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)
