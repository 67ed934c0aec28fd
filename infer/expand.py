"""Puts in place of each `--config run.yaml` the flags that the file holds."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from ..encode.base.errors import EditError


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments with each `--config FILE` replaced where it stands, so that later flags win.

    Raises:
        EditError: the file cannot be read, or holds no `flag: value` lines.
    """
    flags: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        flags += _flags_of(value if equals else next(rest, "")) if name == "--config" else [argument]
    return flags


def _flags_of(path: str) -> list[str]:
    try:
        # BaseLoader keeps every value as it is written: `no` stays text, and so does 1e-5.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EditError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise EditError(f"--config {path} holds no `flag: value` lines")
    flags: list[str] = []
    for name, value in values.items():
        if value in ("true", "false"):
            flags += [f"--{name}"] if value == "true" else []
        elif value not in ("", "null"):
            flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return flags
