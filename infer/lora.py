"""LoRA adapters that ip2p-train saved, read from a folder and fused into the UNet of a base model."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ..encode.base.errors import EditError, Ip2pError, explained
from ..encode.models.weights import not_finite, read_weights

ADAPTERS, CONV_IN = "pytorch_lora_weights.safetensors", "conv_in.safetensors"


class Base(NamedTuple):
    """What adapters need of their base, as conv_in.safetensors holds it."""

    conv_in: dict[str, Tensor]  # weight (C, 8, 3, 3) and bias (C,) before training, float32
    unet: dict[str, Any]  # what training changed in the configuration of the UNet: the size of its pictures
    scheduler: dict[str, Any]  # and of the scheduler

    def prepare(self, unet: Any) -> None:
        """Let a UNet take the size that was trained, and one of 4 input channels the image condition, in place.

        Raises EditError: the adapters are for another one.
        """
        narrow, (channels, wide) = unet.conv_in, self.conv_in["weight"].shape[:2]
        if channels != narrow.out_channels:
            raise EditError(
                f"--lora: the adapters are for a UNet that begins with {channels} channels, this model's begins with "
                f"{narrow.out_channels}: give the model that they were trained from as --model"
            )
        if narrow.in_channels != wide:
            if self.conv_in["weight"][:, narrow.in_channels :].any():
                raise EditError("--lora: the adapters are for an InstructPix2Pix model: give it as --model")
            unet.conv_in = torch.nn.Conv2d(wide, channels, narrow.kernel_size, narrow.stride, narrow.padding)
            unet.conv_in.load_state_dict(self.conv_in)
        unet.register_to_config(in_channels=wide, **self.unet)


def need_peft(kind: type[Ip2pError], flag: str) -> None:
    """Raise an error of a `kind` where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise kind(f"{flag} needs peft: pip install peft")


def read_base(folders: Sequence[str]) -> Base:
    """What conv_in.safetensors in these folders says.

    Raises EditError: there is no peft, a file is missing or cannot be read, or they are not of one base.
    """
    need_peft(EditError, "--lora")
    found = list[Base]()
    for folder in folders:
        for file in (Path(folder, ADAPTERS), Path(folder, CONV_IN)):
            if not file.is_file():
                expected = "expected a folder that ip2p-train saved with --lora_rank"
                raise EditError(f"--lora {folder} holds no {file.name}: {expected}")
        with explained(EditError, f"--lora: {file} cannot be read"):
            with safe_open(file, framework="pt") as opened:
                said = opened.metadata() or {}
            conv, changed = read_weights(file), (json.loads(said.get(part, "{}")) for part in ("unet", "scheduler"))
            found.append(Base({name: conv[name] for name in ("weight", "bias")}, *changed))
        if any(not torch.equal(found[0].conv_in[name], found[-1].conv_in[name]) for name in ("weight", "bias")):
            raise EditError(
                f"--lora {folders[0]} {folder}: these were not trained from the same model, take one of them"
            )
    return found[0]


def fuse(unet: Any, folders: Sequence[str], weights: Sequence[float]) -> None:
    """Add adapters to the weights of a UNet in float32, in place, each times its weight.

    Raises EditError: a file does not fit the UNet in all that it holds.
    """
    from peft import get_peft_model_state_dict

    for folder, weight in zip(folders, weights, strict=True):
        file = Path(folder, ADAPTERS)
        misfit = f"--lora {folder} does not fit the UNet of --model, give the one that it was trained from"
        with explained(EditError, misfit):
            state = read_weights(file)
            unet.load_lora_adapter(folder, prefix="unet", weight_name=file.name, adapter_name="default")
            taken = {f"unet.{name}" for name in get_peft_model_state_dict(unet)}
        if left := state.keys() ^ taken:
            raise EditError(f"{misfit}: {min(left)} is in one of them alone")
        if bad := not_finite(state):
            raise EditError(f"{file} holds numbers that are not finite, in {bad}: save the adapters again")
        unet.fuse_lora(weight)
        unet.unload_lora()
