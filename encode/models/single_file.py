"""Turns a checkpoint in one .safetensors file into a folder in diffusers' layout, once."""

import contextlib
import hashlib
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from ..base.console import say
from ..base.errors import ModelError, explained

PARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")


def converted(file: Path, config: str | None, cache_dir: Path | None, part: Literal["vae"] | None = None) -> Path:
    """The folder that a single file was turned into, by its content; made if it is not there yet.

    The file holds weights alone. Shapes, noise schedule and tokenizer come from `config`, or from the Hub repository
    that diffusers takes for the origin of such weights.

    Args:
        file: a Stable Diffusion 1.x, 2.x or SDXL checkpoint in its original layout, or a VAE in any layout.
        config: a folder in diffusers' layout, which need not hold weights, or a Hub id.
        part: what alone the file holds; `config` is the folder of such a part.
        cache_dir: where the folder is made. Default: beside the Hub's own cache.

    Raises:
        ModelError: not such a checkpoint, or nothing describes it, or the folder cannot be written.
    """
    folder = Path(cache_dir or constants.HF_HOME) / "ip2p-single-file" / _identity(file, config)
    if not folder.is_dir():
        say(f"converting {file} to diffusers' layout in {folder}")
        hint = " (--single_file_config names a folder in diffusers' layout, or a Hub id, that describes it)"
        what = f"the {part} of a Stable Diffusion" if part else "a Stable Diffusion checkpoint"
        with explained(ModelError, f"{file} cannot be read as {what}", hint="" if part else hint):
            found = _load_vae(file, config) if part else _load(file, config, cache_dir)
        hint = " (--cache_dir names another place)"
        with explained(ModelError, f"{folder} cannot be written", OSError, SafetensorError, hint=hint):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                found.save_pretrained(made := Path(temporary, "model"))
                with contextlib.suppress(OSError):  # another process was faster
                    made.rename(folder)
    return folder


def _identity(file: Path, config: str | None) -> str:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))  # type: ignore[arg-type]
    if config:
        small = sorted(path for path in Path(config).rglob("*") if path.suffix in (".json", ".txt"))
        digest.update(b"".join(path.read_bytes() for path in small) or config.encode())
    return digest.hexdigest()


def _load_vae(file: Path, config: str | None) -> Any:
    from diffusers import AutoencoderKL

    with safe_open(file, framework="pt") as opened:
        dtype = _widest({opened.get_slice(name).get_dtype() for name in opened.keys()})  # noqa: SIM118
    return AutoencoderKL.from_single_file(str(file), config=config, torch_dtype=dtype)


def _widest(kinds: set[str]) -> torch.dtype:
    return torch.float16 if kinds == {"F16"} else torch.bfloat16 if kinds == {"BF16"} else torch.float32


def _load(file: Path, config: str | None, cache_dir: Path | None) -> Any:
    """The pipeline in a file, its weights in the widest precision that they have there."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # seconds to import

    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(PARTS)]  # noqa: SIM118
        kinds = {opened.get_slice(name).get_dtype() for name in names}
    options: dict[str, Any] = {"config": config, "cache_dir": cache_dir, "torch_dtype": _widest(kinds)}
    if any(name.startswith("conditioner.") for name in names):
        return StableDiffusionXLPipeline.from_single_file(str(file), **options)
    if config is None and any(name.startswith("cond_stage_model.model.") for name in names):
        say(
            f"{file} looks like Stable Diffusion 2.x and is taken to predict v_prediction; the base models at 512 px "
            "predict epsilon: for one of them give --single_file_config"
        )
    return StableDiffusionPipeline.from_single_file(
        str(file), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options
    )
