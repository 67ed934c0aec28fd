"""Which sample goes where: what the cache holds stays, what the dataset has beyond that gets free rows."""

import dataclasses
import itertools
import math
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch.utils.data import DataLoader

from .base.console import bar, say
from .base.errors import CacheError, CacheMismatch, SampleError, SourceError
from .base.files import content_key, storable
from .base.flags import dump
from .cache.format import (
    CONVENTION,
    SAMPLES,
    TEXT_ALONE,
    Cache,
    RowShapes,
    differences,
    joined_views,
    row_shapes,
    shard_rows,
    view_names,
)
from .cache.samples import Ledger, counts
from .config import EncodeConfig
from .data.pairs import Pair, Pairs, unusable
from .geometry import Geometry
from .models.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a cache shall hold.

    Attributes:
        manifest: what is encoded, with what, how.
        shapes: of one row of each array.
        samples: all samples with their rows; those that the ledger lacks are pending.
        ledger: what is committed already.
    """

    manifest: dict[str, Any]
    shapes: RowShapes
    samples: pa.Table
    ledger: Ledger

    def needed_bytes(self) -> int:
        """Bytes that the missing units take on the disk; each reaches to the chunk of its last row."""
        needed = 0
        for units, rows in self.ledger.missing(self.samples):
            shapes = self.shapes[units[0].kind].values()
            shard, chunk = shard_rows(units[0].kind, shapes)
            chunks = max(rows) % shard // chunk + 1
            needed += len(units) * chunks * chunk * sum(2 * math.prod(shape) for shape in shapes)
        return needed

    def announce(self, config: EncodeConfig) -> None:
        """Say how much is to be done and what it takes on the disk; a `CacheError` if less is free."""
        pending, needed = counts(self.samples).get("pending", 0), self.needed_bytes()
        if not pending:
            return
        free = shutil.disk_usage(config.cache).free
        size = f"{needed / 2**20:,.0f} MiB ({needed / pending / 2**10:,.0f} KiB each)"
        work = f"{pending:,} of {len(self.samples):,} samples to encode"
        say(f"{work}: {size} in {config.cache}, {free / 2**30:,.1f} GiB free")
        if needed > free:
            mend = "make space or move --cache"
            raise CacheError(f"{config.cache} needs {size}, {free / 2**20:,.0f} MiB are free: {mend}")
        if self.manifest["encoding"]["vae_precision"] != (config.run.vae_precision or config.run.mixed_precision):
            why = "since this one overflows in half precision (--vae_precision decides otherwise)"
            say(f"the VAE runs in float32, {why}")


def make_plan(config: EncodeConfig, source: Pairs, checkpoint: Checkpoint, processes: int) -> Plan:
    """Join a dataset with what the cache holds.

    Raises:
        CacheError: the folder holds something else, or is damaged.
        CacheMismatch: it was encoded by another model or with other settings.
        SourceError: a sample cannot be encoded, and `on_error` is fail.
    """
    retry, pictures = config.run.retry_quarantined, Geometry.of(encoding(config, checkpoint))
    cells = pictures.cells(checkpoint.vae_scale_factor)
    shapes = row_shapes(checkpoint.latent_channels, cells, *checkpoint.text_shape())
    old, manifest = open_existing(config.cache), describe(config, source, checkpoint, shapes, processes)
    if old:
        if lines := differences(old.manifest, manifest, ("identity", "encoding"), ("in the cache", "asked for")):
            mend = "name another folder with --cache, or encode as it was made"
            raise CacheMismatch("\n".join([f"{old.folder} was encoded differently: {mend}", *lines]))
        manifest["views"] = joined_views(old.views, manifest["views"])  # what is there stays, and what is new gets it
    commits = old.commits() if old else {}
    ledger = Ledger(commits, manifest["shard_rows"], len(manifest["views"]), config.run.cache_text)
    samples = known_samples(old, manifest, retry) if old else None
    if samples is None:
        samples = identify(source, pictures, workers(config))
    samples = ledger.assign(samples, retry=retry)
    samples = ledger.settle(mark_flips(samples, config.pictures.no_flip_regex))
    if config.run.on_error == "fail" and (aside := samples.filter(samples["reason"].is_valid()).to_pylist()):
        why = f"{aside[0]['reason']} (--on_error quarantine would go on without it)"
        raise SourceError(f"sample {aside[0]['key']}: {why}")
    return Plan(manifest, shapes, samples, ledger)


def describe(
    config: EncodeConfig, source: Pairs, checkpoint: Checkpoint, shapes: RowShapes, processes: int
) -> dict[str, Any]:
    """The manifest: what is encoded, with what, how."""
    model, pictures = config.model, config.pictures
    return {
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
        "encoding": encoding(config, checkpoint),
        "vae_scale_factor": checkpoint.vae_scale_factor,
        "views": view_names(pictures.crops if pictures.resizing == "random_crop" else None, pictures.random_flip),
        "dataset": {
            "name": source.name,
            "split": config.dataset.split,
            "columns": list(source.columns),
            "samples": len(source),
            "fingerprint": source.fingerprint(),
        },
        "settings": dump(config) | {"processes": processes},  # how this run was started; decides nothing
        "shard_rows": {kind: shard_rows(kind, arrays.values())[0] for kind, arrays in shapes.items()},
    }


def encoding(config: EncodeConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """How pictures and instructions are encoded, in which all that a cache holds must agree."""
    pictures, run = config.pictures, config.run
    return {
        "convention": CONVENTION,
        "resolution": pictures.resolution,
        "bucket_step": pictures.bucket_step,
        "resize_mode": pictures.resizing,
        "background": pictures.background,
        "mixed_precision": run.mixed_precision,
        "vae_precision": checkpoint.vae_precision(run.vae_precision, run.mixed_precision),
        "text": None if run.cache_text else TEXT_ALONE,
    }


def open_existing(folder: Path) -> Cache | None:
    """The cache as it is, None where none is yet; a `CacheError` if its manifest is gone or it is something else."""
    if (folder / "manifest.json").is_file():
        return Cache.open(folder)
    if any((folder / "commits").glob("*.json")):
        raise CacheError(f"{folder}/manifest.json is missing: restore it, or delete {folder} to encode anew")
    own = ("commits", "data.zarr", "samples.parquet")  # of an encode that was killed before it wrote its manifest
    if stray := [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(".")]:
        raise CacheError(f"--cache {folder} holds other files ({stray[0]}, …): name a new or an empty folder")
    return None


def known_samples(old: Cache, manifest: dict[str, Any], retry: bool) -> pa.Table | None:
    """The samples table of an earlier run over the very same dataset, if it is sound.

    To `retry` what was out of reach when it was read (row -1), it must be read again.
    """
    if old.manifest["dataset"] != manifest["dataset"]:
        return None
    try:
        old.check_files()
    except CacheError:
        return None
    samples = old.samples()
    return None if retry and -1 in samples["row"].to_pylist() else samples


def identify(source: Pairs, geometry: Geometry, workers: int, batch_size: int = 64) -> pa.Table:
    """Read every sample once, in `workers` processes; returns the samples table, in which no sample has a row yet."""
    positions: Any = range(len(source))
    loader = DataLoader(positions, batch_size, num_workers=workers, collate_fn=partial(_identities, source, geometry))
    rows = itertools.chain.from_iterable(loader)
    shown = bar(rows, "identify samples", "pair", total=len(source), leave=True)
    return pa.Table.from_pylist(list(shown), schema=SAMPLES)


def _identities(source: Pairs, geometry: Geometry, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the samples table, made where the images are read: in worker processes."""
    rows = []
    for position in positions:
        try:
            pair = source[position]
            reason = unusable(pair)
        except SampleError as error:
            pair, reason = Pair(None, None, ""), str(error)
        key = content_key(pair.original or b"", pair.edited or b"")
        text = pair.instruction if isinstance(pair.instruction, str) else repr(pair.instruction)
        instruction, group = storable(text), source.group(position)
        row = {"key": content_key(key.encode(), instruction.encode()), "pair": key, "position": position}
        row |= {"instruction": instruction, "group": group, "row": -1, "text_row": -1}
        row |= geometry.planned(pair.original or b"")._asdict()
        rows.append(row | {"status": "quarantined" if reason else "pending", "reason": reason})
    return rows


def mark_flips(samples: pa.Table, pattern: str) -> pa.Table:
    """Note which samples may be shown flipped: those whose instruction does not match `pattern`, if it is not none."""
    never = re.compile(pattern, re.IGNORECASE) if pattern not in ("none", "") else None
    flip = [not (never and never.search(instruction)) for instruction in samples["instruction"].to_pylist()]
    return samples.set_column(samples.column_names.index("flip"), "flip", pa.array(flip, pa.bool_()))


def workers(config: EncodeConfig) -> int:
    """Processes that read images, for each process that encodes: it keeps one of its share of the cores."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = config.run.dataloader_num_workers
    return min(16, max(0, cores - 1)) if given is None else given
