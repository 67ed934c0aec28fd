"""Loads InstructPix2Pix pipelines, and tells what is none."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from ..encode.base.errors import EditError, reason

# torch and diffusers are imported where work begins: they take seconds, and `--help` must not wait for them.
if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

SD, SDXL = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"


def load(
    name: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    variant: str | None,
    revision: str | None,
) -> DiffusionPipeline:
    """Load the pipeline in a folder or on the Hub; the arguments are those of `Editor`.

    Raises:
        EditError: there is none, or it is damaged or of another kind, or the device is not there.
    """
    check_model(name, revision)

    import torch
    from diffusers import DiffusionPipeline

    with _readable(name):
        device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if dtype is None:
            dtype = torch.float16 if device.type == "cuda" else torch.float32
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        options = {"dtype": dtype, "variant": variant, "revision": revision}
        return DiffusionPipeline.from_pretrained(name, **options).to(device)


def check_model(name: str, revision: str | None) -> None:
    """Refuse what is no InstructPix2Pix pipeline by two small files, before gigabytes of weights are read."""
    if not is_place(name):
        raise EditError(f"{name} is no model: expected a folder as ip2p-train saves it, or a Hub id")

    from diffusers import DiffusionPipeline, UNet2DConditionModel

    with _readable(name):
        index = cast("dict[str, Any]", DiffusionPipeline.load_config(name, revision=revision))
        unet: dict[str, Any] = {}
        if "unet" in index:
            of_unet = {"subfolder": "unet", "revision": revision}
            unet = cast("dict[str, Any]", UNet2DConditionModel.load_config(name, **of_unet))
        check_kind(name, index.get("_class_name"), unet.get("in_channels"))


def is_place(name: str) -> bool:
    """Whether a model can be at `name`: a folder, or what looks like a Hub id."""
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not os.path.exists(name)
    return bool(hub_id) or os.path.isdir(name)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except EditError:
        raise
    except Exception as error:  # whatever a damaged or foreign folder leads the libraries to
        raise EditError(f"the model {name} cannot be loaded: {reason(error)}") from error


def check_kind(name: str, kind: str | None, channels: int | None) -> None:
    """Refuse what is no InstructPix2Pix pipeline, by its class's name and its UNet's input channels."""
    if channels is not None and channels != 8:
        raise EditError(
            f"{name} is not an InstructPix2Pix model: conv_in takes {channels} channels, 8 expected; "
            "train one with ip2p-train"
        )
    if kind not in (SD, SDXL):
        raise EditError(f"{name} holds a {kind}, expected {SD} or {SDXL}; train one with ip2p-train")


def scheduler_like(current: Any, name: str) -> Any:
    """The scheduler called `name`, with the configuration of the `current` one."""
    known = {kind.__name__.removesuffix("Scheduler"): kind for kind in current.compatibles}
    wanted = name.lower().removesuffix("scheduler")
    for label, kind in known.items():
        if label.lower() == wanted:
            try:
                return kind.from_config(current.config)
            except ImportError as error:  # some schedulers need a package that is not installed
                raise EditError(f"scheduler {label}: {reason(error)}") from error
    raise EditError(f"no scheduler {name}: expected one of {', '.join(sorted(known))}")
