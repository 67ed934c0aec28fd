"""A Stable Diffusion checkpoint on the disk, found or fetched: where its parts are, and what identifies them."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from ..base.errors import ModelError, explained
from ..config import Model
from .single_file import converted


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
        index = folder / "model_index.json"
        if not index.is_file():
            raise ModelError(
                f"{folder} is not a checkpoint in diffusers' layout: it has no model_index.json "
                "(--pretrained_model_name_or_path takes a Hub id or such a folder)"
            )
        self.index: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        self.is_sdxl = self.index.get("text_encoder_2", [None, None])[1] is not None
        self.text_encoders = ["text_encoder", "text_encoder_2"] if self.is_sdxl else ["text_encoder"]
        self.tokenizers = [encoder.replace("text_encoder", "tokenizer") for encoder in self.text_encoders]
        vae = _config(self.vae_folder)
        self.latent_channels: int = vae["latent_channels"]
        self.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.scaling_factor: float = vae.get("scaling_factor", 0.18215)
        self.shift_factor: float | None = vae.get("shift_factor")
        self.vae_overflows: bool = self.is_sdxl and vae.get("force_upcast", True)

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
        configs = [_config(self.folder / encoder) for encoder in self.text_encoders]
        pooled = configs[-1]["projection_dim"] if self.is_sdxl else None
        return configs[0]["max_position_embeddings"], sum(config["hidden_size"] for config in configs), pooled

    def identity(self) -> dict[str, Any]:
        """What the encoders are, whatever their names, places and file formats: hashes of weights and vocabulary."""
        identity: dict[str, Any] = {"vae": hash_weights(weight_files(self.vae_folder, self.variant))}
        identity |= {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        for encoder, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            identity[encoder] = hash_weights(weight_files(self.folder / encoder, self.variant))
            identity[tokenizer] = _hash_tokenizer(self.folder / tokenizer)
        return identity


def _config(part: Path) -> dict[str, Any]:
    with explained(ModelError, f"{part}/config.json cannot be read", OSError, ValueError):
        return json.loads((part / "config.json").read_text(encoding="utf-8"))


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
        from diffusers import DiffusionPipeline  # seconds to import, and needed for downloads alone

        which = {"revision": model.revision, "variant": variant, "cache_dir": model.cache_dir}
        skipped = dict.fromkeys((*without, "safety_checker", "feature_extractor"))
        nowhere = f"{name} is neither a folder nor a .safetensors file here, nor a model that the Hub answers for"
        with _fetching(nowhere, "--pretrained_model_name_or_path"):
            folder = Path(DiffusionPipeline.download(name, **which, **skipped))
    return Checkpoint(folder, variant, _find_vae(vae, model.cache_dir, variant) if vae else None)


def _find_vae(vae: str, cache_dir: Path | None, variant: str | None) -> Path:
    """The folder of a VAE, which may be that of a whole checkpoint; of the Hub's files the first of those that fit."""
    folder = Path(vae)
    if not folder.is_dir():
        nowhere = f"the VAE {vae} is neither a folder here nor a model that the Hub answers for"
        with _fetching(nowhere, "--pretrained_vae_model_name_or_path"):
            for infix in ([f".{variant}"] if variant else []) + [""]:
                for suffix in ("safetensors", "bin"):
                    files = ["config.json", f"diffusion_pytorch_model{infix}.{suffix}"]
                    patterns = [*files, *(f"vae/{file}" for file in files)]
                    folder = Path(snapshot_download(vae, cache_dir=cache_dir, allow_patterns=patterns))
                    if any(folder.glob(f"**/{files[1]}")):
                        return folder / "vae" if (folder / "vae").is_dir() else folder
    return folder / "vae" if (folder / "vae").is_dir() else folder


@contextlib.contextmanager
def _fetching(what: str, flag: str) -> Iterator[None]:
    """Say what fails, and all of the Hub's answer, to which libraries may only point: it tells who may fetch what."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(f"{what}: {' '.join(str(error.__cause__ or error).split())} ({flag})") from None


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
    path, hub_id = Path(name), re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    return path.is_dir() or bool(hub_id and not path.exists())


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`, such as "cuda:1"; by default this machine's accelerator if there is one."""
    return torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")


def hash_weights(files: Iterable[Path]) -> str:
    """Hash of all parameters in the weight files of one part, changed by any single value; no model is built.

    Names do not enter it: libraries rename parameters when they save a checkpoint anew, and the numbers stay.
    """
    digests = []
    for file in files:
        weights = torch.load(file, "cpu", mmap=True, weights_only=True) if file.suffix == ".bin" else load_file(file)
        for name, tensor in weights.items():
            if name.endswith("position_ids"):  # a constant that only old checkpoints store
                continue
            digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            digests.append(digest.digest())
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()


def _hash_tokenizer(folder: Path) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, special tokens, length; not of how its files are laid out."""
    with explained(ModelError, f"{folder} holds no CLIP tokenizer", OSError, ValueError, KeyError):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if (folder / "vocab.json").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
        else:
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocabulary = model["vocab"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {name: config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    content = [vocabulary, merges, special, config.get("model_max_length")]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
