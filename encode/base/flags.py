"""Flags into configuration dataclasses, and those back into plain values.

A configuration is a frozen dataclass whose fields are flags, or groups of flags: dataclasses again, under whose
docstrings `--help` shows them. Names are flat: `--learning_rate`, whichever group it belongs to.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from .arguments import other_names, written_out
from .errors import SettingsError, did_you_mean

Config = TypeVar("Config")


class AtLeast(NamedTuple):
    """Metadata of a type: the smallest number that makes sense, or the fewest letters of a text."""

    least: int


Count = Annotated[int, AtLeast(1)]
Whole = Annotated[int, AtLeast(0)]
Amount = Annotated[float, AtLeast(0)]
Name = Annotated[str, AtLeast(1)]
NUMBERS = {int: "a whole number", float: "a number"}
EVERYWHERE = "--quiet leaves warnings and errors, --version tells the version."
HELP = {"--help", "-h"}
SECRET = {"secret": True}
"""Metadata of a field that is written nowhere."""


def parse(config: type[Config], argv: Sequence[str], prog: str, refused: Mapping[str, str] | None = None) -> Config:
    """Read `argv` into an instance of the dataclass `config`.

    `--config run.yaml` stands for the flags that the file holds; later flags win, and `--no_x` takes back `--x`.
    `refused` maps flags that users may know from elsewhere to the reason why they are not taken here. A method `idle`
    of `config`, if there is one, yields a sentence for each flag that is set and cannot act.

    Raises:
        SettingsError: an unknown flag or value, with the nearest right one; a flag of another command; one missing; one
            that cannot act.
    """
    import tyro  # here, because nothing else in a worker process needs it

    arguments = written_out(config, argv)
    check(config, arguments, prog, refused or {})
    options = (tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes)
    paragraphs = (" ".join(text.split()) for text in f"{config.__doc__}\n\n{EVERYWHERE}".split("\n\n"))
    wrapped = [textwrap.indent(textwrap.fill(text, 78), "  ") for text in paragraphs]  # tyro leaves indented lines
    cli = {"prog": prog, "description": "\n\n".join(wrapped), "use_underscores": True}
    with _unbroken(config) if HELP & set(arguments) else contextlib.nullcontext():
        found = tyro.cli(config, args=arguments, config=options, **cli)
    for sentence in getattr(found, "idle", tuple)():
        raise SettingsError(sentence)
    return found


@contextlib.contextmanager
def _unbroken(config: type) -> Iterator[None]:
    """Meanwhile tyro wraps texts of flags to the width of the help: it would break them where the source does."""
    import docstring_parser
    import tyro

    hints, before = get_type_hints(config, include_extras=True), config.__annotations__
    classes = filter(dataclasses.is_dataclass, reversed(config.__mro__))
    texts = [text for kind in classes for text in docstring_parser.parse_from_object(kind).params]
    lines = {text.arg_name: " ".join((text.description or "").split()) for text in texts}
    told = {name: Annotated[hints[name], tyro.conf.arg(help=line)] for name, line in lines.items() if name in hints}
    with contextlib.ExitStack() as groups:
        for hint in filter(dataclasses.is_dataclass, hints.values()):
            groups.enter_context(_unbroken(hint))  # type: ignore[arg-type]
        config.__annotations__ = before | told
        try:
            yield
        finally:
            config.__annotations__ = before


def idle(group: Any, why: str, *names: str) -> Iterator[str]:
    """A sentence for each of these flags of a group, or of all, that is not left as it is: `why` says what to do."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if field.name in (names or vars(group)) and value != field.default:
            shown = "" if isinstance(value, bool | tuple) or field.metadata.get("secret") else f" {value}"
            yield f"--{field.name}{shown} {why}"


