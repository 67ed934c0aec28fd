"""Judges pairs by CLIP: which have no scores yet, shared by all processes, kept in blocks until the table has them."""

import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from .base.console import bar, say
from .base.errors import SampleError, SourceError
from .base.files import content_key
from .cache.commits import pc
from .cache.format import Cache
from .cache.tables import SCORES
from .config import EncodeConfig
from .data.columns import AFTER, BEFORE
from .data.pairs import Pairs
from .data.pictures import open_picture
from .judging import CLIP
from .models.judge import Judge
from .pipeline import quiet_worker
from .planning.index import JUDGED, whole_blocks, write_block
from .planning.plan import workers

BATCH = 32  # pairs that CLIP sees at once
SECONDS = 10.0  # of work that a killed process may lose
BLOCK = SCORES.append(pa.field("reason", pa.string()))  # why a pair could not be judged


class Item(NamedTuple):
    """A pair to be judged."""

    of: bytes  # identity of its files and captions
    key: str  # of its files
    position: int
    captions: tuple[str | None, str | None]


class Scored(NamedTuple):
    """What is known when all processes are done."""

    judge: dict[str, Any]  # for the manifest
    columns: pa.Table  # of `SCORES`, in the order of the samples

    def join(self, samples: pa.Table) -> pa.Table:
        """The samples with these scores, in the place of those that they may have."""
        samples = samples.drop_columns([name for name in SCORES.names if name in samples.column_names])
        for name in SCORES.names:
            samples = samples.append_column(SCORES.field(name), self.columns[name])
        return samples


def judge_pairs(config: EncodeConfig, source: Pairs, state: PartialState) -> Scored | None:
    """Judge the pairs of a cache that have no scores by this CLIP yet, on all processes.

    Returns:
        The scores of all samples, on the first process alone; None where the table has them already.

    Raises:
        ModelError: the CLIP cannot be loaded.
        SourceError: a pair cannot be judged, and `on_error` is fail.
    """
    cache = Cache.open(config.cache)
    samples = cache.samples("pair", "position", "status", *SCORES.names)
    before = cache.manifest.get("pair_scores", {})
    there = samples.select(SCORES.names) if set(SCORES.names) <= set(samples.column_names) else None
    name = config.scores.clip_model or before.get("clip_model") or CLIP
    with state.main_process_first():
        judge = Judge(name, None, str(state.device or "cpu"), cache_dir=config.model.cache_dir)
    same = before.get("clip") == judge.identity
    of, captions = identities(source, samples)
    blocks = _Blocks(cache, judge.identity)
    known = blocks.known(there if same else None)
    wanted = pc.not_equal(samples["status"], "quarantined").combine_chunks()
    missing = np.flatnonzero(pc.and_(wanted, pc.is_null(pc.index_in(of, known["clip_of"]))).to_numpy(False))
    distinct = of.take(pa.array(missing)).dictionary_encode().indices  # in the order of first appearance
    numbers = missing[np.unique(distinct, return_index=True)[1]]
    batches = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]
    if before and not same:
        other = f"{cache.folder} was judged by {before['clip_model']}, and {name} is another CLIP"
        say(f"{other}: {len(missing):,} samples are judged again")
    state.wait_for_everyone()  # a block written earlier would deal out the work in another way to those still here
    mine = [list(_items(samples, of, captions, batch)) for batch in batches[state.process_index :: state.num_processes]]
    blocks.fill(judge, source, mine, workers(config), fail=config.run.on_error == "fail")
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    known = blocks.known(known)
    found = known.take(pc.index_in(of, known["clip_of"]))
    say(*_told(len(missing), found.filter(wanted), blocks.read()["reason"], name))
    entry = {"clip_model": name, "clip": judge.identity, "captions": [source.column(role) for role in (BEFORE, AFTER)]}
    if before == entry and found.equals(there):
        shutil.rmtree(blocks.folder, ignore_errors=True)
        return None
    return Scored(entry, found)


def identities(source: Pairs, samples: pa.Table) -> tuple[pa.Array, list[pa.Array]]:
    """What is judged of each sample, its files and their captions: the identities of that, and the captions."""
    captions = source.captions(samples["position"].to_numpy())
    rows = zip(samples["pair"].to_pylist(), *(texts.to_pylist() for texts in captions), strict=True)
    digests = (bytes.fromhex(content_key(*((part or "").encode() for part in row))) for row in rows)
    return pa.array(digests, pa.binary(16)), captions


def _items(samples: pa.Table, of: pa.Array, captions: Sequence[pa.Array], numbers: np.ndarray) -> Iterator[Item]:
    rows = pa.array(numbers)
    columns = of, samples["pair"], samples["position"], *captions
    for key, pair, position, *texts in zip(*(column.take(rows).to_pylist() for column in columns), strict=True):
        yield Item(key, pair, position, (texts[0], texts[1]))


