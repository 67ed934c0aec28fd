"""What a training run is made of: caches, base model, noise schedule, seed."""

import contextlib
import dataclasses
import errno
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
)
from diffusers import DDPMScheduler

from ..encode.base.errors import CacheError, CacheMismatch, ModelError, SettingsError, TrainError
from ..encode.cache.format import Cache, differences
from ..encode.cache.writer import locked
from ..encode.keeper.verify import verify
from ..encode.models.checkpoint import Checkpoint, Model, find_checkpoint
from .config import TrainConfig
from .save.checkpoint import find


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Keep an output folder to this run.

    Raises:
        TrainError: another run trains into it; the message says which process.
    """
    held = contextlib.ExitStack()
    try:
        lock = held.enter_context(locked(output_dir))
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except BlockingIOError:
        who = (output_dir / ".lock").read_text(encoding="utf-8")
        raise TrainError(
            f"--output_dir {output_dir} is in use by another ip2p-train ({who}): wait for it, stop it, or name another "
            "folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        print(f"{output_dir} lies on a disk without locks: nothing keeps another run out of it")
    with held:
        yield


def open_caches(config: TrainConfig, accelerator: Accelerator) -> list[Cache]:
    """Open the caches, check their files, and make sure that they were encoded alike.

    Raises:
        CacheError: one is missing or damaged.
        CacheMismatch: two of them were encoded differently; the message says where they differ.
    """
    caches = [Cache.open(folder) for folder in config.cache]
    for cache in caches:
        cache.check_files()
        names = f"in {caches[0].folder}", f"in {cache.folder}"
        if different := differences(caches[0].manifest, cache.manifest, ("identity", "encoding"), names):
            raise CacheMismatch(
                f"{cache.folder} was encoded otherwise than {caches[0].folder}, and one run cannot train on both: "
                "leave one out, or run ip2p-encode for its dataset as for the other, into another --cache\n"
                + "\n".join(different)
            )
        if config.verify_cache:
            check_every_byte(cache, accelerator)
    return caches


def base_checkpoint(config: TrainConfig, cache: Cache, accelerator: Accelerator) -> Checkpoint:
    """Find the model, and make sure that the cache was encoded with its VAE and text encoder.

    Raises:
        CacheMismatch: it was not; the message says where they differ.
    """
    recorded, model = cache.manifest["model"], Model.of(config)
    model = dataclasses.replace(
        model,
        pretrained_vae_model_name_or_path=model.pretrained_vae_model_name_or_path or recorded["vae"],
        single_file_config=model.single_file_config or recorded["single_file_config"],
    )
    with accelerator.main_process_first():
        checkpoint = find_checkpoint(model, config.cache_dir)
    names = ("in the cache", f"in {config.pretrained_model_name_or_path}")
    if different := differences(cache.manifest, {"identity": checkpoint.identity()}, ["identity"], names):
        raise CacheMismatch(
            f"{cache.folder} was not encoded with {config.pretrained_model_name_or_path}: train the model that it was "
            f"made with ({cache.manifest['model']['name']}), or run ip2p-encode with this one into another --cache\n"
            + "\n".join(different)
        )
    return checkpoint


def check_every_byte(cache: Cache, accelerator: Accelerator) -> None:
    """For --verify_cache: read the whole cache and hold it against its checksums.

    Raises:
        CacheError: something is damaged.
    """
    if accelerator.is_main_process and (findings := verify(cache.folder)):
        first, more = findings[0], f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise CacheError(
            f"{cache.folder}/{first.path}: {first.problem}{more}: `ip2p-cache verify {cache.folder} --repair`, "
            "then ip2p-encode"
        )
    accelerator.wait_for_everyone()


def noise_scheduler(config: TrainConfig, checkpoint: Checkpoint) -> DDPMScheduler:
    """The noise schedule that the base model was trained with, down to pure noise if that is asked for.

    Raises:
        ModelError: the model predicts neither noise nor velocity.
        SettingsError: a schedule that ends in pure noise, for a model that predicts noise: there is nothing to learn
            at its end (arXiv 2305.08891, section 3.3).
    """
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if config.rescale_betas_zero_snr else {}
    scheduler: Any = DDPMScheduler.from_pretrained(checkpoint.folder, subfolder="scheduler", **options)
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"{checkpoint.folder}/scheduler predicts {kind}, expected epsilon or v_prediction")
    if config.rescale_betas_zero_snr and kind != "v_prediction":
        raise SettingsError(f"--rescale_betas_zero_snr needs a model that predicts v_prediction, this one: {kind}")
    return scheduler


def agreed_seed(config: TrainConfig) -> int:
    """The seed of the flags, or a drawn one that all processes agree on."""
    seed = [secrets.randbits(32) if config.seed is None else config.seed]
    broadcast_object_list(seed)
    return seed[0]


def agreed_checkpoint(config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, as the main process finds it: others may see a shared disk later than it.

    Raises:
        SettingsError: there is none, or nobody said what shall become of those that are there.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find(config.output_dir, config.resume_from_checkpoint)]
        except SettingsError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], SettingsError):
        raise found[0]
    return found[0]


def save_config(config: TrainConfig, seed: int, accelerator: Accelerator) -> None:
    """Keep the resolved configuration beside the results, where `--config` can read it, and tell the trackers."""
    if accelerator.is_main_process:
        settings = config.dump() | {"seed": seed}
        Path(config.output_dir, "train.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        accelerator.init_trackers("ip2p", {name: str(value) for name, value in settings.items()})
