"""The command line of `ip2p-train`: with a dataset in place of a cache it is that of `ip2p-encode`, too."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..encode import early
from ..encode.base.arguments import expand
from ..encode.base.errors import SettingsError
from ..encode.base.files import check_cache, check_folder, content_key, is_url
from ..encode.base.flags import changed, flags_of, parse
from ..encode.config import EncodeConfig
from ..encode.data.places import check_place, in_tars
from ..encode.models.hub import check_name
from .config import TrainConfig, refused

PROG = "ip2p-train"
DATASETS = {"dataset_name", "train_data_dir"}
OUTPUT = "instruct-pix2pix-model"  # what diffusers' scripts call it
PLACES = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config", *DATASETS)
# What decides nothing of a cache, what can be changed in a finished one, and what is another word for resize_mode.
UNDECIDED = """
    cache_dir streaming encode_batch_size dataloader_num_workers on_error retry_quarantined keep_columns no_flip_regex
    center_crop
""".split()

EITHER = {"clip_model": ("pair_scores", "score_samples")}
"""Flags of both commands that act beside another one alone: of `ip2p-encode`, of `ip2p-train`."""


def read(arguments: Sequence[str]) -> tuple[EncodeConfig | None, TrainConfig]:
    """What is to be encoded first, if a dataset is given, and what is to be trained.

    Each command gets the flags that it has, and those of both go to both. Raises SettingsError as `parse` does.
    """
    arguments = expand(list(arguments))
    given = {_name(argument) for argument in arguments}
    if {"--help", "-h"} & set(arguments):
        arguments, given = ["--help"], set()
    if not DATASETS & given:
        if "cache" not in given:
            # For help, and for other slips, which are told first.
            parse(TrainConfig, ["--output_dir", OUTPUT, "--cache", "-", *arguments], PROG, refused())
            missing = " and ".join(f"--{name}" for name in ("cache", "output_dir") if name not in given)
            raise SettingsError(f"give {missing}, or --dataset_name, which is then encoded first (`{PROG} --help`)")
        return None, parse(TrainConfig, arguments, PROG, refused())
    encodes, trains = _split(arguments)
    own = [] if "cache" in given else ["--cache", str(_caches())]
    config = parse(TrainConfig, ["--output_dir", OUTPUT, *own, *trains], PROG, refused())
    if len(config.samples.cache) > 1:
        raise SettingsError(
            f"--cache {' '.join(config.samples.cache)}: expected one, for the dataset to be encoded to; to train on "
            "several, encode each dataset by itself and name their caches alone"
        )
    encoding = parse(EncodeConfig, [*own, *encodes], "ip2p-encode")
    if own:
        place = place_of(encoding)
        return changed(encoding, cache=place), changed(config, cache=(str(place),))
    return encoding, config


def look(encoding: EncodeConfig | None, config: TrainConfig) -> None:
    """Look at the places that the flags name, before torch is imported, which takes seconds.

    Raises Ip2pError: a cache, a model or a dataset is not there, or there is no place for what comes out.
    """
    check_folder(config.saving.output_dir, "--output_dir")
    if encoding:
        check_place(encoding.dataset, config.saving.output_dir, "--output_dir")
        return early.check(encoding)
    for place in config.samples.cache:
        if not is_url(place):
            check_cache(Path(place))
    if name := config.model.pretrained_model_name_or_path:
        check_name(name, "", "--pretrained_model_name_or_path")


def place_of(encoding: EncodeConfig) -> Path:
    """Where the cache of an encode lies if nobody says: a folder for each dataset, model and geometry.

    All flags that decide what a cache holds are part of its name, but for those at their defaults: so whatever flag is
    added to them changes no name.
    """
    groups = encoding.model, encoding.dataset, encoding.pictures, encoding.run
    flags = [(field, getattr(group, field.name)) for group in groups for field in dataclasses.fields(group)]
    given = {field.name: value for field, value in flags if value != field.default and field.name not in UNDECIDED}
    decide = {name: _found(value) if name in PLACES else value for name, value in given.items()}
    decide["resize_mode"] = encoding.pictures.resizing  # whichever flag says so
    key = content_key(json.dumps(decide, sort_keys=True).encode())
    names = decide.get("dataset_name") or decide["train_data_dir"], decide["pretrained_model_name_or_path"]
    shown = "-".join(re.sub(r"[^\w.-]+", "_", Path(name).name, flags=re.ASCII)[:40] for name in names)
    return _caches() / f"{shown}-{encoding.pictures.resolution}-{key[:16]}"


def _caches() -> Path:
    """Where caches lie whose place nobody names, as https://specifications.freedesktop.org/basedir says."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "ip2p" / "caches"


def _found(place: str | Path) -> str:
    """A name that says the same in every folder: a path of this machine whole, another as it is."""
    here = os.path.exists(place) or (in_tars(str(place)) and "://" not in str(place))
    return os.path.realpath(place) if here else str(place)


def _name(argument: str) -> str | None:
    """The name of the flag that an argument is, if it is one."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else None


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `ip2p-encode` with their values, and those of `ip2p-train`, to which is left what neither knows."""
    known, given = (flags_of(EncodeConfig), flags_of(TrainConfig)), set(map(_name, arguments))
    encodes, trains = list[str](), list[str]()
    theirs, ours = False, True
    for argument in arguments:
        if name := _name(argument):
            theirs, ours = (name in flags or name.removeprefix("no_") in flags for flags in known)
            if beside := EITHER.get(name):
                theirs, ours = (flag in given for flag in beside)
        encodes += [argument] * theirs
        trains += [argument] * (ours or not theirs)
    return encodes, trains
