"""Tells what is an InstructPix2Pix pipeline by its small files: soon enough to answer before torch is imported."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..encode.base.errors import EditError, ModelError
from ..encode.models.hub import fetching, is_place
from ..encode.models.parts import read_config, read_index

RUN_CHECKPOINT = r"(?:abandoned-)?checkpoint-(\d+)(?:-\d+)?"
SD, SDXL = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"
BASES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def check_local(models: Iterable[str], lora: Sequence[str] = ()) -> None:
    """`check_model` for those of these models that are on this machine, or nowhere: no request, and seldom torch."""
    for name in models:
        if os.path.isdir(name) or not is_place(name):
            check_model(name, None, lora)


def check_model(name: str, revision: str | None, lora: Sequence[str] = (), cache_dir: Path | None = None) -> None:
    """Refuse what is no InstructPix2Pix pipeline by two small files, before gigabytes of weights are read.

    With adapters, which make one of it, it may be a plain Stable Diffusion as well; they must be there.
    """
    if not is_place(name):
        raise EditError(f"{name} is no model: expected a folder as ip2p-train saves it, or a Hub id")
    if how := of_unfinished(Path(name).resolve()):
        raise EditError(f"{name} is no pipeline: {how}")
    with as_edit_error():
        index = read_index(_file(name, "model_index.json", revision, cache_dir).parent)
        unet: dict[str, Any] = {}
        if "unet" in index:
            unet = read_config(_file(name, "unet/config.json", revision, cache_dir).parent, "unet")
    for folder in lora:
        if how := of_unfinished(Path(folder).resolve()):
            raise EditError(f"--lora {folder} holds no adapters yet: {how}, and of its adapters")
    if lora:
        from .lora import read_base  # torch takes seconds to import

        read_base(lora)
    if lora and index["_class_name"] in BASES and unet.get("in_channels") == 4:
        return
    if fused := next((folder for folder in lora if Path(folder).resolve() == Path(name).resolve()), None):
        raise EditError(f"--lora {fused} is in the model {name} already: give the one that it was trained from")
    check_kind(name, index["_class_name"], unet.get("in_channels"))


def _file(name: str, path: str, revision: str | None, cache_dir: Path | None) -> Path:
    """A file of a model, in its folder or fetched from the Hub."""
    if Path(name).is_dir():
        return Path(name, path)
    from huggingface_hub import hf_hub_download

    with fetching(f"{name} is not a folder here", "--model"):
        return Path(hf_hub_download(name, path, revision=revision, cache_dir=cache_dir))


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


@contextlib.contextmanager
def as_edit_error() -> Iterator[None]:
    """An `Editor` raises one kind of error."""
    try:
        yield
    except ModelError as error:
        raise EditError(str(error)) from error
