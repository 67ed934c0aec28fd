"""The whole encode in order: plan what is missing, encode it, settle the table of samples."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from .base.errors import CacheError, CacheMismatch, SettingsError, SourceError
from .cache.format import Cache, Unit, shard_rows
from .cache.views import View, joined_views
from .cache.writer import exclusive, needed_bytes, prepare, share, write_state
from .config import EncodeConfig
from .data.sources import Source, open_source
from .manifest import describe, differences, row_shapes
from .models.checkpoint import Checkpoint
from .origin import named_checkpoint
from .planner import assign, index, mark_flips, missing, settle


def encode(config: EncodeConfig) -> None:
    """Encode what the cache lacks of the dataset, on any number of processes, and say what was done.

    Raises:
        Ip2pError: anything the user can mend.
    """
    # Without a GPU accelerate counts every process as the only one, unless it is told that the CPU is meant.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=timedelta(days=7))  # planning or a last shard may keep the others waiting long
    with state.main_process_first():
        checkpoint = named_checkpoint(config)
        check_resolution(config.resolution, checkpoint.vae_scale_factor)
        source = open_source(config)
    main = state.is_main_process
    with exclusive(config.cache) if main else nullcontext() as lock:
        if lock:
            plan(config, source, checkpoint, state.num_processes)
            share(lock)
        state.wait_for_everyone()
        with nullcontext() if main else exclusive(config.cache, shared=True):
            encode_missing(config, source, checkpoint, state)
            state.wait_for_everyone()
        state.destroy_process_group()  # here alone: NCCL waits for all processes, so one that fails must not do it
        if main:
            finish(Cache.open(config.cache))


def check_resolution(resolution: int, factor: int) -> None:
    """Refuse a resolution that the VAE cannot divide."""
    if resolution % factor:
        lower = resolution // factor * factor
        near = f"{lower} or {lower + factor}" if lower else str(factor)
        raise SettingsError(f"--resolution {resolution}: this VAE needs a multiple of {factor}, such as {near}")


def plan(config: EncodeConfig, source: Source, checkpoint: Checkpoint, processes: int) -> None:
    """Write which sample goes where: the manifest, and a samples table of which a part is pending."""
    old = open_existing(config)
    manifest = describe(config, source, checkpoint, processes)
    shapes = row_shapes(checkpoint, config.resolution)
    rows = manifest["shard_rows"] = {kind: shard_rows(kind, arrays.values())[0] for kind, arrays in shapes.items()}
    if old:
        check_same(old, manifest)
        manifest["views"] = joined_views(old.views, manifest["views"])  # what is there stays, and what is new gets it
    views, commits = len(manifest["views"]), old.commits() if old else {}
    samples = known_samples(old, manifest)
    if samples is None or (config.retry_quarantined and -1 in samples["row"].to_pylist()):  # never tried: out of reach
        samples = index(source, workers(config))
    samples = mark_flips(assign(samples, commits, rows, retry=config.retry_quarantined), config.no_flip_regex)
    samples = settle(samples, commits, rows, views)
    if config.on_error == "fail":
        stop_at_quarantined(samples)
    announce(config, samples, needed_bytes(missing(samples, commits, rows, views), shapes))
    prepare(config.cache, shapes, samples, commits, views)
    write_state(config.cache, manifest | {"counts": counts(samples)}, samples)


def open_existing(config: EncodeConfig) -> Cache | None:
    """The cache as it is, or None where there is none yet."""
    folder = config.cache
    if (folder / "manifest.json").is_file():
        return Cache.open(folder)
    if any((folder / "commits").glob("*.json")):
        raise CacheError(f"{folder}/manifest.json is missing: restore it, or delete {folder} to encode anew")
    own = ("commits", "data.zarr", "samples.parquet")  # of an encode that was killed before it wrote its manifest
    if stray := [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith(".")]:
        raise CacheError(f"--cache {folder} holds other files ({stray[0]}, …): name a new or an empty folder")
    return None


def check_same(old: Cache, manifest: dict[str, Any]) -> None:
    """Refuse to mix two encodings in one cache, and say where they differ.

    Raises:
        CacheMismatch: the cache was made by another model or with other settings.
    """
    if different := differences(old.manifest, manifest, ("identity", "encoding"), ("in the cache", "asked for")):
        raise CacheMismatch(
            f"{old.folder} was encoded differently: name another folder with --cache, or encode as it was made\n"
            + "\n".join(different)
        )


def known_samples(old: Cache | None, manifest: dict[str, Any]) -> pa.Table | None:
    """The samples table of an earlier run over the very same dataset, if it is sound."""
    if not old or old.manifest["dataset"] != manifest["dataset"]:
        return None
    try:
        old.check_files()
    except CacheError:
        return None
    return old.samples()


def workers(config: EncodeConfig) -> int:
    """Processes that read images, for each process that encodes: it keeps one of its share of the cores."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(0, cores - 1)) if config.dataloader_num_workers is None else config.dataloader_num_workers


