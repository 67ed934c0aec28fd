"""Runs a module of ip2p on a processor without bfloat16's instructions, which would take twenty times as long there.

    python examples/openmoji/emulated.py ip2p.train --weights bf16 ...

Products are computed in float32 and rounded to bfloat16, as such instructions do it.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
import torch.nn.functional as F


def wide(value: Any) -> Any:
    """What a product in bfloat16 sees of a value, in float32."""
    return value.bfloat16().float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def in_float32(product: Any) -> Any:
    """A function of torch.nn.functional that computes what is bfloat16 in float32, and rounds its result."""

    def rounded(*args: Any, **kwargs: Any) -> Any:
        cast = torch.is_autocast_enabled("cpu")  # which would cast what is float32
        if not cast and not any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in args):
            return product(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return product(*map(wide, args), **kwargs).bfloat16()

    return rounded


if __name__ == "__main__":
    for name in ("linear", "conv2d", "scaled_dot_product_attention"):
        setattr(F, name, in_float32(getattr(F, name)))
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
