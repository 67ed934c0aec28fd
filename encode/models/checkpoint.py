"""A Stable Diffusion checkpoint on the disk, found or fetched: where its parts are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..base.errors import ModelError, reason
from ..config import Model
from .identity import hash_tokenizer, hash_weights
from .single_file import converted


class Checkpoint:
    """A Stable Diffusion checkpoint in diffusers' layout, on the local disk.

    Attributes:
        folder: the folder that holds model_index.json.
        vae_folder: the folder of the VAE, which may be another checkpoint's.
        is_sdxl: whether there are two text encoders and a pooled embedding.
    """

    def __init__(self, folder: Path, variant: str | None = None, vae_folder: Path | None = None):
        self.folder, self.variant = folder, variant
        self.vae_folder = vae_folder or folder / "vae"
        index = folder / "model_index.json"
        if not index.is_file():
            raise ModelError(
                f"{folder} is not a checkpoint in diffusers' layout: it has no model_index.json "
                "(--pretrained_model_name_or_path takes a Hub id or such a folder)"
            )
        self.index: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        self.is_sdxl = self._has("text_encoder_2")
        vae = self._config(self.vae_folder)
        self.latent_channels: int = vae["latent_channels"]
        self.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.scaling_factor: float = vae.get("scaling_factor", 0.18215)
        self.shift_factor: float | None = vae.get("shift_factor")
        self.vae_overflows: bool = self.is_sdxl and vae.get("force_upcast", True)
        """Whether the VAE exceeds float16 inside, as SDXL's own does; those that were mended declare it."""

    def _has(self, part: str) -> bool:
        return self.index.get(part, [None, None])[1] is not None

    @property
    def text_encoders(self) -> list[str]:
        return ["text_encoder", "text_encoder_2"] if self.is_sdxl else ["text_encoder"]

    @property
    def tokenizers(self) -> list[str]:
        return [encoder.replace("text_encoder", "tokenizer") for encoder in self.text_encoders]

    def variant_in(self, folder: Path) -> str | None:
        """The variant, if this part has it: another checkpoint's VAE need not."""
        there = self.variant and any(f".{self.variant}" in path.name for path in folder.iterdir())
        return self.variant if there else None

    def vae_precision(self, asked: str | None, mixed: str) -> str:
        """The precision of the VAE: as asked for, or else float32 if it overflows and that of the rest if not."""
        return asked or ("no" if self.vae_overflows else mixed)

    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon or v_prediction."""
        scheduler = self.folder / "scheduler" / "scheduler_config.json"
        return json.loads(scheduler.read_text(encoding="utf-8")).get("prediction_type", "epsilon")

    def text_shape(self) -> tuple[int, int, int | None]:
        """Length and width of an encoded instruction, and the width of the pooled one (SDXL)."""
        configs = [self._config(self.folder / encoder) for encoder in self.text_encoders]
        pooled = configs[-1]["projection_dim"] if self.is_sdxl else None
        width = sum(config["hidden_size"] for config in configs)
        return configs[0]["max_position_embeddings"], width, pooled

    @staticmethod
    def _config(part: Path) -> dict[str, Any]:
        try:
            return json.loads((part / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{part}/config.json cannot be read: {error}") from None

    def identity(self) -> dict[str, Any]:
        """What the encoders are, whatever their names, places and file formats: hashes of weights and vocabulary."""
        identity: dict[str, Any] = {"vae": hash_weights(weight_files(self.vae_folder, self.variant))}
        identity |= {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            identity[encoder] = hash_weights(weight_files(self.folder / encoder, self.variant))
            identity[tokenizer] = hash_tokenizer(self.folder / tokenizer)
        return identity


def find_checkpoint(model: Model, without: Sequence[str] = ()) -> Checkpoint:
    """Find a checkpoint on the disk, or download it from the Hub, leaving out the parts named in `without`.

    Raises:
        ModelError: neither a folder, nor a single file, nor a model that the Hub answers for.
    """
    name, variant, vae = model.pretrained_model_name_or_path, model.variant, model.pretrained_vae_model_name_or_path
    folder = Path(name)
    if folder.suffix == ".safetensors" and folder.is_file():
        if variant:
            raise ModelError(f"--variant {variant} belongs to folders and Hub ids, {name} is a single file")
        folder = converted(folder, model.single_file_config, model.cache_dir)
    elif not folder.is_dir():
        folder = _download(model, without)
    return Checkpoint(folder, variant, _find_vae(vae, model.cache_dir) if vae else None)


def _download(model: Model, without: Sequence[str]) -> Path:
    from diffusers import DiffusionPipeline  # seconds to import, and needed for downloads alone

    name, skipped = model.pretrained_model_name_or_path, (*without, "safety_checker", "feature_extractor")
    which = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    try:
        return Path(DiffusionPipeline.download(name, **which, **dict.fromkeys(skipped)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name} is neither a folder nor a .safetensors file here, nor a model that the Hub answers for: "
            f"{reason(error)} (--pretrained_model_name_or_path)"
        ) from None


def _find_vae(vae: str, cache_dir: Path | None) -> Path:
    """The folder of a VAE, which may be that of a whole checkpoint."""
    folder = Path(vae)
    if not folder.is_dir():
        files = ["config.json", "diffusion_pytorch_model*.safetensors"]
        patterns = [*files, *(f"vae/{file}" for file in files)]
        try:
            folder = Path(snapshot_download(vae, cache_dir=cache_dir, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the VAE {vae} is neither a folder here nor a model that the Hub answers for: "
                f"{reason(error)} (--pretrained_vae_model_name_or_path)"
            ) from None
    return folder / "vae" if (folder / "vae").is_dir() else folder


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of one part as diffusers would choose them: the variant if there is one, safetensors first."""
    for infix in ([rf"\.{re.escape(variant)}"] if variant else []) + [""]:
        for suffix in ("safetensors", "bin"):
            pattern = rf"(diffusion_pytorch_model|model|pytorch_model){infix}(-\d+-of-\d+)?\.{suffix}"
            if files := sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name)):
                return files
    raise ModelError(f"{folder} holds no weights: expected *.safetensors or *.bin there")


def is_place(name: str) -> bool:
    """Whether a model can be at `name`: a folder, or what looks like a Hub id."""
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return bool(hub_id) or Path(name).is_dir()
