"""What a run tells others of itself: what it was trained on and with, and no place on this machine."""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load

from ...encode.cache.format import Cache
from ...encode.cached import Samples
from ...encode.models.checkpoint import Checkpoint
from ...encode.models.hub import is_hub_id
from ..config import TrainConfig
from .resume import SETTINGS

URL, OF_THIS_MACHINE = re.compile(r"\S+://\S+"), re.compile(r"(^|::)(file:|[/~])")
SECRETS = re.compile(r"(?<=://)[^/@]*@|[?#].*")  # of a url: user and password, query, fragment
FOLDERS = re.compile(r"(?:file://|(?<![\w:/.])~?)/(?:[^\s'\"/]+/)+")  # before the name of a file, within a text
DATASET_URL = re.compile(r"(?:hf://|huggingface\.co/)datasets/([\w.-]+/[\w.-]+)")


def public(value: Any) -> Any:
    """The value of a flag as others may see it.

    Of what lies on this machine it is the last part of the name; of a url that without passwords and keys; all else
    stays as it is.
    """
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    url, here = URL.fullmatch(value), OF_THIS_MACHINE.search(value)
    if url and not here:
        return SECRETS.sub("", value)
    if here or os.path.exists(value) or re.fullmatch(r"\S+/\S+/\S+", value):  # a Hub id has one slash at most
        return Path(value).resolve().name
    return FOLDERS.sub("", value)


def settings(output_dir: Path) -> dict[str, Any]:
    """The flags that a run has recorded, as others may see them."""
    recorded: dict[str, Any] = yaml.safe_load((output_dir / SETTINGS).read_text(encoding="utf-8"))
    return {name: public(value) for name, value in recorded.items()}


def told(before: str, caches: Sequence[Cache], samples: Samples, held_out: Samples, *, trains: bool) -> str:
    """What checkpoints keep for the card of a pipeline that is made of them, now or later: as JSON, all or nothing.

    That are the versions that trained, in turn; of each dataset its name, whether that is a Hub id, how many samples
    are trained on and held out, and the version that encoded them; and how many shapes pictures have.

    Args:
        before: what the checkpoint has told; empty without one, or in one of an older version.
        trains: whether this run trains at all; what is told of another one is not changed.
    """
    if before and not trains:
        return before
    versions: list[str] = json.loads(before)["versions"] if before else []
    now = ", ".join(f"{name} {version(name)}" for name in ("ip2p", "torch", "diffusers"))
    if trains and versions[-1:] != [now]:
        versions.append(now)
    counts = [np.bincount(part.caches, minlength=len(caches)).tolist() for part in (samples, held_out)]
    data = []
    for cache, trained, held in zip(caches, *counts, strict=True):
        name, on_hub = dataset(cache.manifest)
        encoder = f"ip2p {cache.manifest['ip2p']}"
        data.append({"name": name, "on_hub": on_hub, "trained": trained, "held_out": held, "encoder": encoder})
    return json.dumps({"versions": versions, "data": data, "shapes": len(samples.by_shape())})


def dataset(manifest: Mapping[str, Any]) -> tuple[str, bool]:
    """The name of the dataset in a cache, and whether that is its Hub id; of a local one it is the name alone."""
    name, flags = str(manifest["dataset"]["name"]), manifest.get("settings", {})
    if found := DATASET_URL.search(name):
        return found[1], True
    # Older versions did not record it; then a folder that is not here may look like an id.
    if flags.get("dataset_on_hub", is_hub_id(name) and not flags.get("train_data_dir")):
        return name, True
    return public(name) if URL.fullmatch(name) else Path(name).name, False


def licence(config: TrainConfig, base: Checkpoint) -> dict[str, Any]:
    """The licence of a pipeline as the Hub's metadata have it, `license` and perhaps name and link.

    It is that of --hub_license, or else of the card of the base, in its folder or on the Hub; empty where nobody says.
    """
    if config.saving.hub_license:
        return {"license": config.saving.hub_license}
    model, found = config.model, dict[str, Any]()
    name = model.pretrained_model_name_or_path
    with contextlib.suppress(Exception):  # there is no card, or no answer: what is trained is good without
        place: Any = base.folder / "README.md"
        if is_hub_id(name):
            place = hf_hub_download(name, "README.md", revision=model.revision, cache_dir=model.cache_dir)
        found = metadata_load(place) or {}
    link = str(found.get("license_link"))
    found["license_link"] = link if URL.fullmatch(link) else None  # others lie beside the card of the base
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}
