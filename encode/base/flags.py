"""Turns command lines and YAML files into a configuration dataclass, and errors into lines a user can act on."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .errors import Ip2pError, SettingsError, did_you_mean

Config = TypeVar("Config")


def parse(config: type[Config], argv: Sequence[str], prog: str, refused: Mapping[str, str]) -> Config:
    """Read `argv` into an instance of the dataclass `config`.

    `--config run.yaml` stands for the flags that the file holds; later flags win, and `--no_x` takes back `--x`.
    `refused` maps flags that users may know from elsewhere to the reason why they are not taken here.

    Raises:
        SettingsError: an unknown flag or value, with the nearest right one, or a flag of another command.
    """
    import tyro  # here, because nothing else in a worker process needs it

    arguments = _expand_config(list(argv))
    _check(config, arguments, prog, refused)
    options = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(config, args=arguments, prog=prog, description=config.__doc__, use_underscores=True, config=options)


def dump(config: object) -> dict[str, object]:
    """The resolved configuration as plain values that YAML and JSON can hold, without secrets."""
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if "token" not in name}


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Show `Ip2pError` and Ctrl-C as a line instead of a traceback; exit with status 2 and 130."""
    try:
        yield
    except Ip2pError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped; the same command continues from what is saved", file=sys.stderr)
        raise SystemExit(130) from None


def _expand_config(arguments: list[str]) -> list[str]:
    """Replace each `--config FILE` by the flags that the YAML file holds, where it stands."""
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            expanded.append(argument)
            continue
        path = value if equals else next(rest, "")
        expanded += _flags_of(Path(path))
    return expanded


def _flags_of(path: Path) -> list[str]:
    try:
        # BaseLoader keeps every scalar as text, so that `no` and `1e-5` mean what they say.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path} holds no `flag: value` lines")
    flags: list[str] = []
    for name, value in values.items():
        if value in ("true", "false"):
            flags.append(f"--{name}" if value == "true" else f"--no_{name}")
        elif value not in ("null", "", []):
            flags += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return flags


def _check(config: type, arguments: Sequence[str], prog: str, refused: Mapping[str, str]) -> None:
    """Answer mistyped names and values in one line, before tyro would in ten."""
    hints = get_type_hints(config)
    off = [f"no_{name}" for name, hint in hints.items() if hint is bool]
    for position, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name in hints:
            _check_value(name, hints[name], value if equals else (*arguments[position + 1 : position + 2], "")[0])
        elif reason := refused.get(name) or refused.get(name.removeprefix("no_")):
            raise SettingsError(f"--{name} {reason}")
        elif name not in ("help", *off):
            near = difflib.get_close_matches(name, [*hints, *off, *refused], n=1)
            hint = f"; did you mean --{near[0]}?" if near else f"; `{prog} --help` lists them all"
            raise SettingsError(f"unknown flag --{name}{hint}")


def _check_value(name: str, hint: Any, value: str) -> None:
    """Look at a choice or a number; paths, text and lists can be anything here."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        mean = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"--{name} {value}: expected one of {', '.join(choices)}{mean}")
    for kind, expected in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                kind(value)
            except ValueError:
                raise SettingsError(f"--{name} {value}: expected {expected}") from None


def run_verb(verbs: Mapping[str, Callable[..., int]], argv: Sequence[str], prog: str) -> int:
    """Run the function in `verbs` that `argv` names first; returns the exit status, which is the function's result.

    What its signature has before a `/` stands before the flags; the rest are flags, and a dataclass stands for a flag
    of each of its fields. Its docstring is the help. `--config` works as in `parse`.

    Raises:
        SettingsError: no such verb, something is missing before the flags, an unknown flag, or a wrong value.
    """
    name, *arguments = argv or ["--help"]
    if name in ("--help", "-h"):
        print(_overview(verbs, prog))
        return 0
    if name not in verbs:
        raise SettingsError(f"no verb {name}: expected one of {', '.join(verbs)}{did_you_mean(name, verbs)}")
    import tyro

    verb, places, flags = verbs[name], _places(verbs[name]), get_type_hints(verbs[name])
    expected = " ".join((prog, name, *map(str.upper, places)))
    if {"--help", "-h"} & set(arguments):
        arguments = [*places, "--help"]
    given = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if len(given) != len(places):
        raise SettingsError(f"expected `{expected}`, then flags")
    first = [flags.pop(place)(value) for place, value in zip(places, given, strict=True)]
    del flags["return"]
    for group in [name for name, hint in flags.items() if dataclasses.is_dataclass(hint)]:
        flags |= get_type_hints(flags.pop(group))
    known = dataclasses.make_dataclass(name, [(flag, hint, None) for flag, hint in flags.items()])
    arguments = _expand_config(arguments[len(places) :])
    _check(known, arguments, expected, {})
    options = (tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes)
    bound = functools.partial(verb, *first)
    return tyro.cli(bound, args=arguments, prog=expected, use_underscores=True, config=options)


def _places(verb: Callable[..., int]) -> list[str]:
    """The parameters of a verb that stand before the flags."""
    parameters = inspect.signature(verb).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]


def _overview(verbs: Mapping[str, Callable[..., int]], prog: str) -> str:
    """All verbs in a line each."""
    calls = [" ".join((name, *map(str.upper, _places(verb)))) for name, verb in verbs.items()]
    heads = [(inspect.getdoc(verb) or "").partition("\n")[0] for verb in verbs.values()]
    width = max(map(len, calls))
    lines = [f"  {call:<{width}}   {head}" for call, head in zip(calls, heads, strict=True)]
    more = f"`{prog} VERB --help` lists the flags of a verb."
    return "\n".join([f"usage: {prog} VERB ... [flags]", "", *lines, "", more])
