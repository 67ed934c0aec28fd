"""What a training run starts from: a dataset that is to be encoded first, caches, the base model, the seed."""

import contextlib
import dataclasses
import secrets
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import release_memory

from ..encode.base.console import is_main_process, say
from ..encode.base.errors import CacheError, CacheMismatch, TrainError, explained
from ..encode.base.files import whole
from ..encode.base.flags import changed, dump
from ..encode.cache.format import Cache, differences
from ..encode.cache.remote import open_caches as open_all
from ..encode.config import EncodeConfig
from ..encode.data.places import check_place
from ..encode.keeper.verify import verify
from ..encode.models.checkpoint import Checkpoint, find_checkpoint
from ..encode.models.hub import check_name
from ..encode.run import encode
from .agree import agreed
from .config import TrainConfig
from .machine import check_machine
from .save.resume import SETTINGS, find
from .unet.load import check_xformers


def encode_first(encoding: EncodeConfig, config: TrainConfig) -> TrainConfig:
    """Encode what the cache of a run lacks, and let go of all that it took.

    What the run would refuse of flags, places and machine is refused before that. Returned is the run as it was asked
    for, which goes on from its newest checkpoint where the same command was here before.

    Raises:
        Ip2pError: anything the user can mend.
    """
    check_place(encoding.dataset, config.saving.output_dir, "--output_dir")
    if not config.machine.estimate:
        if config.saving.resume_from_checkpoint is None and was_here(config):
            config = changed(config, resume_from_checkpoint="auto")
        if is_main_process():
            if newest := find(config.saving.output_dir, config.saving.resume_from_checkpoint):
                say(f"the training will go on from {newest}")
            if config.machine.enable_xformers_memory_efficient_attention:
                check_xformers()  # by one process alone: none has been told its GPU yet
        check_machine(config)
    say(f"the cache of this dataset is {encoding.cache}")
    encode(encoding, last=False)
    release_memory()  # of the encoders nothing is left when the UNet comes
    return config


def was_here(config: TrainConfig) -> bool:
    """Whether the run in the output folder was started by the same command."""
    recorded: object = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        recorded = yaml.safe_load((config.saving.output_dir / SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(recorded, dict):
        return False
    free = {"resume_from_checkpoint": None} | ({"seed": None} if config.steps.seed is None else {})
    return recorded | free == dump(config) | free


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


def with_model(config: TrainConfig, cache: Cache) -> TrainConfig:
    """The flags of a run with the model that its cache records, where they name none; a ModelError if that is gone."""
    if config.model.pretrained_model_name_or_path:
        return config
    recorded, flag = cache.manifest["model"], "--pretrained_model_name_or_path"
    name = recorded["name"]
    check_name(name, f"{cache.name} was encoded with {name}, and ", f"name the model with {flag}")
    say(f"the model is that of the cache: {name}")
    revision, variant = (getattr(config.model, key) or recorded[key] for key in ("revision", "variant"))
    return changed(config, pretrained_model_name_or_path=name, revision=revision, variant=variant)


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
        with whole(file) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def track(config: TrainConfig, seed: int, step: int, accelerator: Accelerator) -> None:
    """Let the trackers go on from a step. What tensorboard holds beyond it is of a branch that was left; the others
    begin a run of their own each time, with the steps that it takes."""
    settings = {name: str(value) for name, value in (dump(config) | {"seed": seed}).items()}
    options = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers("ip2p", settings, options)
