"""Counts what a GPU would run for a piece of PyTorch, from operations on CPU tensors that may have no contents."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FORWARD_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu_backward
PRODUCTS = ("convolutions", "linear layers", "attention")
HIDDEN = ("hidden layout copies", "hidden further passes")
CLASSES = {
    "convolutions": [aten.convolution, aten.convolution_backward],
    "linear layers": [aten.mm, aten.addmm, aten.bmm, aten.baddbmm],
    "attention": [FORWARD_ATTENTION, BACKWARD_ATTENTION],
    "norms": [
        *(aten.native_group_norm, aten.native_group_norm_backward),
        *(aten.native_layer_norm, aten.native_layer_norm_backward),
    ],
    "SiLU and GELU": [aten.silu, aten.silu_backward, aten.gelu, aten.gelu_backward],
    "casts": [aten._to_copy],
    "copies": [aten.clone, aten.copy_, aten.cat],
}
REST = "sums and the like"
CLASS_OF = {operation: name for name, operations in CLASSES.items() for operation in operations}
OVERWRITE = {aten.copy_, aten.fill_, aten.zero_}  # these do not read what they write to


class Count(TorchDispatchMode):
    """Kernels, bytes and FLOPs of the operations inside it.

    An operation that computes or copies counts as one kernel, and as reading and writing each of its tensors once. What
    CUDA's implementation does besides stands apart, under the names of HIDDEN.

    Attributes:
        kernels: how many operations do any work; views and empty tensors do none.
        hidden: how many layout copies convolutions make of what they are given.
        bytes: read and written, by class: those of CLASSES, REST for all others, and HIDDEN.
        flops: by class, with the formulas of torch.utils.flop_counter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.hidden = 0, 0
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()

    @property
    def outside(self) -> int:
        """Bytes moved outside convolutions, matrix products and attention, without what is hidden."""
        return sum(count for name, count in self.bytes.items() if name not in PRODUCTS + HIDDEN)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, kind = func(*args, **kwargs), func.overloadpacket
        inputs = tensors((args, kwargs))
        if not works(func, inputs, out):
            return out
        name, results = CLASS_OF.get(kind, REST), tensors(out)
        if func._schema.is_mutable:
            results = tensors(written(func, args, kwargs))
        self.kernels += 1
        self.bytes[name] += moved(inputs[1:] if kind in OVERWRITE else inputs) + moved(results)
        self.bytes["hidden further passes"] += further(kind, inputs, out)
        if name == "attention":
            shapes = [tensor.shape for tensor in inputs]
            forward = kind is FORWARD_ATTENTION
            self.flops[name] += sdpa_flop_count(*shapes[:3]) if forward else sdpa_backward_flop_count(*shapes[:4])
        elif kind in flop_registry:
            self.flops[name] += flop_registry[kind](*args, **kwargs, out_val=out)
        return self.laid_out(kind, inputs, out) if name == "convolutions" else out

    def laid_out(self, kind: Any, inputs: list[Tensor], out: Any) -> Any:
        """Give a convolution's results cuDNN's layout, and count the copies that it needs of its inputs.

        A CPU has a rule of its own, which depends on its instructions: hence by hand.
        """
        inputs = inputs[: 2 if kind is aten.convolution else 3]
        layouts = {suggest_memory_format(tensor) for tensor in inputs[-2:]}  # of image and weight
        layout = torch.channels_last if torch.channels_last in layouts else torch.contiguous_format
        copied = [tensor for tensor in inputs if not tensor.is_contiguous(memory_format=layout)]
        self.hidden += len(copied)
        self.bytes["hidden layout copies"] += 2 * moved(copied)
        if isinstance(out, Tensor):
            return out.contiguous(memory_format=layout)
        image, weight, bias = out
        return *(None if each is None else each.contiguous(memory_format=layout) for each in (image, weight)), bias


def works(func: Any, inputs: list[Tensor], out: Any) -> bool:
    """Whether an operation computes or copies anything: it writes in place, or into memory that is not an input's."""
    if func._schema.is_mutable:
        return True
    if "empty" in func.overloadpacket.__name__:
        return False
    known = set(map(storage, inputs))
    return any(storage(tensor) not in known for tensor in tensors(out))


def written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """What an operation in place writes to: tensors, and lists of them."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return [given.get(argument.name) for argument in func._schema.arguments if argument.is_write]


def further(kind: Any, inputs: list[Tensor], out: Any) -> int:
    """Bytes of passes that CUDA's kernels make besides reading the inputs and writing the outputs once.

    cuDNN's convolution leaves the bias out: it is added in place, and its gradient is a sum over the output's gradient.
    GroupNorm reads its input once for the statistics and once more to normalize it; its backward pass, and that of
    LayerNorm, read gradient and input twice.
    """
    if kind is aten.convolution:
        return 2 * moved([out]) if len(inputs) == 3 else 0
    if kind is aten.convolution_backward:
        return moved(inputs[:1]) if out[2] is not None else 0
    if kind is aten.native_group_norm:
        return moved(inputs[:1])
    return moved(inputs[:2]) if kind in (aten.native_group_norm_backward, aten.native_layer_norm_backward) else 0


def moved(found: Iterable[Tensor]) -> int:
    """Bytes of tensors, one that is given twice counted once, and so what `expand` repeats."""
    unique = {(storage(each), each.storage_offset(), each.shape, each.stride()): each for each in found}
    total = 0
    for tensor in unique.values():
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride else 1
        total += size
    return total


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps for the backward pass of what runs inside: each piece of memory once, without the weights."""

    def __init__(self, weights: Iterable[Tensor]):
        known = {storage(weight): 0 for weight in weights}
        self.kept: dict[int, tuple[Tensor, int]] = {}

        def pack(tensor: Tensor) -> Tensor:
            if storage(tensor) not in known:  # the tensor is kept so that nothing else gets its storage's number
                self.kept[storage(tensor)] = tensor, tensor.untyped_storage().nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.kept.values())
