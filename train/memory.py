"""What a forward and a backward pass take of a GPU's memory, by one on tensors without contents.

diffusers' UNet runs under PyTorch's FakeTensorMode, and what is alive at a time is counted. Not counted: what CUDA and
its libraries take, and pieces of free memory too small to be used.
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .learning import Lora
from .unet import norm
from .unet.lora import add_adapters
from .unet.norm import stay_in_channels_last
from .unet.weights import Precision, take_float32


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
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                weakref.finalize(storage, self._gone, storage.nbytes())
                self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


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
        summed: a second pass, while the gradients of the first one are kept.
        norms: with the kernels for norms, as on a GPU unless it is compiled.
        lora: with adapters beside the weights, which alone are trained.
    """
    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config({**unet, "in_channels": shapes.latents[0]})
    torch.nn.Module.to(model.train(), dtype=precision.half, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if lora:
        add_adapters(model, lora, precision=precision.dtype)
    if norms:
        stay_in_channels_last(model)
    with FakeTensorMode(), mock.patch.object(norm, "kernels", _Nothing):
        fill(model)
        return passes(model, shapes, batch, precision, checkpointing=checkpointing, drop=drop, summed=summed)


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
        weight.register_post_accumulate_grad_hook(_drop)
    with Live(weights) as live, norms_as_on_cuda():
        for _ in range(2 if summed else 1):
            _pass(model, shapes, batch, precision)
        peak = live.most
    model.zero_grad()
    masters = 4 * sum(weight.numel() for weight in trained) if precision.copies else 0
    shapes_of = tuple(tuple(weight.shape) for weight in trained)
    return Passes(shapes_of, sum(weight.nbytes for weight in weights) + masters, peak)


def _pass(model: Any, shapes: Shapes, batch: int, precision: Precision) -> None:
    """Forward and backward, on numbers that do not matter."""
    sample, text = torch.randn(batch, *shapes.latents), torch.randn(batch, *shapes.text)
    added = None
    if shapes.pooled:
        added = {"text_embeds": torch.randn(batch, shapes.pooled), "time_ids": torch.zeros(batch, 6)}
    cast: Any = contextlib.nullcontext()
    if precision.name != "no" and not precision.half:
        cast = torch.autocast(next(model.parameters()).device.type, precision.dtype, cache_enabled=False)
    with cast:
        found = model(sample, torch.zeros(batch), text, added_cond_kwargs=added, return_dict=False)[0]
    # Not mse_loss, which on a CPU keeps what it sums.
    loss = (found.float() - torch.randn_like(found, dtype=torch.float32)).square().mean()
    del found
    loss.backward()


class _Nothing:
    """In place of Triton's kernels, which would compute with tensors that hold nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _drop(weight: Tensor) -> None:
    weight.grad = None


def fill(model: torch.nn.Module) -> None:
    """Give a model on the meta device tensors of the mode that is active, in place, laid out as they are."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)


@contextlib.contextmanager
def norms_as_on_cuda() -> Iterator[None]:
    """Norms as CUDA computes them, also for tensors of a CPU under autocast: in float32 there, and GroupNorm in NCHW.

    A fake CUDA device does not work without a GPU, and the list of what a CPU keeps in float32 has no norms on it. The
    functions are replaced, since checkpointing would not see other means when it computes again.
    """

    def as_on_cuda(norm: Any) -> Any:
        def cast(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled(tensor.device.type):
                tensor = tensor.float()
            with torch.autocast(tensor.device.type, enabled=False):
                return norm(tensor.contiguous(), *args, **kwargs)

        return cast

    with (
        mock.patch.object(F, "group_norm", as_on_cuda(F.group_norm)),
        mock.patch.object(F, "layer_norm", as_on_cuda(F.layer_norm)),
    ):
        yield
