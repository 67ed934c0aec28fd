"""Writes a command line out: files of flags, other names of flags, and presets, as the flags that they stand for."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from .errors import SettingsError

Values = Mapping[str, str]


def also(names: str, values: Values | None = None) -> dict[str, Any]:
    """Metadata of a field: other names of its flag, which other commands have for it, and values that go with them."""
    return {"also": {name: values or {} for name in names.split()}}


def stands_for(choices: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """Metadata of a field: the flags that each of its choices stands for; flags that are given win over them."""
    return {"stands_for": choices}


def written_out(config: type, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with nothing but the flags of its configuration.

    Raises SettingsError: a file of flags cannot be read.
    """
    arguments = list(_renamed(config, expand(arguments)))
    return [*_of_presets(config, arguments), *arguments]


def other_names(config: type) -> dict[str, tuple[str, Values]]:
    """For each other name of a flag, the flag, and what values mean that are given under that name."""
    fields = list(_fields(config))
    return {name: (field.name, values) for field in fields for name, values in field.metadata.get("also", {}).items()}


def expand(arguments: Sequence[str]) -> list[str]:
    """Replace each `--config FILE` by the flags that the YAML file holds, where it stands."""
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        expanded += _flags_in(value if equals else next(rest, "")) if name == "--config" else [argument]
    return expanded


def _flags_in(path: str) -> Iterator[str]:
    try:
        # BaseLoader keeps every scalar as text, so that `no` and `1e-5` mean what they say.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(f"--config {path} cannot be read: {why}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path} holds no `flag: value` lines")
    for name, value in values.items():
        if value in ("true", "True", "false", "False"):
            yield f"--{name}" if value.lower() == "true" else f"--no_{name}"
        elif value not in ("null", "", []):
            yield f"--{name}"
            yield from ("inf" if item == ".inf" else item for item in (value if isinstance(value, list) else [value]))


def _renamed(config: type, arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with flags and values by the names that the configuration has for them."""
    names = other_names(config)
    values: Values = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name, values = names.get(name.replace("-", "_"), (name, {}))
            yield f"--{name}{equals}{values.get(value, value)}"
        else:
            yield values.get(argument, argument)


def _of_presets(config: type, arguments: Sequence[str]) -> Iterator[str]:
    """The flags that the last choice of each preset stands for; nothing for a choice that there is not."""
    for field in _fields(config):
        choices = field.metadata.get("stands_for", {})
        flag = f"--{field.name}"
        given = [value for name, value in itertools.pairwise(arguments) if name == flag]
        given += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
        for name, value in choices.get(given[-1], {}).items() if given else ():
            yield from (f"--{name}", str(value))


def _fields(config: type) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a configuration that are flags, through all groups."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name])
        else:
            yield field
