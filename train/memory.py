"""What a run needs of a GPU's memory, before anything is loaded: one step on tensors without contents, and arithmetic.

diffusers' UNet runs forward and backward under PyTorch's FakeTensorMode, and what is alive at a time is counted.
Moments and averages are so many bytes for each weight. Not counted: what CUDA and its libraries take, and fragments.
"""

import contextlib
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

from .unet import norm
from .unet.norm import stay_in_channels_last
from .unet.weights import Precision, take_float32


class Shapes(NamedTuple):
    """What a UNet is given for one sample."""

    latents: tuple[int, int, int]  # channels of noisy latent and picture together, height, width
    text: tuple[int, int]  # tokens, width
    pooled: int | None = None  # width of the pooled text, which SDXL has


class Passes(NamedTuple):
    """A forward and a backward pass."""

    weights: int  # numbers
    static: int  # bytes of the weights, and of the float32 masters behind copies in half precision
    peak: int  # bytes beside these at most: activations, passing copies, gradients


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
    norms: bool = True,
) -> Passes:
    """One step of a UNet of some configuration, of which nothing is computed: seconds, whatever the batch.

    Args:
        drop: let each gradient go as soon as it is there, as `--fused_backward` does.
        norms: with the kernels for norms, as on a GPU unless it is compiled.
    """
    with torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config({**unet, "in_channels": shapes.latents[0]})
    torch.nn.Module.to(model.train(), dtype=precision.half, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if norms:
        stay_in_channels_last(model)
    with FakeTensorMode(), mock.patch.object(norm, "kernels", _Nothing):
        fill(model)
        return passes(model, shapes, batch, precision, checkpointing=checkpointing, drop=drop)


def passes(
    model: Any, shapes: Shapes, batch: int, precision: Precision, *, checkpointing: bool, drop: bool = False
) -> Passes:
    """The same for a UNet that is there, in the precision of its weights, with contents or without."""
    weights = list(model.parameters())
    if checkpointing:
        model.enable_gradient_checkpointing()
    if precision.half:
        take_float32(model, precision.half)
    for weight in weights if drop else ():
        weight.register_post_accumulate_grad_hook(_drop)
    autocast = precision.name != "no" and not precision.copies
    device = weights[0].device.type
    cast = torch.autocast(device, precision.dtype, cache_enabled=False) if autocast else contextlib.nullcontext()
    with Live(weights) as live, _norms_as_on_cuda():
        sample, text = torch.randn(batch, *shapes.latents), torch.randn(batch, *shapes.text)
        added = None
        if shapes.pooled:
            added = {"text_embeds": torch.randn(batch, shapes.pooled), "time_ids": torch.zeros(batch, 6)}
        channels = model.config.out_channels
        with cast:
            found = model(sample, torch.zeros(batch), text, added_cond_kwargs=added, return_dict=False)[0]
        # Not mse_loss, which on a CPU keeps what it sums.
        loss = (found.float() - torch.randn(batch, channels, *shapes.latents[1:])).square().mean()
        del found
        loss.backward()
        peak = live.most
    model.zero_grad()
    numbers = sum(weight.numel() for weight in weights)
    masters = 4 * numbers if precision.half else 0
    return Passes(numbers, sum(weight.nbytes for weight in weights) + masters, peak)


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
def _norms_as_on_cuda() -> Iterator[None]:
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
