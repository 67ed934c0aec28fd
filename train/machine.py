"""What a training run asks of the machine: processes, a tracker, a folder of its own that can be written."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    parse_flag_from_env,
)

from ..encode.base.console import say
from ..encode.base.errors import SettingsError, TrainError
from ..encode.base.files import check_folder
from ..encode.cache.writer import locked
from ..infer.lora import ADAPTERS, CONV_IN
from .config import TrainConfig
from .save.resume import SETTINGS
from .unet.weights import Precision, choose_precision

PATIENCE = timedelta(days=1)
# What lies in an output folder.
FOLDERS = r"checkpoint-\d+(\.incomplete)?|averages|best|validation|unet|vae|(text_encoder|tokenizer)(_2)?|scheduler"
FILES = (".lock", SETTINGS, "metrics.jsonl", "model_index.json", "README.md", ADAPTERS, CONV_IN)
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def check_machine(config: TrainConfig) -> tuple[ProjectConfiguration, Precision]:
    """The folders of a run and the precision of its UNet, before anything is loaded.

    Raises SettingsError: flags, an engine or a tracker that this machine cannot serve, a place that cannot be written.
    """
    for engine in SHARDING:  # before accelerate looks for an engine that may not be installed
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SettingsError(
                f"accelerate is set up for {engine}, which shards what ip2p keeps whole on each GPU: "
                "use one process per GPU (`accelerate launch --multi_gpu`, or `accelerate config` anew)"
            )
    if config.machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
    folders = prepare_folders(config)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    cuda = torch.cuda.is_available() and not on_cpu
    precision = choose_precision(config, cuda=cuda)
    if precision.name == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise SettingsError("--mixed_precision fp16 trains on a GPU, and PyTorch finds none: take bf16 or no")
    if cuda and precision.name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        flag, mend = ("--weights", "leave it out") if precision.rounded else ("--mixed_precision", "take fp16")
        raise SettingsError(f"{flag} bf16: this GPU computes in no such format, {mend}")
    if torch.backends.mps.is_available() and not on_cpu and precision.name != "no":  # as diffusers' scripts do there
        flag, mend = ("--weights", "leave it out") if precision.rounded else ("--mixed_precision", "take no")
        raise SettingsError(f"{flag} {precision.name}: on Apple's GPU training computes in float32, {mend}")
    # accelerate would go on without one that is not installed.
    installed = {str(kind): str(kind) in map(str, get_available_trackers()) for kind in LoggerType}
    installed |= {"all": any(installed.values()), "none": True}
    if not installed.get(tracker := config.watching.report_to):
        mend = "`pip install` its package, or give another one or none"
        raise SettingsError(f"--report_to {tracker}: no such tracker is installed, {mend}")
    return folders, precision


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, Precision]:
    """Set up devices, processes and trackers; raises SettingsError as `check_machine` does."""
    folders, precision = check_machine(config)
    if config.machine.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # which nobody reads
    torch.backends.cudnn.benchmark = not config.machine.deterministic  # batches have few shapes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.machine.allow_tf32
    tracker = None if config.watching.report_to == "none" else config.watching.report_to
    AcceleratorState._reset_state()  # else a second run of this process would have to be like the first
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision.half else precision.name,
            log_with=tracker,
            project_config=folders,
            kwargs_handlers=[
                AutocastKwargs(cache_enabled=False),  # else a cast copy of every weight stays until the step is over
                InitProcessGroupKwargs(timeout=PATIENCE),  # while one process downloads, checks, draws or writes
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
            ],
        )
    except ValueError as error:
        raise SettingsError(f"{error} (--mixed_precision {precision.name}, --report_to {tracker})") from None
    return accelerator, precision


def prepare_folders(config: TrainConfig) -> ProjectConfiguration:
    """Make the output folder and that of the tracker; raises SettingsError where results could not be written there."""
    output_dir = config.saving.output_dir
    logs = output_dir / config.watching.logging_dir
    places = {"output_dir": output_dir} | ({"logging_dir": logs} if config.watching.report_to != "none" else {})
    for flag, folder in places.items():
        check_folder(folder, f"--{flag}")
        folder.mkdir(parents=True, exist_ok=True)
    for path in output_dir.iterdir():
        wrong = "a folder where a file goes" if path.name in FILES and path.is_dir() else ""
        wrong = "a file where a folder goes" if re.fullmatch(FOLDERS, path.name) and not path.is_dir() else wrong
        if wrong:
            raise SettingsError(f"{path} is {wrong}: move it away, or name another --output_dir")
    return ProjectConfiguration(str(output_dir), logging_dir=str(logs))


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


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Keep an output folder to this run; raises TrainError with the process that trains into it already."""
    held = contextlib.ExitStack()
    try:
        lock = held.enter_context(locked(output_dir))
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except BlockingIOError:
        who = (output_dir / ".lock").read_text(encoding="utf-8")
        used = f"--output_dir {output_dir} is in use by another ip2p-train ({who})"
        raise TrainError(f"{used}: wait for it, stop it, or name another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise TrainError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from None
        say(f"{output_dir} lies on a disk without locks: nothing keeps another run out of it")
    with held:
        yield
