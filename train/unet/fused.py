"""All that an optimizer step does to the weights, in one pass on a GPU: unscale, clip, AdamW, average, copy.

PyTorch's fused AdamW wants gradients in the precision of the weights, and writes them back where they are scaled; the
average and the copies in half precision take passes of their own. Each number that is kept is read and written once
here, and rounded as `rounding.py` does it where it is kept in fewer bits than float32. `Update._by_torch` says the same
by PyTorch's functions, and a run compares the two before it trains.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .optimizers import ordered
from .rounding import code

Tensors = Sequence[Tensor]
BLOCK = 2048  # numbers that one program changes
SHARED: tl.constexpr = tl.constexpr(256)  # of which so many share a scale in 8 bits (`rounding.BLOCK`)
WARPS = 8


@triton.jit
def _hashed(x):  # uint32, as in rounding.py
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, drawn):  # float32 to bfloat16, up or down
    return ((x.to(tl.int32, bitcast=True) + drawn.to(tl.int32)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _to_8_bits(x, levels, drawn):  # (blocks, 256) float32 to uint8, and the scale of each block
    scale = tl.max(tl.abs(x), axis=1)
    share = x / tl.maximum(scale, 1.1754944e-38)[:, None]
    below = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        above = below + (128 >> bit)
        below = tl.where(tl.load(levels + above) <= share, above, below)
    below = tl.minimum(below, 254)
    low, high = tl.load(levels + below), tl.load(levels + below + 1)
    up = (share - low) * 65536 > (high - low) * (drawn.to(tl.float32) + 0.5)
    return (below + up.to(tl.int32)).to(tl.uint8), scale


@triton.jit
def _change(
    gradient, weight, first, second, average, copy, scale1, scale2, i, ok, j, fine, levels, key,
    numbers, lr, decay, beta1, beta2, epsilon, share,
    AVERAGES: tl.constexpr, COPIES: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    divisor, bias1, bias2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    skipped = tl.load(numbers + 3) > 0
    g = tl.load(gradient + i, mask=ok).to(tl.float32) / divisor
    old_w, old_m, old_v = tl.load(weight + i, mask=ok), tl.load(first + i, mask=ok), tl.load(second + i, mask=ok)
    if EIGHT:
        old1, old2 = tl.load(scale1 + j, mask=fine), tl.load(scale2 + j, mask=fine)
        m = tl.load(levels + old_m.to(tl.int32), mask=ok) * old1[:, None]
        root = tl.load(levels + 256 + old_v.to(tl.int32), mask=ok) * old2[:, None]
        v = root * root
    else:
        m, v = old_m.to(tl.float32), old_v.to(tl.float32)
    w = old_w.to(tl.float32)
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    new_w = w * (1 - lr * decay) - lr / bias1 * new_m / (tl.sqrt(new_v) / tl.sqrt(bias2) + epsilon)
    bits = i.to(tl.uint32)
    more = bits
    if EIGHT or first.dtype.element_ty == tl.bfloat16:
        bits = _hashed(_hashed(bits ^ key) + key)
        more = _hashed(bits + 0x9E3779B9)
    if weight.dtype.element_ty == tl.bfloat16:
        new_w = _rounded(new_w, bits & 0xFFFF)
    if EIGHT:
        # What lies beyond the end of a tensor is of no block.
        whole_m, whole_v = new_m, tl.sqrt(new_v)
        if ok is not None:
            whole_m, whole_v = tl.where(ok, whole_m, 0.0), tl.where(ok, whole_v, 0.0)
        new_m, new1 = _to_8_bits(whole_m, levels, (bits >> 16) & 0xFFFF)  # pyright: ignore[reportGeneralTypeIssues]
        new_v, new2 = _to_8_bits(whole_v, levels + 256, more & 0xFFFF)  # pyright: ignore[reportGeneralTypeIssues]
        tl.store(scale1 + j, tl.where(skipped, old1, new1), mask=fine)
        tl.store(scale2 + j, tl.where(skipped, old2, new2), mask=fine)
    elif first.dtype.element_ty == tl.bfloat16:
        new_m, new_v = _rounded(new_m, (bits >> 16) & 0xFFFF), _rounded(new_v, more & 0xFFFF)
    new_w = tl.where(skipped, old_w, new_w)
    tl.store(first + i, tl.where(skipped, old_m, new_m), mask=ok)
    tl.store(second + i, tl.where(skipped, old_v, new_v), mask=ok)
    tl.store(weight + i, new_w, mask=ok)
    new_w = new_w.to(tl.float32)
    if AVERAGES:
        mean = tl.load(average + i, mask=ok)
        tl.store(average + i, mean + share * (new_w - mean), mask=ok)
    if COPIES:
        tl.store(copy + i, new_w.to(copy.dtype.element_ty), mask=ok)


@triton.jit
def _kernel(
    gradient, weight, first, second, average, copy, scale1, scale2,  # the first tensor of each list
    gradients, places, sizes, blocks,  # where the others begin, (T,) and (T, 7); how long they are; (P, 2)
    levels, keys, number,  # for 8 bits (2, 256); what is drawn of, and the number of the first tensor
    numbers, lr, decay, beta1, beta2, epsilon, share,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, AVERAGES: tl.constexpr, COPIES: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, block = tl.load(blocks + 2 * program), tl.load(blocks + 2 * program + 1)
    size, place = tl.load(sizes + tensor), places + 7 * tensor
    gradient += tl.multiple_of(tl.load(gradients + tensor), ALIGNED)
    weight += tl.multiple_of(tl.load(place), 16)
    first += tl.multiple_of(tl.load(place + 1), 16)
    second += tl.multiple_of(tl.load(place + 2), 16)
    if AVERAGES:
        average += tl.multiple_of(tl.load(place + 3), 16)
    if COPIES:
        copy += tl.multiple_of(tl.load(place + 4), 16)
    i = block * BLOCK + tl.arange(0, BLOCK)
    j = block * (BLOCK // SHARED) + tl.arange(0, BLOCK // SHARED)
    if EIGHT:
        scale1 += tl.multiple_of(tl.load(place + 5), 16)
        scale2 += tl.multiple_of(tl.load(place + 6), 16)
        i = j[:, None] * SHARED + tl.arange(0, SHARED)[None, :]
    key = _hashed((tl.load(keys) + tensor + number).to(tl.uint32))
    if (block + 1) * BLOCK <= size:  # whole: read and written 16 bytes at a time, which a mask would prevent
        _change(gradient, weight, first, second, average, copy, scale1, scale2, i, None, j, None, levels, key,
                numbers, lr, decay, beta1, beta2, epsilon, share, AVERAGES, COPIES, EIGHT)  # fmt: skip
    else:
        _change(gradient, weight, first, second, average, copy, scale1, scale2, i, i < size, j, j * SHARED < size,
                levels, key, numbers, lr, decay, beta1, beta2, epsilon, share, AVERAGES, COPIES, EIGHT)  # fmt: skip


class FusedStep:
    """Changes lists of tensors that stay where they are.

    Args:
        weights: T float32 or bfloat16 tensors, each dense in some order of its dimensions.
        first, second: Adam's moments, float32 or bfloat16 in the same order, or 8 bits in one row as they lie there.
        average: float32, or None.
        copies: in the precision that the UNet computes in, or None.
        scales: of both moments in 8 bits, T tensors each; else none.
        number: of the first tensor among all that are rounded in a step.
    """

    def __init__(
        self,
        weights: Tensors,
        first: Tensors,
        second: Tensors,
        average: Tensors | None,
        copies: Tensors | None,
        scales: Sequence[Tensors] = (),
        number: int = 0,
    ):
        device = weights[0].device
        self.weights, self.averages, self.copies = weights, average is not None, copies is not None
        self.eight, self.number = bool(scales), number
        self.levels = torch.cat([code(signed=signed) for signed in (True, False)]).to(device)
        lists = [weights, first, second, average or weights, copies or weights, *(scales or (weights, weights))]
        for tensors in lists:
            for tensor, weight in zip(tensors, weights, strict=True):
                if tensor.dim() == weight.dim() > 1 and ordered(tensor, weight) is not tensor:
                    raise ValueError(f"strides {tensor.stride()} of {tuple(tensor.shape)}, expected {weight.stride()}")
        self.bases = [tensors[0] for tensors in lists]
        places = [offsets(tensors) for tensors in lists]
        if any(place % 16 for column in places for place in column):
            raise ValueError("a tensor of the optimizer begins at an address that is no multiple of 16 numbers")
        self.places = torch.tensor(places, dtype=torch.int64).T.contiguous().to(device)  # (T, 7)
        sizes = [weight.numel() for weight in weights]
        self.sizes = torch.tensor(sizes, dtype=torch.int32, device=device)
        blocks = [torch.arange(-(-size // BLOCK), dtype=torch.int32) for size in sizes]
        numbers = [torch.full_like(block, tensor) for tensor, block in enumerate(blocks)]
        self.blocks = torch.stack([torch.cat(numbers), torch.cat(blocks)], dim=1).to(device)  # (P, 2)

    def __call__(
        self, gradients: Tensors, numbers: Tensor, group: dict[str, Any], *, key: Tensor | None, share: float | None
    ) -> None:
        """Take one step.

        Args:
            gradients: T tensors of one precision.
            numbers: (4,) float32 on the device: what gradients are divided by, one minus beta1 and beta2 to the power
                of the step, and 1 if nothing but the average shall move, else 0.
            group: learning rate, betas, epsilon and decay, as in `torch.optim.AdamW.param_groups`.
            key: what is drawn of in this step (`rounding.step_key`), where numbers are rounded.
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
            gradients[0], *self.bases, table, self.places, self.sizes, self.blocks, self.levels,
            self.blocks if key is None else key, self.number, numbers,
            group["lr"], group["weight_decay"], *group["betas"], group["eps"], share or 0.0,
            ALIGNED=aligned, BLOCK=BLOCK, AVERAGES=share is not None and self.averages, COPIES=self.copies,
            EIGHT=self.eight, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def offsets(tensors: Tensors) -> list[int]:
    """Where tensors of one precision begin, counted in numbers from the first one."""
    begin, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - begin) // size for tensor in tensors]
