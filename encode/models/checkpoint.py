"""A Stable Diffusion checkpoint on the disk: where its parts are, and what identifies its frozen encoders."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ..base.errors import ModelError, reason
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
        identity: dict[str, Any] = {"vae": hash_weights(self.vae_folder, self.variant)}
        identity |= {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            identity[encoder] = hash_weights(self.folder / encoder, self.variant)
            identity[tokenizer] = hash_tokenizer(self.folder / tokenizer)
        return identity


def find_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    single_file_config: str | None = None,
    cache_dir: Path | None = None,
    without: Sequence[str] = (),
) -> Checkpoint:
    """Find a checkpoint on the disk, or download it from the Hub, leaving out the parts named in `without`.

    Raises:
        ModelError: neither a folder, nor a single file, nor a model that the Hub answers for.
    """
    folder = Path(model)
    if folder.suffix == ".safetensors" and folder.is_file():
        if variant:
            raise ModelError(f"--variant {variant} belongs to folders and Hub ids, {model} is a single file")
        folder = converted(folder, single_file_config, cache_dir)
    elif not folder.is_dir():
        folder = _download(model, revision, variant, cache_dir, without)
    return Checkpoint(folder, variant, _find_vae(vae, cache_dir) if vae else None)


def is_place(name: str) -> bool:
    """Whether a model can be at `name`: a folder, or what looks like a Hub id."""
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()
    return bool(hub_id) or Path(name).is_dir()


def _download(
    model: str, revision: str | None, variant: str | None, cache_dir: Path | None, without: Sequence[str]
) -> Path:
    from diffusers import DiffusionPipeline  # seconds to import, and needed for downloads alone

    skipped = dict.fromkeys((*without, "safety_checker", "feature_extractor"))
    try:
        folder = DiffusionPipeline.download(model, revision=revision, variant=variant, cache_dir=cache_dir, **skipped)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model} is neither a folder nor a .safetensors file here, nor a model that the Hub answers for: "
            f"{reason(error)} (--pretrained_model_name_or_path)"
        ) from None
    return Path(folder)


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


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The weight files of one part as diffusers would choose them: the variant if there is one, safetensors first."""
    for infix in ([rf"\.{re.escape(variant)}"] if variant else []) + [""]:
        for suffix in ("safetensors", "bin"):
            pattern = rf"(diffusion_pytorch_model|model|pytorch_model){infix}(-\d+-of-\d+)?\.{suffix}"
            if files := sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name)):
                return files
    raise ModelError(f"{folder} holds no weights: expected *.safetensors or *.bin there")


def tensors(files: Sequence[Path]) -> Iterator[torch.Tensor]:
    """All parameters in `files`, one after the other, without building a model."""
    for file in files:
        if file.suffix == ".bin":
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            yield from (tensor for name, tensor in state.items() if _is_parameter(name))
            continue
        with safe_open(file, framework="pt") as opened:
            yield from (opened.get_tensor(name) for name in opened.keys() if _is_parameter(name))  # noqa: SIM118


def _is_parameter(name: str) -> bool:
    return not name.endswith("position_ids")  # a constant that only old checkpoints store


def hash_weights(folder: Path, variant: str | None = None) -> str:
    """Hash of all parameters in a part of a checkpoint, changed by any single value.

    Names do not enter it: libraries rename parameters when they save a checkpoint anew, and the numbers stay.
    """
    digests = []
    for tensor in tensors(weight_files(folder, variant)):
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.digest())
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()


def hash_tokenizer(folder: Path) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, special tokens, length; not of how its files are laid out."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if (folder / "vocab.json").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
        else:
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocabulary = model["vocab"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} holds no CLIP tokenizer: {error}") from None
    special = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    content = [vocabulary, merges, special, config.get("model_max_length")]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
