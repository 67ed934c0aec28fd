"""What a forward and a backward pass take of a GPU's memory, by one on tensors without contents.

diffusers' UNet runs on the meta device, and what is alive at a time is counted. Not counted: what CUDA and its
libraries take, and pieces of free memory too small to be used.
"""

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .learning import Lora
from .unet import norm as modules
from .unet.lora import add_adapters
from .unet.norm import stay_in_channels_last
from .unet.weights import Precision, take_float32

aten = torch.ops.aten


class Shapes(NamedTuple):
    """What a UNet is given for one sample."""

    latents: tuple[int, int, int]  # channels of noisy latent and picture together, height, width
    text: tuple[int, int]  # tokens, width
    pooled: int | None = None  # width of the pooled text, which SDXL has


class Passes(NamedTuple):
    """A forward and a backward pass."""

    trained: tuple[tuple[int, ...], ...]  # shapes of the weights that are
    static: int  # bytes of all weights, and of the float32 masters behind copies in half precision
    peak: int  # bytes beside these at most: activations, passing copies, gradients

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(map(math.prod, self.trained))


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside it that are alive, now and at most; what was there `before` is not counted."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in before:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (aten.convolution.default, aten.convolution_backward.default):
            out = _as_cudnn(out, [arg for arg in args[:3] if isinstance(arg, Tensor) and arg.dim() == 4][-2:])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                weakref.finalize(storage, self._gone, storage.nbytes())
                self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def _as_cudnn(out: Any, operands: list[Tensor]) -> Any:
    """What a convolution of an image and a weight gives on the meta device, laid out as cuDNN does."""
    last = torch.channels_last
    if operands[0].device.type != "meta" or not any(one.is_contiguous(memory_format=last) for one in operands):
        return out
    return tree_map_only(Tensor, lambda one: one.contiguous(memory_format=last) if one.dim() == 4 else one, out)


def simulate(
    unet: Mapping[str, Any],
    shapes: Shapes,
    batch: int,
    precision: Precision,
    *,
    checkpointing: bool,
    drop: bool = False,
    summed: bool = False,
    norms: bool = True,
    lora: Lora | None = None,
) -> Passes:
    """One step of a UNet of some configuration, of which nothing is computed: seconds, whatever the batch.

    Args:
        drop: let each gradient go as soon as it is there, as `--fused_backward` does.
        summed: while the gradients of an earlier pass are kept.
        norms: with the kernels for norms, as on a GPU unless it is compiled.
        lora: with adapters beside the weights, which alone are trained.
    """
    model = build(unet, shapes, precision, norms=norms, lora=lora)
    return passes(model, shapes, batch, precision, checkpointing=checkpointing, drop=drop, summed=summed)


def build(
    unet: Mapping[str, Any], shapes: Shapes, precision: Precision, *, norms: bool = True, lora: Lora | None = None
) -> Any:
    """A UNet as `simulate` is given it, in the precision of its weights, on the meta device."""
    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config({**unet, "in_channels": shapes.latents[0]})
    torch.nn.Module.to(model.train(), dtype=precision.half, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if lora:
        add_adapters(model, lora, precision=precision.dtype)
    if norms:
        stay_in_channels_last(model)
    return model


def passes(
    model: Any,
    shapes: Shapes,
    batch: int,
    precision: Precision,
    *,
    checkpointing: bool,
    drop: bool = False,
    summed: bool = False,
) -> Passes:
    """The same for a UNet that is there, in the precision of its weights, with contents or without."""
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    if checkpointing:
        model.enable_gradient_checkpointing()
    if precision.half:
        take_float32(model, precision.half)
    for weight in trained if drop else ():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with Live(weights) as live, as_on_cuda(precision.casts):
        for weight in trained if summed else ():
            weight.grad = torch.empty_like(weight)
        _pass(model, shapes, batch)
        peak = live.most
    model.zero_grad()
    masters = 4 * sum(weight.numel() for weight in trained) if precision.copies else 0
    shapes_of = tuple(tuple(weight.shape) for weight in trained)
    return Passes(shapes_of, sum(weight.nbytes for weight in weights) + masters, peak)


def _pass(model: Any, shapes: Shapes, batch: int) -> None:
    """Forward and backward."""
    found = predict(model, shapes, batch)
    # Not mse_loss, which on a CPU keeps what it sums.
    loss = (found.float() - torch.randn_like(found, dtype=torch.float32)).square().mean()
    del found
    loss.backward()


def predict(model: Any, shapes: Shapes, batch: int) -> Tensor:
    """What a UNet makes of numbers that do not matter."""
    with next(model.parameters()).device:
        given = torch.randn(batch, *shapes.latents), torch.zeros(batch), torch.randn(batch, *shapes.text)
        added = None
        if shapes.pooled:
            added = {"text_embeds": torch.randn(batch, shapes.pooled), "time_ids": torch.zeros(batch, 6)}
    return model(*given, added_cond_kwargs=added, return_dict=False)[0]


class _Nothing:
    """In place of Triton's kernels, which would compute with tensors that hold nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextlib.contextmanager
def as_on_cuda(casts: torch.dtype | None = None) -> Iterator[None]:
    """PyTorch's functions as CUDA computes them, under autocast to a precision without its cache if `casts`.

    On the meta device there is no autocast, and attention would keep all scores. Norms are in float32 under autocast,
    which a CPU's leaves as they are, and GroupNorm is in NCHW. The functions are replaced, as checkpointing would not
    see other means when it computes again.
    """

    def norm(function: Any) -> Any:
        def computed(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if casts or torch.is_autocast_enabled("cpu"):
                tensor = tensor.float()
            with torch.autocast("cpu", enabled=False):
                return function(tensor.contiguous(), *args, **kwargs)

        return computed

    def product(function: Any) -> Any:
        def computed(*args: Any, **kwargs: Any) -> Tensor:
            return function(*(arg.to(casts) if isinstance(arg, Tensor) else arg for arg in args), **kwargs)

        return computed if casts else function

    def attention(*args: Any, scale: float | None = None, **kwargs: Any) -> Tensor:
        if args[0].device.type != "meta":
            return scores(*args, scale=scale, **kwargs)
        return aten._scaled_dot_product_flash_attention_for_cpu(*args, scale=scale, **kwargs)[0]

    scores = F.scaled_dot_product_attention
    replaced = {name: norm(getattr(F, name)) for name in ("group_norm", "layer_norm")}
    replaced |= {name: product(getattr(F, name)) for name in ("linear", "conv2d")}
    replaced |= {"scaled_dot_product_attention": product(attention)}
    with mock.patch.multiple(F, **replaced), mock.patch.object(modules, "kernels", _Nothing):
        yield