def counts(samples: pa.Table) -> dict[str, int]:
    """Samples by status."""
    return dict(Counter(samples["status"].to_pylist()))


def stop_at_quarantined(samples: pa.Table) -> None:
    """For --on_error fail: stop at the first sample that stands aside before anything is encoded."""
    for key, reason in zip(samples["key"].to_pylist(), samples["reason"].to_pylist(), strict=True):
        if reason:
            raise SourceError(f"sample {key}: {reason} (--on_error quarantine would go on without it)")


def announce(config: EncodeConfig, samples: pa.Table, needed: int) -> None:
    """Say how much is to be done and what it takes on the disk.

    Raises:
        CacheError: less is free than needed.
    """
    pending = counts(samples).get("pending", 0)
    if not pending:
        return
    free = shutil.disk_usage(config.cache).free
    size = f"{needed / 2**20:,.0f} MiB ({needed / pending / 2**10:,.0f} KiB each)"
    print(f"{pending:,} of {len(samples):,} samples to encode: {size} in {config.cache}, {free / 2**30:,.1f} GiB free")
    if needed > free:
        raise CacheError(f"{config.cache} needs {size}, {free / 2**20:,.0f} MiB are free: make space or move --cache")


def encode_missing(config: EncodeConfig, source: Source, checkpoint: Checkpoint, state: PartialState) -> None:
    """Encode this process's share of the missing units."""
    cache = Cache.open(config.cache)
    null = cache.folder / "commits" / f"{Unit('text', 0).name}.json"  # with the empty instruction, which is no sample's
    if "pending" not in cache.manifest["counts"] and null.is_file():
        return
    work = list(missing(cache.samples(), cache.commits(), cache.shard_rows, len(cache.views)))
    mine = work[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # a record written earlier would deal out the work in another way to those still here
    if not mine:
        return
    from .models.encoders import DTYPES, Encoders  # seconds to import, and a finished cache needs no encoders
    from .pipeline import Pipeline

    vae_precision = cache.manifest["encoding"]["vae_precision"]
    if vae_precision != (config.vae_precision or config.mixed_precision) and state.is_main_process:
        print("the VAE runs in float32, since this one overflows in half precision (--vae_precision decides otherwise)")
    pipeline = Pipeline(
        cache,
        Encoders(
            checkpoint, torch.device(state.device or "cpu"), DTYPES[config.mixed_precision], DTYPES[vae_precision]
        ),
        batch_size=config.encode_batch_size,
        workers=workers(config),
        fail=config.on_error == "fail",
    )
    rows = sum(len(rows) for _, rows in mine)
    with tqdm(total=rows, desc="encode", unit="row", disable=not state.is_local_main_process) as bar:
        pipeline.run(mine, source, bar)


def finish(cache: Cache) -> None:
    """Settle the samples table and say what the cache holds now."""
    before, samples = cache.manifest["counts"], cache.samples()
    if "pending" in before:  # otherwise planning has settled it a moment ago
        samples = settle(samples, cache.commits(), cache.shard_rows, len(cache.views))
    found = counts(samples)
    if found != before:
        write_state(cache.folder, cache.manifest | {"counts": found}, samples)
    if pending := found.get("pending", 0):
        raise CacheError(f"{pending:,} samples are still missing in {cache.folder}: run the same command again")
    fresh = found.get("ok", 0) - before.get("ok", 0)
    done = f"encoded {fresh:,} samples" if before.get("pending") else "nothing to encode"
    print(f"{done}: {cache.folder} holds all {found.get('ok', 0):,} samples of {cache.manifest['dataset']['name']}")
    for remark in remarks(cache, samples):
        print(remark)
    if quarantined := found.get("quarantined", 0):
        print(f"{quarantined:,} samples stand aside, `ip2p-cache info {cache.folder} --quarantined` lists them:")
        for reason, count in Counter(filter(None, samples["reason"].to_pylist())).most_common(10):
            print(f"  {count:,} x {reason}")


def remarks(cache: Cache, samples: pa.Table) -> Iterator[str]:
    """What the shapes and instructions of the samples mean for training."""
    views = [View.parse(name) for name in cache.views]
    samples = samples.filter(samples["status"].to_numpy() == "ok")
    width, height = samples["original_width"].to_numpy(), samples["original_height"].to_numpy()
    equal = (width == samples["edited_width"].to_numpy()) & (height == samples["edited_height"].to_numpy())
    if different := (~equal).sum():
        yield f"{different:,} pairs have images of two sizes: the edited one was fitted to the original's shape"
    if len(views) > 1 and views[0].crop is not None and (square := (width == height).sum()):
        yield f"{square:,} originals are square: all their crops are the same"
    if any(view.flip for view in views) and (kept := (~samples["flip"].to_numpy()).sum()):
        yield f"{kept:,} instructions match --no_flip_regex: training does not flip these samples"
