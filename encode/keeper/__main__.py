"""`ip2p-cache`: looks after a cache.

    ip2p-cache info CACHE        what is inside
    ip2p-cache verify CACHE      checks every byte, names what is wrong, drops what is torn
    ip2p-cache preview CACHE     decodes samples to a contact sheet
    ip2p-cache diff A B          how two caches differ
    ip2p-cache push CACHE URL    copies a cache to an object store or a folder
    ip2p-cache pull URL CACHE    copies it from there

The exit status is 1 where `verify` finds something or `diff` a difference, and 2 where a command cannot be used so.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..base.errors import SettingsError, user_errors
from ..base.flags import parse
from . import verbs

PROG = "ip2p-cache"


@dataclasses.dataclass(frozen=True)
class Info:
    """Show what a cache holds: samples, shapes, sizes on disk, model, dataset, encoding."""

    quarantined: bool = False
    """List the samples that stand aside, with their reasons."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the model of a cache is now; by default where it was when the cache was made."""

    pretrained_model_name_or_path: str | None = None
    """The model that made the cache. Default: as recorded."""
    pretrained_vae_model_name_or_path: str | None = None
    """The other VAE that made it, if there was one. Default: as recorded."""
    cache_dir: Path | None = None
    """Where the datasets and huggingface_hub libraries keep downloads. Default: as recorded."""


@dataclasses.dataclass(frozen=True)
class Verify(Origin):
    """Check every file of a cache against its checksum, the numbers, and the samples against the shards."""

    repair: bool = False
    """Delete torn shards and damaged tables, so that the same ip2p-encode makes them again."""
    reencode: int = 0
    """If all is well, encode this many random samples afresh and compare them with the cache."""
    dataset_name: str | None = None
    """The dataset that was encoded. Default: as recorded."""
    train_data_dir: Path | None = None
    """The folder of images that was encoded. Default: as recorded."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.reencode < 0:
            raise SettingsError(f"--reencode {self.reencode}: expected a number of samples")
        if self.dataset_name and self.train_data_dir:
            raise SettingsError("give either --dataset_name or --train_data_dir: what was encoded")


@dataclasses.dataclass(frozen=True)
class Preview(Origin):
    """Decode samples to a contact sheet: original and edited with the instruction, in every view."""

    output: Path = Path("preview.png")
    """The picture to write."""
    samples: int = 8
    """How many samples, spread evenly over the dataset."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SettingsError(f"--samples {self.samples}: expected a number above 0")


@dataclasses.dataclass(frozen=True)
class Diff:
    """Show field by field how two caches differ, and how many samples they share."""

    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True)
class Push:
    """Copy a cache to any place that fsspec knows, with checksums; what is there already is skipped."""


@dataclasses.dataclass(frozen=True)
class Pull:
    """Copy a cache from any place that fsspec knows, with checksums; what is there already is skipped."""


class Verb(NamedTuple):
    """A sub-command: its flags, what stands before them, and what it does."""

    flags: type
    places: tuple[str, ...]
    run: Callable[..., int]


VERBS = {
    "info": Verb(Info, ("CACHE",), verbs.info),
    "verify": Verb(Verify, ("CACHE",), verbs.verify),
    "preview": Verb(Preview, ("CACHE",), verbs.preview),
    "diff": Verb(Diff, ("A", "B"), verbs.diff),
    "push": Verb(Push, ("CACHE", "URL"), verbs.push),
    "pull": Verb(Pull, ("URL", "CACHE"), verbs.pull),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` defaults to the command line."""
    with user_errors(PROG):
        name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
        if name in ("--help", "-h"):
            print(usage())
        elif status := run(name, rest):
            raise SystemExit(status)


def run(name: str, arguments: list[str]) -> int:
    """Run one verb; returns the exit status.

    Raises:
        SettingsError: no such verb, or something is missing before the flags.
    """
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        mean = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"no verb {name}: expected one of {', '.join(VERBS)}{mean}")
    verb = VERBS[name]
    expected = " ".join((PROG, name, *verb.places))
    if {"--help", "-h"} & set(arguments):
        parse(verb.flags, ["--help"], expected, {})
    places = arguments[: len(verb.places)]
    if len(places) < len(verb.places) or any(place.startswith("-") for place in places):
        raise SettingsError(f"expected `{expected}`, then flags")
    return verb.run(parse(verb.flags, arguments[len(places) :], expected, {}), *places)


def usage() -> str:
    """All verbs in a line each."""
    lines = [
        f"  {' '.join((name, *verb.places)):<16} {(verb.flags.__doc__ or '').splitlines()[0]}"
        for name, verb in VERBS.items()
    ]
    head = f"usage: {PROG} VERB CACHE [flags]\n\nLook after a cache.\n\n"
    return head + "\n".join(lines) + f"\n\n`{PROG} VERB --help` lists the flags of a verb."


if __name__ == "__main__":
    main()
