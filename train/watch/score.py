"""Scores a model in training by edits of held-out pairs, as `ip2p-infer evaluate` does those of a finished one."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from ...encode.base.console import say
from ...encode.base.errors import SettingsError
from ...encode.cache.condition import TEXT
from ...encode.cache.format import SAMPLES, Cache
from ...encode.cache.keep import kinds
from ...encode.cache.tables import SAMPLES_FILE
from ...encode.cached import Samples
from ...encode.data.columns import AFTER, BEFORE, ENDING, Role
from ...encode.models.judge import Judge
from ...infer.edit import Editor
from ...infer.score.metrics import Edit, measure
from ..config import TrainConfig

CAPTIONED = {"clip_t": (AFTER,), "clip_direction": (BEFORE, AFTER)}
"""Scores that need captions, and which."""


class Scores:
    """Which held-out pairs are edited at each validation, always the same ones, and what their edits are worth.

    Several processes edit a share of the pairs each.

    Attributes:
        pairs: samples of the pairs that this process edits.

    Raises:
        ModelError: --clip_model cannot be loaded.
        SettingsError: --keep_best goes by captions, and there are none.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, caches: Sequence[Cache], held_out: Samples):
        flags, self.cache_dir = config.watching, config.model.cache_dir
        chosen = held_out.spread(flags.score_samples)
        self.count, self.clip, self.device = len(chosen.rows), flags.clip_model, accelerator.device
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        self.pairs = Samples(*(column[share] for column in chosen))
        self.captions = [(None, None)] * self.count
        self.told = False
        if not self.clip or not self.count:
            return
        with accelerator.main_process_first():  # what is wrong with it is said before hours of training
            Judge(self.clip, None, "cpu", cache_dir=self.cache_dir)
        found = {role: find_captions(caches, chosen, role) for role in (BEFORE, AFTER)}
        lacking = [role for role in CAPTIONED.get(str(flags.keep_best), ()) if not found[role]]
        if lacking:
            names = " ".join(role.names.split()[0] for role in lacking)
            raise SettingsError(
                f"--keep_best {flags.keep_best} goes by {' and '.join(role.what for role in lacking)}, and --cache has "
                f"none: `ip2p-encode --keep_columns {names}` takes them from the dataset, also into a finished cache"
            )
        texts = [found[role] or [None] * self.count for role in (BEFORE, AFTER)]
        self.captions = list(zip(*texts, strict=True))[share]

    def edit(self, editor: Editor, pairs: Iterable[tuple[str, Image.Image, Image.Image]]) -> list[Edit]:
        """Edit this process's pairs, given as instruction, original and target, one at a time."""
        edits = list[Edit]()
        for (prompt, original, target), captions in zip(pairs, self.captions, strict=False):
            (edited,) = editor.edit(original, prompt, resolution=max(original.size), batch_size=1)
            edits.append(Edit(original, edited, target, captions))
        return edits

    def measure(self, step: int, edits: Mapping[str, Sequence[Edit]], seconds: float) -> dict[str, float]:
        """The means of the scores over the pairs of all processes, for the edits of each kind of weights by its prefix.

        Without memory for all of them there are none of that kind, and it is said; so is, once, what scores cost.

        Args:
            seconds: what the editing took.
        """
        if not self.count:
            return {}
        began, values = time.perf_counter(), dict[str, float]()
        for prefix, made in edits.items():
            records = gather_object(self._records(made))
            if len(records) == self.count:
                means = {name: statistics.fmean(record[name] for record in records) for name in records[0]}
                values |= {f"{prefix}validation_{name}": mean for name, mean in means.items()}
            else:
                say(f"no {prefix}validation scores at step {step}: out of memory")
        seconds += time.perf_counter() - began
        if not self.told:
            made = f"scores of {len(edits) * self.count:,} edits at step {step:,}"
            less = "fewer --score_samples, or more --validation_steps between them, cost less"
            say(f"{made} took {seconds:.1f} s, and will at each validation: {less}")
            self.told = True
        return values | {"scoring_seconds": seconds}

    def _records(self, edits: Sequence[Edit]) -> list[dict[str, float]]:
        """The scores of edits, one at a time; CLIP is there meanwhile alone."""
        try:
            where = {"device": str(self.device), "cache_dir": self.cache_dir}
            judge = Judge(self.clip, None, **where) if self.clip and edits else None
            return [scores for edit in edits for scores in measure(judge, [edit])]
        except torch.OutOfMemoryError:
            return []


def find_captions(caches: Sequence[Cache], samples: Samples, role: Role) -> list[str] | None:
    """The captions of samples, in a column that `--keep_columns` kept in each cache under one of the usual names.

    None where there is no such column, where one of the samples has none, and where --reverse_pairs made some whose
    captions are those of the opposite pictures.
    """
    columns = [kinds(pq.read_schema(cache.folder / SAMPLES_FILE)) for cache in caches]
    texts = [
        name for name in columns[0] if all(found.get(name) == TEXT for found in columns) and name not in SAMPLES.names
    ]
    names = {ENDING.sub("", name.lower()): name for name in reversed(texts)}
    column = next((names[name] for name in role.names.split() if name in names), None)
    if column is None or any(cache.manifest["settings"].get("reverse_pairs") for cache in caches):
        return None
    found = samples.values(caches, column)
    return found if all(text and text.strip() for text in found) else None
