"""Flags as keyword arguments of Python."""

from collections.abc import Mapping
from typing import Any

from .flags import Config, parse


def configured(config: type[Config], prog: str, refused: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """A configuration by the flags of a command, which are checked as on its command line.

    None stands for a flag that is not given, and a list or tuple for several values.

    Raises:
        SettingsError: as `parse`.
    """
    arguments: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return parse(config, arguments, prog, refused)
