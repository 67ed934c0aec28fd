"""The tokenizer of a text encoder: read whole, and what identifies it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..base.errors import ModelError, explained
from .parts import read_config, read_json, refuse_pointer

TOKENS = ("bos", "eos", "pad", "unk")
END = "</w>"  # of a word


def load_tokenizer(folder: Path, positions: int) -> Any:
    """The tokenizer in a folder, which fills instructions up to the `positions` that its text encoder has.

    Raises:
        ModelError: a file is missing or unreadable, or they do not belong together.
    """
    from transformers import AutoTokenizer

    config = _config(folder)
    _vocabulary(folder, config)
    with explained(ModelError, f"{folder} cannot be loaded as a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = tokenizer("", padding="max_length", truncation=True).input_ids
    pad = [tokenizer.pad_token_id] * (positions - 2)
    if found != [tokenizer.bos_token_id, tokenizer.eos_token_id, *pad]:
        raise ModelError(
            f"{folder} fills an empty text up to {len(found)} tokens that begin with {found[:3]}, its text encoder "
            f"has {positions} positions: they do not belong together"
        )
    return tokenizer


def hash_tokenizer(folder: Path) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, special tokens, length; not of how its files are laid out."""
    config = _config(folder)
    vocabulary, merges = _vocabulary(folder, config)
    special = {name: _text(config[f"{name}_token"]) for name in TOKENS}
    content = [vocabulary, merges, special, config["model_max_length"]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    """Its configuration; the special tokens of the older layout stand in a file of their own, which wins."""
    config, special = read_config(folder, "tokenizer"), folder / "special_tokens_map.json"
    if special.is_file() or not (folder / "tokenizer.json").is_file():
        config |= read_json(special)
    return config


def _vocabulary(folder: Path, config: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Tokens with their numbers, and merges, from either layout; a ModelError where they do not belong together."""
    if (file := folder / "tokenizer.json").is_file():
        with explained(ModelError, f"{file} holds no vocabulary of CLIP", KeyError, TypeError, ValueError):
            model = read_json(file)["model"]
            vocabulary: dict[str, int] = dict(model["vocab"])
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    else:
        vocabulary = read_json(folder / "vocab.json")
        refuse_pointer(file := folder / "merges.txt")
        with explained(ModelError, f"{file} cannot be read", OSError, ValueError):
            lines = file.read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
    made = {merge.replace(" ", "") for merge in merges}
    known = {token for token in vocabulary if len(token.removesuffix(END)) > 1}  # which no single letter is
    if lost := (made ^ known) - {_text(config[f"{name}_token"]) for name in TOKENS}:
        raise ModelError(f"{file} and its vocabulary do not belong together: {min(lost)!r} is in one of them alone")
    if gaps := set(range(len(vocabulary))) - set(vocabulary.values()):
        raise ModelError(f"{file}: no token of its vocabulary has number {min(gaps)}")
    return vocabulary, merges


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
