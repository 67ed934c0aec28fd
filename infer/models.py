"""Loads InstructPix2Pix pipelines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from ..encode.base.errors import EditError, explained, reason
from ..encode.models.checkpoint import Checkpoint, find_device
from ..encode.models.hub import fetch_pipeline
from ..encode.models.parts import read_index
from ..encode.models.weights import load_whole
from .kind import BASES, SD, SDXL, as_edit_error, check_model
from .lora import fuse, read_base

FORCE_ZEROS = "force_zeros_for_empty_prompt"


def load(
    name: str,
    device: Any,
    dtype: str | torch.dtype | None,
    variant: str | None,
    revision: str | None,
    lora: Sequence[str] = (),
    lora_weights: Sequence[float] = (),
    cache_dir: Path | None = None,
) -> DiffusionPipeline:
    """Load the pipeline in a folder or on the Hub; the arguments are those of `Editor`.

    Raises:
        EditError: there is none, or it is damaged or of another kind, or the device is not there; or adapters of `lora`
            do not fit it.
    """
    check_model(name, revision, lora, cache_dir)
    base = read_base(lora) if lora else None
    unloadable = f"the model {name} cannot be loaded"
    with explained(EditError, unloadable):
        device = find_device(device)
        wanted = dtype or ("float16" if device.type == "cuda" else "float32")
        precision = wanted if isinstance(wanted, torch.dtype) else getattr(torch, wanted)
    with as_edit_error():
        local = Path(name).is_dir()
        place = Path(name) if local else fetch_pipeline(name, revision, variant, cache_dir, flag="--model")
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
