"""The weights of a model's parts: which files hold them, what identifies them, and a network that has all of them.

The libraries give a network that lacks weights random numbers in their place; here it is refused.
"""

import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..base.errors import ModelError, explained
from .parts import check_complete, read_config, read_json, refuse_pointer

FILE = re.compile(r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.(safetensors|bin)")
IDLE = re.compile(r"(.*\.)?position_ids|text_projection\.weight|logit_scale")
"""Weights that may be there unasked: a constant, and what others read from a text encoder's output."""


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of one part as diffusers would choose them: the variant if there is one, safetensors first."""
    with explained(ModelError, f"{folder} holds no weights", OSError):
        found = [match for path in sorted(folder.iterdir()) if (match := FILE.fullmatch(path.name))]
    for infix in dict.fromkeys([variant, None]):
        for suffix in ("safetensors", "bin"):
            if chosen := [folder / match[0] for match in found if match.groups() == (infix, suffix)]:
                return chosen
    hint = f", and found them for --variant {found[0][1]} alone" if found else ""
    raise ModelError(f"{folder} holds no weights: expected *.safetensors or *.bin there{hint}")


def variant_in(folder: Path, variant: str | None) -> str | None:
    """The variant, if this part has it: another part, or another checkpoint's VAE, need not."""
    match = FILE.fullmatch(weight_files(folder, variant)[0].name)
    return match[1] if match else None


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a weight file, by name; a ModelError names the file where it is none."""
    refuse_pointer(file)
    with explained(ModelError, f"{file} cannot be read as weights", hint=": fetch the model again"):
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, "cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def dtype_of(folder: Path, variant: str | None) -> torch.dtype:
    """The precision of a part's weight files, of which no more than that is read."""
    file = weight_files(folder, variant)[0]
    if file.suffix == ".bin":  # mapped into memory
        weights = read_weights(file)
        return next(weights[name].dtype for name in weights if not IDLE.fullmatch(name))
    with explained(ModelError, f"{file} cannot be read as weights"), safe_open(file, framework="pt") as opened:
        return opened.get_tensor(next(name for name in opened.keys() if not IDLE.fullmatch(name))).dtype  # noqa: SIM118


def hash_weights(files: Iterable[Path]) -> str:
    """Hash of all parameters in the weight files of one part, changed by any single value; no model is built.

    Names do not enter it: libraries rename parameters when they save a checkpoint anew, and the numbers stay.
    """
    return hash_tensors(item for file in files for item in read_weights(file).items())


def hash_tensors(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The same of parameters by name, on the CPU."""
    digests = []
    for name, tensor in parameters:
        if name.endswith("position_ids"):  # a constant that only old checkpoints store
            continue
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()


def load_part(part: str, folder: Path, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The network of a part, such as "vae", in evaluation mode on the CPU.

    Raises:
        ModelError: a file cannot be read, or the weights are not those that the configuration describes.
    """
    import diffusers
    import transformers

    read_config(folder, part)
    check_complete(folder / "config.json")
    kinds: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL,
        "unet": diffusers.UNet2DConditionModel,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    return load_whole(kinds[part], folder, variant, dtype)


def load_whole(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    """A network of diffusers or transformers whose weights are all in its folder; raises as `load_part` does."""
    for file in folder.glob("*.json"):
        read_json(file)
    files, name = weight_files(folder, variant), f"{folder} cannot be loaded as {kind.__name__}"
    with explained(ModelError, name):
        options: dict[str, Any] = {"variant": variant_in(folder, variant), "dtype": dtype, "output_loading_info": True}
        options["use_safetensors"] = files[0].suffix == ".safetensors"
        if kind.__module__.startswith("transformers"):  # which else says no more than that it will not go on
            options["ignore_mismatched_sizes"] = True
        network, found = kind.from_pretrained(folder, **options)
    unexpected = [key for key in found["unexpected_keys"] if not IDLE.fullmatch(key)]
    if unexpected and files[0].suffix == ".bin":  # such files may hold numbers and texts, too
        unexpected = [key for key in unexpected if any(key in read_weights(file) for file in files)]
    wrong = {"no": found["missing_keys"], "unknown": unexpected, "misshapen": found["mismatched_keys"]}
    for what, keys in wrong.items():
        if keys:
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            described = f"they are not the weights of the {kind.__name__} in config.json"
            raise ModelError(f"{files[0]} holds {what} {first}{more}: {described}; fetch or save the model again")
    for file in files:  # as they lie there: those of half precision may overflow in a network that is sound
        if bad := not_finite(read_weights(file)):
            raise ModelError(f"{file} holds numbers that are not finite, in {bad}: fetch or save the model again")
    return network.eval()


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first weight that holds an infinite number, or none, if there is one."""
    floating = ((name, weight) for name, weight in weights.items() if weight.is_floating_point())
    return next((name for name, weight in floating if not weight.isfinite().all()), None)