def _told(fresh: int, scores: pa.Table, reasons: pa.ChunkedArray, name: str) -> Iterator[str]:
    """What was done, and which samples lack which scores."""
    unread = scores["clip_image"].null_count
    yield f"judged {fresh - unread:,} samples by {name}" if fresh else f"nothing to judge: {name} has judged all"
    for score, flags in {
        "clip_t": "--edited_caption_column",
        "clip_direction": "--original_caption_column and --edited_caption_column",
    }.items():
        if lacking := scores[score].null_count - unread:
            yield f"{lacking:,} samples have no {score}, which needs captions ({flags})"
    if unread:
        yield f"{unread:,} samples could not be judged: {', '.join(reasons.unique().drop_null().to_pylist()[:3])}"


class _Files(Dataset):
    """The pictures of pairs, read in worker processes, as CLIP's processor makes them (2, 3, H, W); or why not."""

    def __init__(self, source: Pairs, items: Sequence[Item], background: str, judge: Judge):
        self.source, self.items, self.background, self.processor = source, items, background, judge.clip_processor

    def __getitem__(self, n: int) -> torch.Tensor | str:
        try:
            pair = self.source[self.items[n].position]
            if pair.key != self.items[n].key:
                raise SampleError("the files changed while the dataset was being judged")
            pictures = [open_picture(file or b"", self.background) for file in pair[:2]]
        except SampleError as error:
            return str(error)
        return self.processor(pictures, return_tensors="pt")["pixel_values"]


class _Blocks:
    """What was judged by one CLIP, in files of a few thousand pairs.

    Args:
        judge: identity of the CLIP.
    """

    def __init__(self, cache: Cache, judge: str):
        self.folder, self.background = cache.folder / JUDGED, cache.manifest["encoding"]["background"]
        self.name = content_key(judge.encode(), self.background.encode())

    def read(self) -> pa.Table:
        """All of it, as `BLOCK`."""
        files = whole_blocks(self.folder, self.name)
        return pa.concat_tables([BLOCK.empty_table(), *(pq.read_table(file, schema=BLOCK) for file in files)])

    def known(self, others: pa.Table | None) -> pa.Table:
        """The scores of all pairs that have some here or in `others`, each once."""
        known = pa.concat_tables([self.read().select(SCORES.names), *([others] if others else [])])
        known = known.filter(known["clip_image"].is_valid())
        first = pc.index_in(known["clip_of"].unique(), known["clip_of"].combine_chunks())
        return known.take(first).combine_chunks()

    def fill(
        self, judge: Judge, source: Pairs, batches: Sequence[Sequence[Item]], workers: int, *, fail: bool = False
    ) -> None:
        """Judge pairs in batches, and keep what is judged every few seconds, and when something ends the work."""
        items = [item for batch in batches for item in batch]
        ends = pairwise(np.cumsum([0, *map(len, batches)]).tolist())
        numbers = [list(range(start, stop)) for start, stop in ends]
        files = _Files(source, items, self.background, judge)
        loader = DataLoader(
            files, batch_sampler=numbers, num_workers=workers, collate_fn=list, worker_init_fn=quiet_worker
        )
        rows, kept = list[dict[str, Any]](), time.monotonic()
        try:
            with bar(None, "judge", "pair", total=len(items), leave=True) as progress:
                for batch, pictures in zip(batches, loader, strict=True):
                    rows += _judged(judge, batch, pictures, fail=fail)
                    progress.update(len(batch))
                    if time.monotonic() > kept + SECONDS:
                        self._keep(rows)
                        rows, kept = [], time.monotonic()
        finally:
            self._keep(rows)

    def _keep(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            write_block(self.folder, self.name, pa.Table.from_pylist(list(rows), schema=BLOCK))


def _judged(
    judge: Judge, items: Sequence[Item], pictures: Sequence[torch.Tensor | str], *, fail: bool
) -> Iterator[dict[str, Any]]:
    """Rows of a block."""
    good = []
    for item, seen in zip(items, pictures, strict=True):
        if not isinstance(seen, str):
            good.append((item, seen))
        elif fail:
            raise SourceError(f"position {item.position:,} of the dataset: {seen} (--on_error quarantine goes on)")
        else:
            yield {"clip_of": item.of, "reason": seen}
    if good:
        embedded = judge.embed(torch.cat([seen for _, seen in good]))  # (2B, d)
        scores = judge.compare(embedded[::2], embedded[1::2], [item.captions for item, _ in good])
        for (item, _), *values in zip(good, *scores.values(), strict=True):
            yield {"clip_of": item.of} | dict(zip(scores, values, strict=True))
