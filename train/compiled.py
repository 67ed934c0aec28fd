"""A compiled UNet must have the gradients that it has uncompiled: compilers of kernels have lost some, silently."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor

from ..encode.errors import TrainError

WRONG = 0.5  # error of a parameter's gradient over its size; bfloat16 makes 0.03, a gradient that is lost 1
NEGLIGIBLE = 1e-3  # share of the whole gradient, below which a parameter's is rounding


def check_gradients(accelerator: Accelerator, unet: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
    """Compare the gradients of the compiled UNet with those of the same UNet run eagerly, before it is trained.

    One gradient is accumulated over minus the other, so that this takes no more memory than a step. A gradient of
    fp16 that overflows says nothing and is let pass. PyTorch's threads 190796 and 193061 tell of such gradients.

    Args:
        accelerator: the one that prepared `unet`. Where it shards the weights, nothing is compared.
        unet: compiled, without gradients, and left without.
        loss: the loss of one batch, the same whenever it is called.

    Raises:
        TrainError: a gradient is wrong.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return  # no process has a whole gradient
    with torch.compiler.set_stance("force_eager"):
        accelerator.backward(loss())
    gradients = {name: weight for name, weight in unet.named_parameters() if weight.grad is not None}
    size = norms(gradients.values())
    accelerator.backward(-loss())
    error = norms(gradients.values())
    unet.zero_grad(set_to_none=True)
    finite = size.isfinite()
    # Not `error > …`: what is finite eagerly and not so compiled is wrong too.
    wrong = finite & ~(error <= WRONG * size + NEGLIGIBLE * size[finite].norm())
    if wrong.any():
        worst = int((error / size).nan_to_num(torch.inf).where(wrong, 0).argmax())
        raise TrainError(
            f"--compile: torch {torch.__version__} compiles this UNet wrongly for {accelerator.device.type} in "
            f"{accelerator.mixed_precision}: {int(wrong.sum())} of {len(wrong)} gradients are not those of the "
            f"uncompiled UNet, most of all that of {list(gradients)[worst]}, by {error[worst] / size[worst]:.0%}. "
            "Leave --compile out, set TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 in the environment, or try another torch"
        )


def norms(weights: Iterable[Tensor]) -> Tensor:
    """The size of each weight's gradient, on the CPU."""
    return torch.stack([torch.linalg.vector_norm(weight.grad, dtype=torch.float32) for weight in weights]).cpu()  # type: ignore[arg-type]
