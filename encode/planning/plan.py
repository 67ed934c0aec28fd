"""Which sample goes where: what the cache holds stays, what the dataset has beyond that gets free rows."""

import dataclasses
import math
import os
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from ..base.console import amount, say
from ..base.errors import CacheError, SourceError
from ..base.files import file_record
from ..base.system import cores
from ..cache.commits import pc
from ..cache.format import SAMPLES, Cache, chunk_rows
from ..cache.samples import NULL_PROMPT, Ledger, counts, text_key, text_keys, with_columns
from ..cache.shapes import RowShapes
from ..cache.tables import SAMPLES_FILE, SCORES, is_sealed
from ..config import NO_FLIP, EncodeConfig
from .draft import Draft
from .index import Index


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
            kind = units[0].kind
            shapes, shard = self.shapes[kind].values(), self.manifest["shard_rows"][kind]
            chunk = chunk_rows(kind, shard)
            chunks = max(rows) % shard // chunk + 1
            needed += len(units) * chunks * chunk * sum(2 * math.prod(shape) for shape in shapes)
        return needed

    def announce(self, config: EncodeConfig) -> None:
        """Say how much is to be done and what it takes on the disk; a `CacheError` if less is free."""
        pending, needed = counts(self.samples).get("pending", 0), self.needed_bytes()
        if not pending:
            return
        free = shutil.disk_usage(config.cache).free
        size = f"{amount(needed)} ({needed / pending / 2**10:,.0f} KiB each)"
        work = f"{pending:,} of {len(self.samples):,} samples to encode"
        say(f"{work}: {size} in {config.cache}, {amount(free)} free")
        if needed > free:
            mend = "make space or move --cache"
            raise CacheError(f"{config.cache} needs {size}, {amount(free)} are free: {mend}")
        if not config.run.vae_precision and self.manifest["encoding"]["vae_precision"] != config.run.mixed_precision:
            why = "since this one overflows in half precision (--vae_precision decides otherwise)"
            say(f"the VAE runs in float32, {why}")


def make_plan(config: EncodeConfig, draft: Draft, index: Index | None) -> Plan:
    """Join a dataset, as its `index` or the cache itself knows it, with what the cache holds.

    Raises:
        CacheError: the cache is damaged.
        SourceError: a sample cannot be encoded, and `on_error` is fail.
    """
    old, manifest = draft.old, draft.manifest
    ledger = Ledger(old.commits() if old else {}, manifest["shard_rows"], len(manifest["views"]))
    before: Any = known_samples(old, config) if old else None
    if before is None:
        manifest.pop("pair_scores", None)
    samples = index.read() if index else before
    if index and before:
        samples = carry(before, samples)
        if not pc.all(pc.is_in(samples["key"], before["key"].combine_chunks())).as_py():
            lacks = set(samples.column_names) - {*SAMPLES.names, *SCORES.names, *config.dataset.keep_columns}
            if lacks:
                say(f"new samples have nothing in {', '.join(sorted(lacks))}: --keep_columns gives it to them")
            if "pair_scores" in manifest and not config.scores.pair_scores:
                say("new samples have no scores: --pair_scores judges them")
    flips = config.pictures.no_flip_regex
    samples = placed(samples, ledger, flips, cache_text=config.run.cache_text, retry=config.run.retry_quarantined)
    if config.run.on_error == "fail" and (aside := samples.filter(samples["reason"].is_valid())[:1].to_pylist()):
        if index:
            index.forget_failures()  # whoever mends that begins with what is left
        why = f"{aside[0]['reason']} (--on_error quarantine would go on without it)"
        raise SourceError(f"sample {aside[0]['key']}: {why}")
    return Plan(manifest, draft.shapes, samples, ledger)


def placed(
    samples: pa.Table, ledger: Ledger, no_flip_regex: str, *, cache_text: bool = True, retry: bool = False
) -> pa.Table:
    """Samples with rows, flips and status, as a cache that the ledger knows has them or will have them."""

    def texts() -> pa.Array:
        # The empty instruction stands for all where instructions are kept alone.
        return text_keys(samples) if cache_text else pa.repeat(text_key(NULL_PROMPT), len(samples))

    with ThreadPoolExecutor(1) as beside:  # Arrow leaves Python's lock to the hashing of texts
        keys = beside.submit(texts)
        assigned = ledger.assign(samples, keys.result, retry=retry)
    return ledger.settle(mark_flips(assigned, no_flip_regex), keys.result())


def known_samples(old: Cache, config: EncodeConfig) -> pa.Table | None:
    """The table of a cache as its last encode wrote it, even if that was killed before it wrote the manifest.

    None where it is damaged; which columns are lost with it, beyond those that are asked for anew, is said.
    """
    given = config.dataset.keep_columns
    file, manifest = old.folder / SAMPLES_FILE, old.manifest
    if is_sealed(file) or (file.is_file() and file_record(file) == manifest["files"].get(SAMPLES_FILE)):
        return old.samples()
    flag = manifest["settings"].get("keep_columns", [])  # what is known where the manifest is of an earlier version
    kept = manifest.get("kept", [flag] if isinstance(flag, str) else flag)
    if lost := [name for name in kept if name not in given]:
        mend = f"--keep_columns {shlex.join([*lost, *given])} takes it from the dataset again"
        say(f"{file} is missing or damaged, and so is what it kept in {', '.join(lost)}: {mend}")
    if "pair_scores" in manifest and not config.scores.pair_scores:
        say(f"{file} is missing or damaged, and so are the scores of pairs: --pair_scores judges them again")
    return None


def carry(old: pa.Table, new: pa.Table) -> pa.Table:
    """The `new` samples, with what an `old` table of the cache says of them in columns that are not its own."""
    place = pc.index_in(new["key"], old["key"].combine_chunks())
    for name in old.column_names:
        if name not in new.column_names:
            new = new.append_column(old.field(name), old[name].take(place))
    return new


def mark_flips(samples: pa.Table, pattern: str) -> pa.Table:
    """Note which samples may be shown flipped: those whose instruction does not match `pattern`, if it is not none."""
    texts = samples["instruction"]
    found = np.zeros(len(texts), bool)
    if pattern not in ("none", ""):
        # Arrow's expressions are not Python's (what is part of a word beyond ASCII, `$`, ...), but ours means the same
        # to both, and takes Arrow a tenth of the time.
        ours = pc.string_is_ascii(texts).to_numpy() & (pattern == NO_FLIP)
        found = pc.match_substring_regex(texts, NO_FLIP, ignore_case=True).to_numpy().copy()
        never = re.compile(pattern, re.IGNORECASE)
        found[~ours] = [bool(never.search(text)) for text in texts.filter(pa.array(~ours)).to_pylist()]
    return with_columns(samples, flip=pa.array(~found))


def workers(config: EncodeConfig) -> int:
    """Processes that read images, for each process that encodes: it keeps one of its share of the cores."""
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = config.run.dataloader_num_workers
    return min(16, max(0, share - 1)) if given is None else given