def flags_of(config: type) -> dict[str, Any]:
    """The type of each flag of a configuration, by name, through all groups."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(config, include_extras=True).items():
        flags |= flags_of(hint) if dataclasses.is_dataclass(hint) else {name: hint}  # type: ignore[arg-type]
    return flags


def required(config: type) -> list[str]:
    """Names of the flags that must be given."""
    hints, names = get_type_hints(config), []
    for field in dataclasses.fields(config):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            names += required(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else [field.name]
    return names


def dump(config: Any) -> dict[str, Any]:
    """A configuration as plain values that YAML and JSON can hold, by flag, without secrets."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= dump(value)
        elif not field.metadata.get("secret"):
            items = [str(v) if isinstance(v, Path) else v for v in (value if isinstance(value, tuple) else [value])]
            values[field.name] = items[0] if len(items) == 1 else items
    return values


def build(config: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration that `dump` gave as `values`; what it did not know yet has its default."""
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(config, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            given[name] = build(hint, values)  # type: ignore[arg-type]
        elif name in values:
            given[name] = _restored(hint, values[name])
    return config(**given)


def changed(config: Config, **flags: Any) -> Config:
    """A copy of a configuration with other values of some flags, whichever groups they belong to."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = changed(value, **{name: flags[name] for name in flags.keys() & flags_of(type(value))})
        elif field.name in flags:
            values[field.name] = flags[field.name]
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _restored(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_restored(get_args(hint)[0], item) for item in items)
    return Path(value) if Path in _kinds(hint) and value is not None else value


def _kinds(hint: Any) -> tuple[Any, ...]:
    """What a flag may be: the parts of a union, or the kind itself; of a list, that of its items."""
    hint = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)


def check(config: type, arguments: Sequence[str], prog: str, refused: Mapping[str, str]) -> None:
    """Answer wrong and missing flags in one line, before tyro would in ten."""
    flags = flags_of(config)
    switches = {name: f"no_{name}" for name, hint in flags.items() if hint is bool}
    switches |= {off: on for on, off in switches.items()}
    given: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument in HELP:
            return
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name not in flags and name not in switches:
                if why := refused.get(name) or refused.get(name.removeprefix("no_")):
                    raise SettingsError(f"--{name} {why}")
                near = did_you_mean(name, [*flags, *switches, *refused, *other_names(config)], "--")
                raise SettingsError(f"unknown flag --{name}{near or f'; `{prog} --help` lists them all'}")
            given[name] = [value] if equals else []
        elif name:
            given[name].append(argument)
        else:
            raise SettingsError(f"{argument}: expected a flag before it; `{prog} --help` lists them all")
    for name, values in given.items():
        if name in switches and values:
            raise SettingsError(f"--{name} {values[0]}: expected no value; its opposite is --{switches[name]}")
        if name not in switches:
            _check_values(name, flags[name], values)
    if missing := [f"--{name}" for name in required(config) if not given.get(name)]:
        raise SettingsError(f"give {' and '.join(missing)}; `{prog} --help` says what that is")


def _check_values(name: str, hint: Any, values: list[str]) -> None:
    """Look at how many there are, at choices, numbers and names; paths and other text can be anything."""
    if get_origin(hint) is not tuple and len(values) != 1:
        found = f" {' '.join(values)}" if values else ""
        raise SettingsError(f"--{name}{found}: expected one value" + (", in quotes if it has spaces" if found else ""))
    kinds = _kinds(hint)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    for value in values:
        if choices and value not in choices:
            near = did_you_mean(value, choices)
            raise SettingsError(f"--{name} {value}: expected one of {', '.join(choices)}{near}")
        for kind in kinds:
            _check_limit(name, kind, value)


def _check_limit(name: str, kind: Any, value: str) -> None:
    number, limit = get_args(kind) if get_origin(kind) is Annotated else (kind, None)
    if number is str and limit and not value:
        raise SettingsError(f"--{name} '': expected a name; leave the flag out if there is none")
    if number not in NUMBERS:
        return
    try:
        found = number(value)
    except ValueError:
        raise SettingsError(f"--{name} {value}: expected {NUMBERS[number]}") from None
    if limit and not found >= limit.least:  # which NaN is not either
        raise SettingsError(f"--{name} {value}: expected {limit.least} or more")
