"""What identifies the frozen networks of a checkpoint: hashes of weights and tokenizers, whatever they are called."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from ..base.errors import ModelError


def tensors(files: Iterable[Path]) -> Iterator[torch.Tensor]:
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


def hash_weights(files: Iterable[Path]) -> str:
    """Hash of all parameters in the weight files of one part, changed by any single value.

    Names do not enter it: libraries rename parameters when they save a checkpoint anew, and the numbers stay.
    """
    digests = []
    for tensor in tensors(files):
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
