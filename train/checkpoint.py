"""Checkpoints of a run, and the pipeline that it ends with."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open

from ..encode.cache import sync
from ..encode.checkpoint import Checkpoint, weight_files
from ..encode.errors import CacheMismatch, SettingsError, TrainError

INCOMPLETE = ".incomplete"


class Progress:
    """How far a run has come; saved in every checkpoint."""

    def __init__(self, cache: dict[str, Any], seed: int):
        self.step = 0  # optimizer steps
        self.samples = 0  # samples seen by all processes: the position in the endless sequence
        self.seed = seed
        self.cache = cache  # identity of the cache that the run trains on

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            CacheMismatch: the checkpoint was trained on another cache.
        """
        if state["cache"] != self.cache:
            lines = [
                f"  {name}: {state['cache'].get(name)} in the checkpoint, {self.cache.get(name)} in --cache"
                for name in self.cache | state["cache"]
                if state["cache"].get(name) != self.cache.get(name)
            ]
            raise CacheMismatch("the checkpoint was trained on another cache: give that one\n" + "\n".join(lines))
        vars(self).update(state)


def save(accelerator: Accelerator, output_dir: Path, step: int, limit: int | None) -> None:
    """Save a checkpoint under a temporary name, rename it once it is on the disk, drop the oldest beyond `limit`.

    Raises:
        TrainError: it cannot be written; the checkpoints that are there stay.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = final.with_name(final.name + INCOMPLETE)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk becomes in the libraries below
        shutil.rmtree(temporary, ignore_errors=True)
        last = f"{there[-1][1].name} is the last" if (there := checkpoints(output_dir)) else "there is none yet"
        raise TrainError(
            f"checkpoint-{step} cannot be written ({str(error).splitlines()[0]}): make space in {output_dir} and "
            f"continue with --resume_from_checkpoint latest; {last}"
        ) from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync(output_dir)
        for _, old in checkpoints(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first, as (step, folder)."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), output_dir / match[0]) for match in found if match)


def find(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: by path or name, the newest for `latest` and `auto`, or None to start anew.

    Raises:
        SettingsError: there is no such checkpoint; or there are some, and nobody said what shall become of them.
    """
    there = checkpoints(output_dir)
    if wanted in ("latest", "auto"):
        if there:
            return there[-1][1]
        if wanted == "auto":
            return None
        raise SettingsError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint")
    if wanted:
        for path in (Path(wanted), output_dir / wanted):
            if path.is_dir() and not path.name.endswith(INCOMPLETE):
                return path
        names = ", ".join(path.name for _, path in there) or "none"
        raise SettingsError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {output_dir} holds {names}")
    if there:
        raise SettingsError(
            f"{output_dir} holds {there[-1][1].name} already: continue with --resume_from_checkpoint latest, "
            "or name another --output_dir"
        )
    return None


def resume(accelerator: Accelerator, folder: Path) -> None:
    """Load a checkpoint.

    Raises:
        SettingsError: the folder is not a checkpoint of such a run.
        CacheMismatch: it was trained on another cache.
    """
    try:
        accelerator.load_state(str(folder))
    except (OSError, RuntimeError, KeyError) as error:
        raise SettingsError(f"{folder} cannot be resumed from: {str(error).strip().splitlines()[0]}") from None


def export(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, checkpoint: Checkpoint, resolution: int, output_dir: Path
) -> None:
    """Save the finished pipeline, its frozen parts in the precision in which they were found."""
    unet.register_to_config(sample_size=resolution // checkpoint.vae_scale_factor)
    make_pipeline(unet, scheduler, checkpoint, dtypes(checkpoint)).save_pretrained(output_dir)


def make_pipeline(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    checkpoint: Checkpoint,
    dtype: torch.dtype | dict[str, torch.dtype],
) -> Any:
    """The pipeline that a UNet in training belongs to, with the base model's frozen parts."""
    options: dict[str, Any] = {"unet": unet, "variant": checkpoint.variant, "dtype": dtype}
    if (folder := checkpoint.vae_folder) != checkpoint.folder / "vae":  # the cache was encoded with another VAE
        of_vae = dtype["vae"] if isinstance(dtype, dict) else dtype
        options["vae"] = AutoencoderKL.from_pretrained(folder, variant=checkpoint.variant_in(folder), dtype=of_vae)
    if checkpoint.is_sdxl:
        pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(checkpoint.folder, **options)
        # Training drops text to the encoding of "", so that is what guidance must use, not zeros.
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    else:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            checkpoint.folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options
        )
    if scheduler.config["rescale_betas_zero_snr"]:  # inference must end where training did
        changed = {name: scheduler.config[name] for name in ("rescale_betas_zero_snr", "timestep_spacing")}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    return pipeline


def dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The precision of each frozen part's weight files."""
    parts = {name: checkpoint.folder / name for name in checkpoint.text_encoders} | {"vae": checkpoint.vae_folder}
    found = {"default": torch.float32, "vae": torch.float32}
    for name, folder in parts.items():
        file = weight_files(folder, checkpoint.variant)[0]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                found[name] = opened.get_tensor(next(iter(opened.keys()))).dtype
    return found
