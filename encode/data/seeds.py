"""Pairs in the layout of timothybrooks/instruct-pix2pix: a folder for each prompt, in it images named by seed."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.errors import SourceError
from ..base.files import file_state
from ..config import EncodeConfig
from .columns import IMAGES, TEXT, choose
from .presets import Preset

ORIGINAL, EDITED = "{seed}_0.jpg", "{seed}_1.jpg"


class Seeds:
    """Rows of `seeds.json`, in its order: `DIR/{seed}_0.jpg`, `DIR/{seed}_1.jpg` and a value of `DIR/prompt.json`."""

    def __init__(self, folder: Path, samples: list[tuple[str, str]], columns: tuple[str, ...]):
        self.columns = columns
        self._folder, self._samples = folder, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        directory, seed = self._samples[row]
        images = (self._folder / directory / column.format(seed=seed) for column in self.columns[:2])
        return (*map(_read, images), *self._prompts(directory))

    def instructions(self) -> Iterator[tuple[Any, ...]]:
        """The instructions of all rows."""
        return (self._prompts(directory) for directory, _ in self._samples)

    def group(self, row: int) -> str:
        """The directory: a prompt with all its seeds."""
        return self._samples[row][0]

    def fingerprint(self) -> str:
        """Changes with size or time of any file."""
        digest = hashlib.blake2b(repr(self.columns).encode(), digest_size=16)
        for directory, seed in self._samples:
            for name in (*self.columns[:2], "prompt.json"):
                path = os.path.join(self._folder, directory, name.format(seed=seed))
                digest.update(file_state(path).encode())
        return digest.hexdigest()

    def _prompts(self, directory: str) -> tuple[Any, ...]:
        values = _prompt_file(self._folder / directory)
        return tuple(values.get(column) for column in self.columns[2:])


def open_seeds(config: EncodeConfig, folder: Path) -> Seeds:
    """Open a folder that has a `seeds.json`: `[[dir, [seed, ...]], ...]`.

    Raises:
        SourceError: a file of another form, or another column than there is.
    """
    try:
        prompts = json.loads((folder / "seeds.json").read_bytes())
        samples = [(str(directory), str(seed)) for directory, seeds in prompts for seed in seeds]
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"{folder}/seeds.json: {error}; expected [[dir, [seed, ...]], ...]") from None
    values = _prompt_file(folder / samples[0][0]) if samples else {}
    kinds = {ORIGINAL: IMAGES, EDITED: IMAGES} | dict.fromkeys(values or ["edit"], TEXT)
    return Seeds(folder, samples, choose(config, str(folder), kinds, Preset(ORIGINAL, EDITED, "edit")))


def _prompt_file(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "prompt.json").read_bytes())
    except (OSError, ValueError):
        return {}  # its samples stand aside, having no instruction
    return values if isinstance(values, dict) else {}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
