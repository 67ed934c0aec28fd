"""Loads InstructPix2Pix pipelines, and tells what is none."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..encode.base.errors import EditError, reason
from ..encode.models.checkpoint import find_device, is_place

RUN_CHECKPOINT = r"(?:abandoned-)?checkpoint-(\d+)(?:-\d+)?"
SD, SDXL = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"


def load(
    name: str, device: Any, dtype: str | torch.dtype | None, variant: str | None, revision: str | None
) -> DiffusionPipeline:
    """Load the pipeline in a folder or on the Hub; the arguments are those of `Editor`.

    Raises:
        EditError: there is none, or it is damaged or of another kind, or the device is not there.
    """
    check_model(name, revision)
    with _readable(name):
        device = find_device(device)
        dtype = dtype or ("float16" if device.type == "cuda" else "float32")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, variant=variant, revision=revision)
        return pipeline.to(device)


def check_model(name: str, revision: str | None) -> None:
    """Refuse what is no InstructPix2Pix pipeline by two small files, before gigabytes of weights are read."""
    if not is_place(name):
        raise EditError(f"{name} is no model: expected a folder as ip2p-train saves it, or a Hub id")
    if how := of_unfinished(Path(name).resolve()):
        raise EditError(f"{name} is no pipeline: {how}")
    with _readable(name):
        index: Any = DiffusionPipeline.load_config(name, revision=revision)
        unet: Any = {}
        if "unet" in index:
            unet = UNet2DConditionModel.load_config(name, subfolder="unet", revision=revision)
    check_kind(name, index.get("_class_name"), unet.get("in_channels"))


def of_unfinished(folder: Path) -> str | None:
    """How to make a pipeline of a checkpoint of ip2p-train, or of a run that was stopped; None if this is neither."""
    if (folder / "model_index.json").exists():
        return None
    kinds = ((re.fullmatch(RUN_CHECKPOINT, path.name), path) for path in (folder, *folder.glob("checkpoint-*")))
    found = [(int(kind[1]), path) for kind, path in kinds if kind and path.is_dir()]
    if not found:
        return None
    step, checkpoint = max(found)
    return (
        f"`ip2p-train --config {checkpoint.parent}/train.yaml --resume_from_checkpoint {checkpoint} "
        f"--max_train_steps {step} --output_dir A_NEW_FOLDER` makes one of what is trained so far"
    )


def check_kind(name: str, kind: str | None, channels: int | None) -> None:
    """Refuse what is no InstructPix2Pix pipeline, by its class's name and its UNet's input channels."""
    if channels not in (None, 8):
        found = f"{name} is not an InstructPix2Pix model: conv_in takes {channels} channels, 8 expected"
        raise EditError(f"{found}; train one with ip2p-train")
    if kind not in (SD, SDXL):
        raise EditError(f"{name} holds a {kind}, expected {SD} or {SDXL}; train one with ip2p-train")


def scheduler_like(current: Any, name: str) -> Any:
    """The scheduler called `name`, with the configuration of the `current` one."""
    kinds = {kind.__name__.removesuffix("Scheduler"): kind for kind in current.compatibles}
    label = next((label for label in kinds if label.lower() == name.lower().removesuffix("scheduler")), None)
    if label is None:
        raise EditError(f"no scheduler {name}: expected one of {', '.join(sorted(kinds))}")
    try:
        return kinds[label].from_config(current.config)
    except ImportError as error:  # some schedulers need a package that is not installed
        raise EditError(f"scheduler {label}: {reason(error)}") from error


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a damaged or foreign folder leads the libraries to
        raise EditError(f"the model {name} cannot be loaded: {reason(error)}") from error
