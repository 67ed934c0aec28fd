"""Sub-commands: functions whose signatures are their flags."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

from .arguments import expand
from .errors import SettingsError, did_you_mean
from .files import is_url
from .flags import check


def run_verb(verbs: Mapping[str, Callable[..., int]], argv: Sequence[str], prog: str) -> int:
    """Run the function in `verbs` that `argv` names first; returns the exit status, which is the function's result.

    What its signature has before a `/` stands before the flags; the rest are flags, and a dataclass stands for a flag
    of each of its fields. Its docstring is the help. `--config` works as in `parse`.

    Raises:
        SettingsError: no such verb, something is missing before the flags, a url where a folder goes, an unknown flag,
            or a wrong value.
    """
    name, *arguments = argv or ["--help"]
    if name in ("--help", "-h"):
        print(_overview(verbs, prog))
        return 0
    if name not in verbs:
        raise SettingsError(f"no verb {name}: expected one of {', '.join(verbs)}{did_you_mean(name, verbs)}")
    import tyro

    verb, places = verbs[name], _places(verbs[name])
    flags = get_type_hints(verb, include_extras=True)
    expected = " ".join((prog, name, *map(str.upper, places)))
    if {"--help", "-h"} & set(arguments):
        arguments = [*places, "--help"]
    given = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if len(given) != len(places):
        raise SettingsError(f"expected `{expected}`, then flags")
    for place, value in zip(places, given, strict=True):
        if flags[place] is Path and is_url(value):
            mend = f"`{prog} pull` makes one of it"
            raise SettingsError(f"{place.upper()} {value} is a url, expected a folder of this machine: {mend}")
    first = [flags.pop(place)(value) for place, value in zip(places, given, strict=True)]
    del flags["return"]
    known = dataclasses.make_dataclass(name, [(flag, hint, None) for flag, hint in flags.items()])
    arguments = expand(arguments[len(places) :])
    check(known, arguments, expected, {})
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
