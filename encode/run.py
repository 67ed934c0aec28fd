"""The whole encode in order: plan what is missing, encode it, settle the table of samples."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from .base.console import bar, say
from .base.errors import CacheError
from .cache.commits import pc
from .cache.format import Cache, Unit, View
from .cache.samples import Ledger, counts
from .cache.writer import exclusive, prepare, share, write_state
from .config import EncodeConfig
from .data.opening import open_pairs
from .data.pairs import Pairs
from .early import check
from .geometry import check_resolution, geometry_of
from .geometry import remarks as of_shapes
from .models.checkpoint import Checkpoint, find_checkpoint
from .planning.draft import begin
from .planning.index import FOLDER, JUDGED
from .planning.plan import make_plan, workers

if TYPE_CHECKING:
    from .scores import Scored

# Columns that something is said of in the end; the keys of a million samples take half a second to read.
SAID = ("status", "reason", "instruction", "flip", "crop_top", "crop_left")
SAID += ("original_width", "original_height", "edited_width", "edited_height")
EXAMPLE = 100  # letters of an instruction that is shown


def encode(config: EncodeConfig, *, last: bool = True) -> None:
    """Encode what the cache lacks of the dataset, on any number of processes, and say what was done.

    Args:
        last: whether the processes part then; else all of them wait until the cache is whole, and stay a group.
    """
    check(config)  # before anything is downloaded
    # Without a GPU accelerate counts every process as the only one, unless it is told that the CPU is meant.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=timedelta(days=7))  # planning or a last shard may keep the others waiting long
    geometry = geometry_of(config)
    with state.main_process_first():
        checkpoint = find_checkpoint(config.model, without=("unet",))
        check_resolution(geometry, checkpoint.vae_scale_factor)
        source = open_pairs(config.dataset, config.model.cache_dir, config.scores)
    main = state.is_main_process
    say(*of_shapes(geometry, checkpoint.vae_scale_factor, halvings=2 if checkpoint.is_sdxl else 3))
    with exclusive(config.cache) if main else nullcontext() as lock:
        draft = begin(config, source, checkpoint, state.num_processes) if main else None
        left = bool(draft) and not draft.is_finished(config)
        kept = source.kept() if left and config.dataset.keep_columns else {}  # before hours of reading pictures
        (index,) = broadcast_object_list([draft and draft.index(config)])  # what the first process finds
        if index:
            index.make(source, workers(config), state.process_index, state.num_processes)
            state.wait_for_everyone()
        if draft and lock:
            if left:
                plan = make_plan(config, draft, index)
                plan.announce(config)
                samples = source.with_kept(plan.samples, kept) if kept else plan.samples
                prepare(config.cache, plan.shapes, samples, plan.ledger)
                write_state(config.cache, plan.manifest, samples, plan.ledger.commits)
            shutil.rmtree(config.cache / FOLDER, ignore_errors=True)
            share(lock)
        state.wait_for_everyone()
        with nullcontext() if main else exclusive(config.cache, shared=True):
            encode_missing(config, source, checkpoint, state)
            state.wait_for_everyone()
            scored = None
            if config.scores.pair_scores:
                from .scores import judge_pairs  # CLIP takes seconds to import

                scored = judge_pairs(config, source, state)
        if last:
            state.destroy_process_group()  # here alone: NCCL waits for all processes, so one that fails must not do it
        if main:
            finish(Cache.open(config.cache), checkpoint, scored)
    if not last:
        state.wait_for_everyone()


def encode_missing(config: EncodeConfig, source: Pairs, checkpoint: Checkpoint, state: PartialState) -> None:
    """Encode this process's share of the missing units."""
    cache = Cache.open(config.cache)
    null = cache.folder / "commits" / f"{Unit('text', 0).name}.json"  # with the empty instruction, which is no sample's
    if "pending" not in cache.manifest["counts"] and null.is_file():
        return
    mine = list(Ledger.of(cache).missing(cache.samples()))[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # a record written earlier would deal out the work in another way to those still here
    if not mine:
        return
    from .models.encoders import DTYPES, Encoders  # seconds to import, and a finished cache needs no encoders
    from .pipeline import Pipeline

    precisions = [cache.manifest["encoding"][name] for name in ("mixed_precision", "vae_precision")]
    encoders = Encoders(checkpoint, torch.device(state.device or "cpu"), *(DTYPES[name] for name in precisions))
    fail = config.run.on_error == "fail"
    pipeline = Pipeline(cache, encoders, batch_size=config.run.encode_batch_size, workers=workers(config), fail=fail)
    with bar(None, "encode", "row", total=sum(len(rows) for _, rows in mine), leave=True) as progress:
        pipeline.run(mine, source, progress.update)


def finish(cache: Cache, checkpoint: Checkpoint, scored: "Scored | None" = None) -> None:
    """Settle the samples table, with what was found of all pairs, and say what the cache holds now."""
    found = before = cache.manifest["counts"]
    changed = "pending" in before or scored is not None  # otherwise planning has settled it a moment ago
    samples = cache.samples(*(() if changed else SAID))
    if changed:
        ledger, manifest = Ledger.of(cache), cache.manifest
        if scored:
            samples, manifest = scored.join(samples), manifest | {"pair_scores": scored.judge}
        samples = ledger.settle(samples)
        write_state(cache.folder, manifest, samples, ledger.commits)
        found = counts(samples)
    if scored:
        shutil.rmtree(cache.folder / JUDGED, ignore_errors=True)
    if pending := found.get("pending", 0):
        raise CacheError(f"{pending:,} samples are still missing in {cache.folder}: run the same command again")
    fresh = found.get("ok", 0) - before.get("ok", 0)
    done = f"encoded {fresh:,} samples" if before.get("pending") else "nothing to encode"
    say(f"{done}: {cache.folder} holds all {found.get('ok', 0):,} samples of {cache.manifest['dataset']['name']}")
    say(*remarks(cache, samples, checkpoint))
    if quarantined := found.get("quarantined", 0):
        say(f"{quarantined:,} samples stand aside, `ip2p-cache info {cache.folder} --quarantined` lists them:")
        reasons = Counter(samples["reason"].drop_null().to_pylist()).most_common(10)
        say(*(f"  {count:,} x {reason}" for reason, count in reasons))


def remarks(cache: Cache, samples: pa.Table, checkpoint: Checkpoint) -> Iterator[str]:
    """What the shapes and instructions of the samples mean for training."""
    views = [View.parse(name) for name in cache.views]
    whole = pc.equal(samples["status"], "ok")
    samples = samples if pc.all(whole).as_py() else samples.filter(whole)  # which copies all of it
    # No token is shorter than a byte: most instructions need none of the seconds that it takes to import a tokenizer.
    room = checkpoint.text_shape()[0] - 2  # between the tokens that begin and end an instruction
    texts = samples["instruction"].unique()
    texts = texts.filter(pc.or_(pc.greater(pc.binary_length(texts), room), pc.invert(pc.string_is_ascii(texts))))
    if long := [text for text in texts.to_pylist() if len(text.lower().encode()) > room]:
        from .models.encoders import cut_short

        if cut := cut_short(checkpoint, long):
            example = cut[0] if len(cut[0]) <= EXAMPLE else f"{cut[0][:EXAMPLE]} …"
            yield f"{len(cut):,} instructions are too long: the text encoder does not see their ends, as in {example!r}"
    width, height = samples["original_width"].to_numpy(), samples["original_height"].to_numpy()
    equal = (width == samples["edited_width"].to_numpy()) & (height == samples["edited_height"].to_numpy())
    if different := (~equal).sum():
        yield f"{different:,} pairs have images of two sizes: the edited one was fitted to the original's shape"
    if sum(seen := [view.crop is not None and not view.flip for view in views]) > 1:
        places = [samples[name].combine_chunks().flatten().to_numpy() for name in ("crop_top", "crop_left")]
        crops = np.stack(places).reshape(2, -1, len(views))[:, :, seen]  # (2, N, crops)
        if same := (crops == crops[:, :, :1]).all(axis=(0, 2)).sum():
            yield f"{same:,} originals have no more than is shown: all their crops are the same"
    if any(view.flip for view in views) and (kept := (~samples["flip"].to_numpy()).sum()):
        yield f"{kept:,} instructions match --no_flip_regex: training does not flip these samples"
