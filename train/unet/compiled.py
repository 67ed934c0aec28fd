"""A compiled UNet must have the gradients that it has uncompiled: compilers of kernels have lost some, silently."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...encode.base.errors import TrainError

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
        print("--compile: no gradient of the first batch is finite, so the compiled ones could not be checked")
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
