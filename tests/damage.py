"""Random damage to a folder of a model or a checkpoint, one at a time, mended before the next."""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

PICKLES = (".bin", ".pkl", ".pt")


def damages(
    folder: Path, count: int, seed: int, among: Callable[[Path], bool] = lambda _: True
) -> Iterator[tuple[str, Path]]:
    """Damage `count` things in a folder, and give what was done and to which file; each is mended before the next.

    A file is deleted, truncated, emptied or replaced by text; a JSON file, or a pickle of torch, loses a key at any
    depth; a file of weights loses a tensor. The same seed does the same damage to the same folder.

    Args:
        among: which files may be damaged.
    """
    chance = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and among(path))
    for _ in range(count):
        path = chance.choice(files)
        content = path.read_bytes()
        path.unlink()  # not written over: somebody may have mapped it into memory
        try:
            yield chance.choice(_kinds(path))(path, content, chance), path
        finally:
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def _kinds(path: Path) -> list[Callable[[Path, bytes, random.Random], str]]:
    losses = {".json": _lose_key, ".safetensors": _lose_tensor} | dict.fromkeys(PICKLES, _lose_pickled)
    loss = losses.get(path.suffix)
    return [_delete, _truncate, _empty, _replace, *([loss, loss] if loss else [])]


def _delete(path: Path, _: bytes, __: random.Random) -> str:
    return f"{path.name} deleted"


def _truncate(path: Path, content: bytes, chance: random.Random) -> str:
    size = chance.randrange(max(1, len(content)))
    path.write_bytes(content[:size])
    return f"{path.name} truncated from {len(content)} to {size} bytes"


def _empty(path: Path, _: bytes, __: random.Random) -> str:
    path.write_bytes(b"")
    return f"{path.name} emptied"


def _replace(path: Path, _: bytes, chance: random.Random) -> str:
    texts = [
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "<!doctype html>\n",
        "[1]",
        "{}",
        "7",
    ]
    path.write_text(text := chance.choice(texts))
    return f"{path.name} replaced by {text!r}"


def _lose_key(path: Path, content: bytes, chance: random.Random) -> str:
    lost = _lose(found := json.loads(content), chance)
    path.write_text(json.dumps(found))
    return f"{path.name} without {lost}"


def _lose_pickled(path: Path, content: bytes, chance: random.Random) -> str:
    lost = _lose(found := torch.load(io.BytesIO(content), "cpu", weights_only=True), chance)
    torch.save(found, path)
    return f"{path.name} without {lost}"


def _lose_tensor(path: Path, content: bytes, chance: random.Random) -> str:
    weights = load(content)
    del weights[lost := chance.choice(sorted(weights))]
    save_file(weights, path, {"format": "pt"})
    return f"{path.name} without {lost}"


def _lose(tree: Any, chance: random.Random) -> str:
    """Take one thing out of nested dictionaries and lists, at any depth; says where it was."""
    if not isinstance(tree, dict | list) or not tree:
        return "nothing"
    key = chance.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if isinstance(tree[key], dict | list) and tree[key] and chance.random() < 0.7:
        return f"{key}.{_lose(tree[key], chance)}"
    del tree[key]
    return str(key)
