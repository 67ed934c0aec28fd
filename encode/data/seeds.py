"""Rows in the layout of timothybrooks/instruct-pix2pix: a folder for each prompt, in it images named by seed."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.errors import SourceError
from ..base.files import file_state
from .columns import IMAGES, ORIGINAL, TEXT, Columns, Pick, Role, image_columns, preset
from .pairs import Rows

FILES = "{seed}_0.jpg", "{seed}_1.jpg"  # original, edited


class Seeds(Rows):
    """Rows of `seeds.json`, in its order: `DIR/{seed}_0.jpg`, `DIR/{seed}_1.jpg` and a value of `DIR/prompt.json`."""

    def __init__(self, folder: Path, samples: list[tuple[str, str]], columns: Columns):
        self.columns = columns
        self._folder, self._samples = folder, samples

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        directory = self._samples[row][0]
        values = _prompt_file(self._folder / directory)
        return tuple(
            _read(self._folder / self._path(row, role)) if role.holds == IMAGES else values.get(self.columns[role])
            for role in roles
        )

    def texts(self, role: Role) -> Iterator[Any]:
        return (_prompt_file(self._folder / directory).get(self.columns[role]) for directory, _ in self._samples)

    def name(self, row: int) -> str:
        return self._path(row, ORIGINAL)

    def group(self, row: int) -> str:
        """The directory: a prompt with all its seeds."""
        return self._samples[row][0]

    def fingerprint(self) -> str:
        """Changes with size or time of any file."""
        digest = hashlib.blake2b(repr(tuple(self.columns.values())).encode(), digest_size=16)
        for directory, seed in self._samples:
            for name in (*image_columns(self.columns), "prompt.json"):
                path = os.path.join(self._folder, directory, name.format(seed=seed))
                digest.update(file_state(path).encode())
        return digest.hexdigest()

    def _path(self, row: int, role: Role) -> str:
        directory, seed = self._samples[row]
        return f"{directory}/{self.columns[role].format(seed=seed)}"


def open_seeds(folder: Path, pick: Pick) -> Seeds:
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
    kinds = dict.fromkeys(FILES, IMAGES) | dict.fromkeys(values or ["edit"], TEXT)
    return Seeds(folder, samples, pick(kinds, known=preset(*FILES, "edit")))


def _prompt_file(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "prompt.json").read_bytes())
    except (OSError, ValueError):
        return {}  # its samples stand aside, having no instruction
    return values if isinstance(values, dict) else {}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
