"""What a training run starts from: devices and processes, a folder of its own, caches, the base model, the seed."""

import contextlib
import dataclasses
import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
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
from ..encode.base.errors import CacheError, CacheMismatch, SettingsError, TrainError, explained
from ..encode.base.files import check_folder
from ..encode.base.flags import dump
from ..encode.cache.format import Cache, differences
from ..encode.cache.remote import open_caches as open_all
from ..encode.cache.writer import locked
from ..encode.keeper.verify import verify
from ..encode.models.checkpoint import Checkpoint, find_checkpoint
from ..infer.lora import ADAPTERS, CONV_IN
from .agree import agreed
from .config import TrainConfig
from .save.resume import SETTINGS
from .unet.weights import Precision, choose_precision

PATIENCE = timedelta(days=1)
# What lies in an output folder.
FOLDERS = r"checkpoint-\d+(\.incomplete)?|averages|validation|unet|vae|(text_encoder|tokenizer)(_2)?|scheduler"
FILES = (".lock", SETTINGS, "metrics.jsonl", "model_index.json", "README.md", ADAPTERS, CONV_IN)
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, Precision]:
    """Set up devices, processes and trackers; raises SettingsError for flags or an engine that do not fit."""
    for engine in SHARDING:  # before accelerate looks for an engine that may not be installed
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise SettingsError(
                f"accelerate is set up for {engine}, which shards what ip2p keeps whole on each GPU: "
                "use one process per GPU (`accelerate launch --multi_gpu`, or `accelerate config` anew)"
            )
    if config.machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # which nobody reads
    torch.backends.cudnn.benchmark = not config.machine.deterministic  # batches have few shapes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.machine.allow_tf32
    folders = prepare_folders(config)
    tracker = None if config.watching.report_to == "none" else config.watching.report_to
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    cuda = torch.cuda.is_available() and not on_cpu
    precision = choose_precision(config, cuda=cuda)
    if precision.name == "fp16" and (on_cpu or not torch.accelerator.is_available()):
        raise SettingsError("--mixed_precision fp16 trains on a GPU, and PyTorch finds none: take bf16 or no")
    if cuda and precision.name == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        flag, mend = ("--weights", "leave it out") if precision.rounded else ("--mixed_precision", "take fp16")
        raise SettingsError(f"{flag} bf16: this GPU computes in no such format, {mend}")
    try:
        # accelerate would go on without one that is not installed.
        installed = {str(kind): str(kind) in map(str, get_available_trackers()) for kind in LoggerType}
        if not (installed | {"all": any(installed.values())}).get(str(tracker), True):
            raise ValueError("no such tracker is installed: `pip install` its package, or give another one or none")
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


def open_caches(config: TrainConfig, accelerator: Accelerator) -> list[Cache]:
    """Open the caches, check their files, and make sure that they were encoded alike.

    Raises CacheError, or CacheMismatch where two were encoded differently; the message says where they differ.
    """
    caches = open_all(config.samples.cache, config.samples.window_dir)
    for cache in caches:
        cache.check_files()
        names = f"in {caches[0].name}", f"in {cache.name}"
        if different := differences(caches[0].manifest, cache.manifest, ("identity", "encoding"), names):
            raise CacheMismatch(
                f"{cache.name} was encoded otherwise than {caches[0].name}, and one run cannot train on both: "
                "leave one out, or encode its dataset as the other, into another --cache\n" + "\n".join(different)
            )
        if config.samples.verify_cache and cache.name == str(cache.folder):
            check_every_byte(cache, accelerator)
    return caches


def check_every_byte(cache: Cache, accelerator: Accelerator) -> None:
    """For --verify_cache: read the whole cache and hold it against its checksums."""
    if accelerator.is_main_process and (findings := verify(cache.folder)):
        first, more = findings[0], f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CacheError(
            f"{cache.folder}/{first.path}: {first.problem}{more}: `ip2p-cache verify {cache.folder} --repair`, "
            "then ip2p-encode"
        )
    accelerator.wait_for_everyone()


def base_checkpoint(config: TrainConfig, cache: Cache, accelerator: Accelerator | None = None) -> Checkpoint:
    """Find the model; for a run make sure that the cache is of its VAE and text encoder: else CacheMismatch."""
    recorded, model, name = cache.manifest["model"], config.model, config.model.pretrained_model_name_or_path
    vae = model.pretrained_vae_model_name_or_path or recorded["vae"]
    single_file = model.single_file_config or (recorded["single_file_config"] if Path(name).is_file() else None)
    model = dataclasses.replace(model, pretrained_vae_model_name_or_path=vae, single_file_config=single_file)
    if accelerator is None:
        return find_checkpoint(model)
    with accelerator.main_process_first():
        checkpoint = find_checkpoint(model)
    identity, names = {"identity": checkpoint.identity()}, ("in the cache", f"in {name}")
    if different := differences(cache.manifest, identity, ["identity"], names):
        raise CacheMismatch(
            f"{cache.name} was not encoded with {name}: train the model that it was made with ({recorded['name']}), "
            "or run ip2p-encode with this one into another --cache\n" + "\n".join(different)
        )
    return checkpoint


def agreed_seed(config: TrainConfig) -> int:
    """The seed of the flags, or a drawn one that all processes agree on."""
    return agreed(lambda: secrets.randbits(32) if config.steps.seed is None else config.steps.seed)


def save_config(config: TrainConfig, seed: int, recorded: Path | None = None) -> None:
    """Keep the configuration that the results are of beside them, where `--config` can read it; TrainError: it cannot.

    Args:
        recorded: the file of the run that trained them, where this one trains nothing.
    """
    file, text = config.saving.output_dir / SETTINGS, yaml.safe_dump(dump(config) | {"seed": seed}, sort_keys=False)
    with explained(TrainError, f"{file} cannot be written", OSError):
        if recorded and recorded.is_file():
            of_run = yaml.safe_load(recorded.read_text(encoding="utf-8"))  # but for what says what is made of it
            text = yaml.safe_dump(of_run | {"ema_length": config.optimizer.ema_length}, sort_keys=False)
        file.write_text(text, encoding="utf-8")


def track(config: TrainConfig, seed: int, step: int, accelerator: Accelerator) -> None:
    """Let the trackers go on from a step. What tensorboard holds beyond it is of a branch that was left; the others
    begin a run of their own each time, with the steps that it takes."""
    settings = {name: str(value) for name, value in (dump(config) | {"seed": seed}).items()}
    options = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers("ip2p", settings, options)


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
