"""Loads InstructPix2Pix pipelines, and tells what is none."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import hf_hub_download

from ..encode.base.errors import EditError, ModelError, explained, reason
from ..encode.models.checkpoint import Checkpoint, find_device, read_index
from ..encode.models.hub import fetch_pipeline, fetching, is_place
from ..encode.models.parts import read_config
from ..encode.models.weights import load_whole
from .lora import fuse, read_base

RUN_CHECKPOINT = r"(?:abandoned-)?checkpoint-(\d+)(?:-\d+)?"
SD, SDXL = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"
BASES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
FORCE_ZEROS = "force_zeros_for_empty_prompt"


def load(
    name: str,
    device: Any,
    dtype: str | torch.dtype | None,
    variant: str | None,
    revision: str | None,
    lora: Sequence[str] = (),
    lora_weights: Sequence[float] = (),
) -> DiffusionPipeline:
    """Load the pipeline in a folder or on the Hub; the arguments are those of `Editor`.

    Raises:
        EditError: there is none, or it is damaged or of another kind, or the device is not there; or adapters of `lora`
            do not fit it.
    """
    check_model(name, revision, lora)
    base = read_base(lora) if lora else None
    unloadable = f"the model {name} cannot be loaded"
    with explained(EditError, unloadable):
        device = find_device(device)
        wanted = dtype or ("float16" if device.type == "cuda" else "float32")
        precision = wanted if isinstance(wanted, torch.dtype) else getattr(torch, wanted)
    with _as_edit_error():
        local = Path(name).is_dir()
        place = Path(name) if local else fetch_pipeline(name, revision, variant, flag="--model")
        checkpoint = Checkpoint(place, variant)
        folder, index = checkpoint.folder, read_index(checkpoint.folder)
        plain = index["_class_name"] in BASES  # by adapters, it becomes an InstructPix2Pix pipeline
        if checkpoint.is_sdxl and not plain and FORCE_ZEROS not in index:  # guidance takes another encoding of no text
            raise EditError(f"{folder}/model_index.json describes a {SDXL} without {FORCE_ZEROS}: save the model again")
        parts = {part: checkpoint.network(part, precision) for part in ("vae", *checkpoint.text_encoders)}
        parts["unet"] = checkpoint.network("unet", torch.float32 if base else precision)
        vae = parts["vae"].config
        if vae["shift_factor"] or (vae["latents_mean"] and not checkpoint.is_sdxl):
            raise EditError(f"{checkpoint.vae_folder}/config.json shifts latents, which its pipeline does not undo")
        parts |= {part: checkpoint.tokenizer(part) for part in checkpoint.tokenizers}
        parts["scheduler"] = checkpoint.scheduler(**base.scheduler if base else {})
        if base:
            base.prepare(parts["unet"])
            fuse(parts["unet"], lora, lora_weights or [1.0] * len(lora))  # in float32, as training does
            torch.nn.Module.to(parts["unet"], precision)  # diffusers' own `to` warns of layers that it has none of
        if index.get("safety_checker", [None])[-1]:
            parts["safety_checker"] = load_whole(
                StableDiffusionSafetyChecker, folder / "safety_checker", variant, precision
            )
    kind: Any = DiffusionPipeline
    if plain:
        kind = getattr(diffusers, SDXL if checkpoint.is_sdxl else SD)
        parts |= {FORCE_ZEROS: False} if checkpoint.is_sdxl else {}  # as in training
    with explained(EditError, unloadable):
        return kind.from_pretrained(folder, dtype=precision, variant=variant, **parts).to(device)


def check_model(name: str, revision: str | None, lora: Sequence[str] = ()) -> None:
    """Refuse what is no InstructPix2Pix pipeline by two small files, before gigabytes of weights are read.

    With adapters, which make one of it, it may be a plain Stable Diffusion as well; they must be there.
    """
    if not is_place(name):
        raise EditError(f"{name} is no model: expected a folder as ip2p-train saves it, or a Hub id")
    if how := of_unfinished(Path(name).resolve()):
        raise EditError(f"{name} is no pipeline: {how}")
    with _as_edit_error():
        index = read_index(_file(name, "model_index.json", revision).parent)
        unet: dict[str, Any] = {}
        if "unet" in index:
            unet = read_config(_file(name, "unet/config.json", revision).parent, "unet")
    for folder in lora:
        if how := of_unfinished(Path(folder).resolve()):
            raise EditError(f"--lora {folder} holds no adapters yet: {how}, and of its adapters")
    if lora:
        read_base(lora)
    if lora and index["_class_name"] in BASES and unet.get("in_channels") == 4:
        return
    if fused := next((folder for folder in lora if Path(folder).resolve() == Path(name).resolve()), None):
        raise EditError(f"--lora {fused} is in the model {name} already: give the one that it was trained from")
    check_kind(name, index["_class_name"], unet.get("in_channels"))


def _file(name: str, path: str, revision: str | None) -> Path:
    """A file of a model, in its folder or fetched from the Hub."""
    if Path(name).is_dir():
        return Path(name, path)
    with fetching(f"{name} is not a folder here", "--model"):
        return Path(hf_hub_download(name, path, revision=revision))


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
def _as_edit_error() -> Iterator[None]:
    """An `Editor` raises one kind of error."""
    try:
        yield
    except ModelError as error:
        raise EditError(str(error)) from error
