"""The machine that a run finds: devices, processes, and the precision that the UNet computes in there."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)

from ..encode.base.errors import SettingsError
from .config import TrainConfig

PATIENCE = timedelta(days=1)
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class Precision(NamedTuple):
    """The precision that the UNet computes in, and how.

    Attributes:
        name: no, fp16 or bf16.
        copies: by weights that are copies of float32 masters in this precision, in place of autocast.
    """

    name: str
    copies: bool

    @property
    def dtype(self) -> torch.dtype:
        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.name]

    @property
    def half(self) -> torch.dtype | None:
        """That of the weights, if they are copies."""
        return self.dtype if self.copies else None


def choose_precision(config: TrainConfig, *, cuda: bool) -> Precision:
    """Take the precision of the flags, or of accelerate's launcher.

    On a GPU the weights become half-precision copies, which spares autocast's casts. Gradients that are summed over
    several batches would lose too much in that precision, and AdamW in 8 bits takes no others than float32: there
    autocast stays.

    Raises:
        SettingsError: the launcher's is none that is known here.
    """
    name = config.machine.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if name not in ("no", "fp16", "bf16"):
        raise SettingsError(f"accelerate's mixed precision {name}: expected no, fp16 or bf16 (--mixed_precision)")
    summed = config.steps.gradient_accumulation_steps > 1
    return Precision(name, cuda and name != "no" and not summed and not config.optimizer.use_8bit_adam)


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, Precision]:
    """Set up devices, processes and trackers.

    Raises:
        SettingsError: an engine that would need another way of training, or flags that do not fit the machine.
    """
    for engine in SHARDING:  # before accelerate looks for an engine that may not be installed
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SettingsError(
                f"accelerate is set up for {engine}, which shards what ip2p keeps whole on each GPU: "
                "use one process per GPU (`accelerate launch --multi_gpu`, or `accelerate config` anew)"
            )
    if config.machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
        torch.use_deterministic_algorithms(True)
        # Nothing here reads what nobody wrote.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.machine.deterministic  # all batches have one shape
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.machine.allow_tf32
    config.saving.output_dir.mkdir(parents=True, exist_ok=True)
    folders = ProjectConfiguration(
        str(config.saving.output_dir), logging_dir=str(config.saving.output_dir / config.watching.logging_dir)
    )
    tracker = None if config.watching.report_to == "none" else config.watching.report_to
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    cuda = torch.cuda.is_available() and not on_cpu
    precision = choose_precision(config, cuda=cuda)
    if precision.name == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise SettingsError("--mixed_precision fp16 trains on a GPU, and PyTorch finds none: take bf16 or no")
    if cuda and precision.name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise SettingsError("--mixed_precision bf16: this GPU computes in no such format, take fp16")
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision.copies else precision.name,
            log_with=tracker,
            project_config=folders,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PATIENCE),  # while one process downloads, checks, draws or writes
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
            ],
        )
    except ValueError as error:
        raise SettingsError(
            f"{error} (--mixed_precision {config.machine.mixed_precision}, --report_to {tracker})"
        ) from None
    return accelerator, precision


def advise(accelerator: Accelerator, precision: Precision) -> Iterator[str]:
    """What a user should know of the machine before the run begins, a line each."""
    if accelerator.device.type == "cuda" and precision.name == "no":
        yield (
            "training in float32: --mixed_precision bf16 (A100 and later) or fp16 is several times as fast on a GPU, "
            "and takes half the memory for activations"
        )
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
        yield (
            f"Ctrl-C or SIGTERM leave {seconds} s for a last checkpoint, then the launcher kills all processes: if the "
            "disk needs longer, set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 for the launcher"
        )
