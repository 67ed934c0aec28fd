"""What a cache shall be and what it is: all that can be told before the dataset is read."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..base.errors import CacheError, CacheMismatch
from ..base.files import IRREPLACEABLE
from ..base.flags import dump
from ..cache.commits import unit_of
from ..cache.format import CONVENTION, FORMAT, Cache, differences, joined_views, shard_rows, view_names
from ..cache.shapes import RowShapes, row_shapes
from ..cache.tables import SAMPLES_FILE, SHARDS_FILE
from ..config import EncodeConfig
from ..data.pairs import Pairs
from ..geometry import Geometry, geometry_of
from ..models.checkpoint import Checkpoint
from ..models.hub import is_hub_id
from .index import Index


@dataclasses.dataclass(frozen=True)
class Draft:
    """What is known before the dataset is read.

    Attributes:
        manifest: what is encoded, with what, how.
        shapes: of one row of each array.
        old: the cache as it is, if there is one.
        known: whether `old` knows this very dataset, and all its small files are sound.
    """

    manifest: dict[str, Any]
    shapes: RowShapes
    old: Cache | None
    known: bool

    def index(self, config: EncodeConfig) -> Index | None:
        """What is to be read of the dataset before a plan can be made: nothing where it is known."""
        if self.known:
            return None
        dataset, geometry = self.manifest["dataset"], Geometry.of(self.manifest["encoding"])
        found = Index(config.cache, dataset["fingerprint"], dataset["samples"], geometry)
        if config.run.retry_quarantined:
            found.forget_failures()
        return found

    def is_finished(self, config: EncodeConfig) -> bool:
        """Whether the very same encode was here before and left nothing to do."""
        if not (self.old and self.known):
            return False
        state = {name: self.old.manifest[name] for name in ("counts", "files", "kept") if name in self.old.manifest}
        again = config.run.retry_quarantined or config.run.on_error == "fail"
        left = {"pending", "quarantined"} if again else {"pending"}
        if self.old.manifest != self.manifest | state or left & state["counts"].keys():
            return False
        return set(map(unit_of, self.old.shards())) == set(self.old.units())


def begin(config: EncodeConfig, source: Pairs, checkpoint: Checkpoint, processes: int) -> Draft:
    """Look at what the cache holds.

    Raises:
        CacheError: the folder holds something else, or is damaged.
        CacheMismatch: it was encoded by another model or with other settings.
    """
    cells = geometry_of(config).cells(checkpoint.vae_scale_factor)
    shapes = row_shapes(checkpoint.latent_channels, cells, *checkpoint.text_shape(), masks=source.masks)
    old, manifest = open_existing(config.cache), describe(config, source, checkpoint, shapes, processes)
    if not old:
        return Draft(manifest, shapes, None, known=False)
    other = "name another folder with --cache"
    if lines := differences(old.manifest, manifest, ("identity", "encoding"), ("in the cache", "asked for")):
        flag = f" (--{'' if old.holds_text else 'no_'}cache_text)" if old.holds_text != config.run.cache_text else ""
        mend = f"{other}, or encode as it was made{flag}"
        raise CacheMismatch("\n".join([f"{old.folder} was encoded differently: {mend}", *lines]))
    if old.manifest.get("masks", False) != manifest["masks"]:
        has, mend = ("has none", "leave out") if manifest["masks"] else ("has some", "give")
        raise CacheMismatch(
            f"a cache has masks from its beginning on, {old.folder} {has}: {mend} --mask_column, or {other}"
        )
    manifest["views"] = joined_views(old.views, manifest["views"])  # what is there stays, and what is new gets it
    manifest["shard_rows"] = old.shard_rows
    manifest |= {name: old.manifest[name] for name in ("pair_scores",) if name in old.manifest}
    known = old.manifest["dataset"] == manifest["dataset"] and old.is_sound()
    if known and config.run.retry_quarantined:  # what was out of reach when it was read must be read again
        known = -1 not in old.samples("row")["row"].to_pylist()
    return Draft(manifest, shapes, old, known)


def describe(
    config: EncodeConfig, source: Pairs, checkpoint: Checkpoint, shapes: RowShapes, processes: int
) -> dict[str, Any]:
    """The manifest: what is encoded, with what, how."""
    model, pictures, run = config.model, config.pictures, config.run
    return {
        "format": FORMAT,
        "ip2p": version("ip2p"),
        "model": {
            "name": model.pretrained_model_name_or_path,
            "revision": model.revision,
            "variant": model.variant,
            "vae": model.pretrained_vae_model_name_or_path,
            "single_file_config": model.single_file_config,
            "prediction_type": checkpoint.prediction_type(),
        },
        "identity": checkpoint.identity(),
        "encoding": {
            "convention": CONVENTION,
            "resolution": pictures.resolution,
            "bucket_step": pictures.bucket_step,
            "resize_mode": pictures.resizing,
            "background": pictures.background,
            "mixed_precision": run.mixed_precision,
            "vae_precision": checkpoint.vae_precision(run.vae_precision, run.mixed_precision),
            "text": None if run.cache_text else "instructions alone",
        },
        "vae_scale_factor": checkpoint.vae_scale_factor,
        "masks": source.masks,
        "views": view_names(pictures.crops if pictures.resizing == "random_crop" else None, pictures.random_flip),
        "dataset": {
            "name": source.name,
            "split": config.dataset.split,
            "columns": list(source.columns),
            "samples": len(source),
            "fingerprint": source.fingerprint(),
        },
        # How this run was started, and what the dataset's name was then; decides nothing.
        "settings": dump(config) | {"processes": processes, "dataset_on_hub": is_hub_id(source.name)},
        "shard_rows": {kind: shard_rows(kind, arrays.values(), len(source)) for kind, arrays in shapes.items()},
    }


def open_existing(folder: Path) -> Cache | None:
    """The cache as it is, None where none is yet; a `CacheError` if its manifest is gone or it is something else."""
    if (folder / "manifest.json").is_file():
        return Cache.open(folder)
    if Cache(folder, {}).units():
        raise CacheError(f"{folder}/manifest.json is missing: {IRREPLACEABLE}")
    own = (
        "commits",
        "data.zarr",
        SAMPLES_FILE,
        SHARDS_FILE,
    )  # of an encode that was killed before it wrote its manifest
    if stray := [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(".")]:
        raise CacheError(f"--cache {folder} holds other files ({stray[0]}, …): name a new or an empty folder")
    return None
