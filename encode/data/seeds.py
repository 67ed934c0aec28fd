"""Rows in the layout of timothybrooks/instruct-pix2pix: a folder for each prompt, in it images named by seed."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..base.errors import SampleError, SourceError, explained
from ..base.files import file_state, storable
from .columns import CAPTIONS, IMAGES, ORIGINAL, TEXT, Pick, Role, Rows, image_columns, preset
from .pictures import read_file

FILES = "{seed}_0.jpg", "{seed}_1.jpg"  # original, edited
GLANCE = 16  # samples whose prompts show what there is


class Seeds(Rows):
    """Rows of `seeds.json`, in its order: `DIR/{seed}_0.jpg`, `DIR/{seed}_1.jpg` and a value of `DIR/prompt.json`.

    Raises:
        SourceError: a file of another form than `[[dir, [seed, ...]], ...]`, or another column than there is.
    """

    def __init__(self, folder: Path, pick: Pick):
        self._folder, expected = folder, "; expected [[dir, [seed, ...]], ...]"
        errors = OSError, ValueError, TypeError, RecursionError
        with explained(SourceError, f"{folder}/seeds.json", *errors, hint=expected):
            prompts = json.loads((folder / "seeds.json").read_bytes())
            self._samples = [(str(directory), str(seed)) for directory, seeds in prompts for seed in seeds]
        values: dict[str, Any] = {}
        for row in range(min(GLANCE, len(self))):
            with contextlib.suppress(SampleError):
                values |= self._prompt(row)
        kinds = dict.fromkeys(FILES, (IMAGES,)) | dict.fromkeys(values or ["edit"], (TEXT,))
        self.columns = pick(kinds, known={**preset(*FILES, "edit"), **CAPTIONS})

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        texts = self._prompt(row) if any(role.holds != IMAGES for role in roles) else {}
        return tuple(
            read_file(self._folder / self._path(row, role)) if role.holds == IMAGES else texts.get(self.columns[role])
            for role in roles
        )

    def name(self, row: int) -> str:
        return self._path(row, ORIGINAL)

    def group(self, row: int) -> str:
        """The directory: a prompt with all its seeds."""
        return storable(self._samples[row][0])

    def fingerprint(self) -> str:
        """Changes with size or time of any file."""
        names = tuple(column for role, column in self.columns.items() if not role.beside)
        digest = hashlib.blake2b(repr(names).encode(), digest_size=16)
        for directory, seed in self._samples:
            for name in (*image_columns(self.columns), "prompt.json"):
                digest.update(file_state(os.path.join(self._folder, directory, name.format(seed=seed))))
        return digest.hexdigest()

    def _path(self, row: int, role: Role) -> str:
        directory, seed = self._samples[row]
        return f"{directory}/{self.columns[role].format(seed=seed)}"

    def _prompt(self, row: int) -> dict[str, Any]:
        content = read_file(self._folder / self._samples[row][0] / "prompt.json")
        if content is None:
            raise SampleError("prompt.json is missing")
        with explained(SampleError, "prompt.json cannot be read"):
            values = json.loads(content)
        if not isinstance(values, dict):
            raise SampleError(f"prompt.json holds {type(values).__name__}, expected an object")
        return values
