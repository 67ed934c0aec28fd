"""A Stable Diffusion checkpoint on the disk, found or fetched: where its parts are, and what identifies them."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..base.errors import ModelError, explained
from ..config import Model
from .hub import fetch_pipeline, fetch_vae
from .parts import check_complete, read_config, read_index
from .single_file import converted
from .tokenizer import hash_tokenizer, load_tokenizer
from .weights import hash_weights, load_part, weight_files

PARTS = {
    "SD": {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": r"\w+Scheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer(Fast)?",
    },
    "SDXL": {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer(Fast)?"},
}
"""Regular expressions of the class of each part; SDXL has those of SD, too."""
TIME_IDS = 6  # SDXL's original height and width, crop top and left, target height and width


class Checkpoint:
    """A Stable Diffusion checkpoint in diffusers' layout, on the local disk.

    Attributes:
        folder: the folder that holds model_index.json.
        vae_folder: the folder of the VAE, which may be another checkpoint's.
        vae_overflows: whether it exceeds float16 inside, as SDXL's own does; those that were mended declare it.
        is_sdxl: whether there are two text encoders and a pooled embedding.
    """

    def __init__(self, folder: Path, variant: str | None = None, vae_folder: Path | None = None):
        self.folder, self.variant = folder, variant
        self.vae_folder = vae_folder or folder / "vae"
        self.is_sdxl = _family(folder) == "SDXL"
        self.text_encoders = ["text_encoder", "text_encoder_2"] if self.is_sdxl else ["text_encoder"]
        self.tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in self.text_encoders]
        vae = read_config(self.vae_folder, "vae")
        self.latent_channels: int = vae["latent_channels"]
        self.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.scaling_factor: float = vae.get("scaling_factor", 0.18215)
        if not (isinstance(self.scaling_factor, int | float) and 0 < self.scaling_factor < math.inf):
            found = f"{self.vae_folder}/config.json has scaling_factor {self.scaling_factor!r}"
            raise ModelError(f"{found}, expected a number above 0, such as 0.18215 (SD) or 0.13025 (SDXL)")
        self.shift_factor: float | None = vae.get("shift_factor")
        self.vae_overflows: bool = self.is_sdxl and vae.get("force_upcast", True)

    def network(self, part: str, dtype: torch.dtype, folder: Path | None = None) -> Any:
        """A network: vae, text_encoder, text_encoder_2 or unet, on the CPU; perhaps from another folder.

        Raises ModelError: it is not all there, or a UNet that does not take the text of these encoders.
        """
        folder = folder or (self.vae_folder if part == "vae" else self.folder / part)
        network = load_part(part, folder, self.variant, dtype)
        if part == "unet":
            _, width, pooled = self.text_shape()
            found = network.config["cross_attention_dim"], network.config["projection_class_embeddings_input_dim"]
            times = TIME_IDS * (network.config["addition_time_embed_dim"] or 0)
            if found != (width, pooled and pooled + times):
                raise ModelError(
                    f"{folder}/config.json takes text and added conditions of {found[0]} and {found[1]} numbers, the "
                    f"text encoders give {width} and {pooled}: the parts of this model do not belong together"
                )
        return network

    def tokenizer(self, part: str) -> Any:
        """A tokenizer: tokenizer or tokenizer_2; a ModelError if it does not fit its text encoder."""
        return load_tokenizer(self.folder / part, self.text_shape()[0])

    def scheduler(self, kind: Any = None, **changes: Any) -> Any:
        """The model's own scheduler, or what another kind makes of its configuration, with some settings changed."""
        import diffusers

        check_complete(self.folder / "scheduler" / "scheduler_config.json")
        with explained(ModelError, f"{self.folder}/scheduler cannot be loaded"):
            kind = kind or getattr(diffusers, read_index(self.folder)["scheduler"][1])
            return kind.from_pretrained(self.folder, subfolder="scheduler", **changes)

    def vae_precision(self, asked: str | None, mixed: str) -> str:
        """The precision of the VAE: as asked for, or else float32 if it overflows and that of the rest if not."""
        asked = "no" if asked == "fp32" else asked  # as diffusers' script for SDXL calls it
        return asked or ("no" if self.vae_overflows else mixed)

    def prediction_type(self) -> str:
        """What the UNet predicts, epsilon or v_prediction; a ModelError for another process than theirs."""
        scheduler = read_config(folder := self.folder / "scheduler", "scheduler")
        predicted = scheduler.get("prediction_type", "epsilon")
        if re.match("EDM|FlowMatch", kind := scheduler["_class_name"]):
            raise ModelError(f"{folder}/scheduler_config.json is of {kind}, expected the noise process of DDPM")
        if predicted not in ("epsilon", "v_prediction") or scheduler.get("use_flow_sigmas"):
            raise ModelError(f"{folder}/scheduler_config.json predicts {predicted}, expected epsilon or v_prediction")
        return predicted

    def text_shape(self) -> tuple[int, int, int | None]:
        """Length and width of an encoded instruction, and the width of the pooled one (SDXL)."""
        configs = [read_config(self.folder / encoder, encoder) for encoder in self.text_encoders]
        pooled = configs[-1]["projection_dim"] if self.is_sdxl else None
        return configs[0]["max_position_embeddings"], sum(config["hidden_size"] for config in configs), pooled

    def identity(self) -> dict[str, Any]:
        """What the encoders are, whatever their names, places and file formats: hashes of weights and vocabulary."""
        identity: dict[str, Any] = {"vae": hash_weights(weight_files(self.vae_folder, self.variant))}
        identity |= {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            identity[encoder] = hash_weights(weight_files(self.folder / encoder, self.variant))
            identity[tokenizer] = hash_tokenizer(self.folder / tokenizer)
        return identity


def _family(folder: Path) -> str:
    """SD or SDXL: by model_index.json, which must name all parts of that family; else a ModelError."""
    index, file = read_index(folder), folder / "model_index.json"
    family = "SDXL" if "StableDiffusionXL" in index["_class_name"] else "SD"
    expected = PARTS["SD"] | (PARTS["SDXL"] if family == "SDXL" else dict.fromkeys(PARTS["SDXL"], "None"))
    for part, kind in expected.items():
        found = (index.get(part) or [None, None])[-1]
        if not re.fullmatch(kind, str(found)):
            raise ModelError(
                f"{file} describes a {index['_class_name']} whose {part} is {found or 'missing'}, expected {kind}: "
                "ip2p trains Stable Diffusion 1.x, 2.x and the base of SDXL"
            )
    return family


def find_checkpoint(model: Model, without: Sequence[str] = ()) -> Checkpoint:
    """Find a checkpoint on the disk, or download it from the Hub, leaving out the parts named in `without`.

    Raises:
        ModelError: neither a folder, nor a single file, nor a model that the Hub answers for; or without the variant.
    """
    name, variant = model.pretrained_model_name_or_path, model.variant
    folder = Path(name)
    is_file = folder.suffix == ".safetensors" and folder.is_file()
    if variant and is_file:
        raise ModelError(f"--variant {variant} belongs to folders and Hub ids, {name} is a single file: leave it out")
    if is_file:
        folder = converted(folder, model.single_file_config, model.cache_dir)
    elif folder.is_file():
        raise ModelError(f"{name} is a file of no known kind: of single files ip2p reads .safetensors")
    elif not folder.is_dir():
        skipped = (*without, "safety_checker", "feature_extractor", "image_encoder")
        folder = fetch_pipeline(name, model.revision, variant, model.cache_dir, skipped)
    vae = model.pretrained_vae_model_name_or_path
    found = Checkpoint(folder, variant, _find_vae(vae, folder, model) if vae else None)
    config = read_config(found.vae_folder, "vae")
    if shifts := [key for key in ("shift_factor", "latents_mean", "latents_std") if config.get(key)]:
        raise ModelError(
            f"{found.vae_folder}/config.json shifts latents by its {', '.join(shifts)}, expected one that scales them "
            "alone: diffusers' InstructPix2Pix pipelines would not shift them back"
        )
    if variant and not any(any(place.rglob(f"*.{variant}[.-]*")) for place in (folder, found.vae_folder)):
        raise ModelError(f"--variant {variant}: {name} holds no files of it, leave it out")
    return found


def _find_vae(vae: str, base: Path, model: Model) -> Path:
    """The folder of a VAE, which may be that of a whole checkpoint.

    A single file holds weights alone: the VAE of the model that it takes the place of describes it.
    """
    folder = Path(vae)
    if folder.suffix == ".safetensors" and folder.is_file():
        return converted(folder, str(base / "vae"), model.cache_dir, "vae")
    if folder.is_file():
        raise ModelError(f"the VAE {vae} is a file of no known kind: of single files ip2p reads .safetensors")
    if not folder.is_dir():
        folder = fetch_vae(vae, model.variant, model.cache_dir)
    return folder / "vae" if (folder / "vae").is_dir() else folder


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`, such as "cuda:1"; by default this machine's accelerator if there is one."""
    return torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")


def layout(device: torch.device) -> torch.memory_format:
    """How convolutions like pictures best on a device: by channels last, but on Apple's GPU.

    PyTorch has computed wrong numbers of them there, without a word (pytorch/pytorch issues 180984 and 175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
