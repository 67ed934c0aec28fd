"""Numbers that are kept in fewer bits than they are computed in, rounded up or down at random so that nothing is lost.

A step at a learning rate for fine-tuning is smaller than half of the last digit of most bfloat16 weights: rounded to
nearest they never move (docs/log.md). Rounded up with the probability of what is cut off, they are right in the mean
(arXiv 1502.02551; for weights of networks in bfloat16 arXiv 2010.06192). `fused.py` does the same in a kernel.

What is drawn is a function of seed, step, tensor, and position in its memory: a hash, whose numbers any device makes
alike and in any order, and which leaves no state behind.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # numbers that share a scale, in 8 bits (arXiv 2110.02861, section 2.1)
# lowbias32 (nullprogram.com/blog/2018/07/31), as signed numbers: PyTorch computes with few others on all devices.
FIRST, SECOND, THIRD = 0x7FEB352D, 0x846CA68B - 2**32, 0x9E3779B9 - 2**32


def hashed(numbers: Tensor) -> Tensor:
    """Each int32 number's hash, int32; different numbers have different ones."""
    numbers = (numbers ^ ((numbers >> 16) & 0xFFFF)).mul_(FIRST)
    numbers = (numbers ^ ((numbers >> 15) & 0x1FFFF)).mul_(SECOND)
    return numbers ^ ((numbers >> 16) & 0xFFFF)


def step_key(seed: int, step: Tensor) -> Tensor:
    """What is drawn of in one step, () int32 on the device of `step`, which is () of any kind and not waited for."""
    return hashed(step.int() ^ int(np.random.SeedSequence(seed).generate_state(1).view(np.int32)[0]))


def tensor_key(key: Tensor, number: int) -> Tensor:
    """The same for one tensor of a step."""
    return hashed(key + number)


def draw(key: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each position in a tensor three numbers from 0 to 65,535, (size,) int32 each: for weight and moments."""
    position = torch.arange(size, dtype=torch.int32, device=key.device)
    bits = hashed(hashed(position ^ key) + key)
    more = hashed(bits + THIRD)
    return bits & 0xFFFF, (bits >> 16) & 0xFFFF, more & 0xFFFF


def to_bfloat16(values: Tensor, drawn: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down so that the mean is right; what bfloat16 can hold stays as it is.

    Args:
        values: (n,) float32.
        drawn: (n,) int32 from 0 to 65,535, uniform: what is added to the half that is cut off.
    """
    return ((values.view(torch.int32) + drawn) >> 16).to(torch.int16).view(torch.bfloat16)


def code(*, signed: bool) -> Tensor:
    """What 8 bits stand for, as shares of the largest number of a block: (256,) float32, ascending to 1.

    The dynamic data type of arXiv 1511.04561: seven decades, each with half as many steps as the next. Signed there is
    a zero; unsigned, where it would be what a step is divided by, there is none.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        decades.append(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    up = torch.cat(decades) / decades[-1][-1]
    levels = torch.cat([-up.flip(0), torch.zeros(1), up]) if signed else up
    return torch.cat([levels, torch.ones(256 - len(levels))])  # which nothing is rounded up to


def to_8_bits(values: Tensor, levels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Round float32 to 8 bits, up or down so that the mean is right within the levels.

    Args:
        values: (n,) float32.
        levels: what 8 bits stand for (`code`).
        drawn: (n,) int32 from 0 to 65,535, uniform.

    Returns:
        (n,) uint8, and the size of the largest number of each block, (ceil(n / 256),) float32.
    """
    size = len(values)
    blocks = F.pad(values, (0, -size % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    shares = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).flatten()[:size]
    below = (torch.searchsorted(levels, shares, right=True) - 1).clamp(0, 254)
    low, high = levels[below], levels[below + 1]
    return (below + ((shares - low) * 65536 > (high - low) * (drawn + 0.5))).to(torch.uint8), scale


def from_8_bits(numbers: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """What `to_8_bits` has rounded, (n,) float32."""
    return levels[numbers.int()] * scale.repeat_interleave(BLOCK)[: len(numbers)]
