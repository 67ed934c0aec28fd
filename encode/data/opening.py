"""Which kind of dataset a name means, and opening it."""

import functools
from collections.abc import Collection, Mapping
from pathlib import Path

from ..base.errors import SourceError
from ..cache.format import SAMPLES
from ..cache.tables import SCORES
from ..config import AUTO, Dataset
from ..judging import PairScores
from .columns import AFTER, BEFORE, EDITED, INVERSE, MASK, ORIGINAL, PROMPT, VALUES, Role, Rows, choose, evaluation_only
from .pairs import Pairs
from .places import in_seeds, in_tars, is_saved, name_of

NOT_THERE = {
    "split": "splits",
    "dataset_config_name": "configurations",
    "dataset_revision": "revisions",
    "streaming": "second way to be read",
}
"""Flags that cannot act on tar files, seeds.json and what `save_to_disk` wrote, and what these lack."""


def open_pairs(dataset: Dataset, cache_dir: Path | None, scores: PairScores | None = None) -> Pairs:
    """Open the pairs of images and instructions that the flags name, those of the split train unless one is named.

    Their captions are opened, too, where the dataset has some and pairs are to be judged.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    needed = [ORIGINAL, EDITED, PROMPT, *([INVERSE] * dataset.reverse_pairs), *([MASK] * bool(dataset.mask_column))]
    kept = {Role("keep_columns", "values to keep", VALUES, name, beside=True): name for name in dataset.keep_columns}
    if taken := [name for name in kept.values() if name.lower() in {*SAMPLES.names, *SCORES.names}]:
        raise SourceError(f"--keep_columns {taken[0]}: the table of samples has a column of that name, rename this one")
    judged = scores is not None and scores.pair_scores
    captions = {role: getattr(scores, role.flag) for role in (BEFORE, AFTER)} if judged else {}
    named = kept | captions
    rows = open_rows(dataset, cache_dir, (*needed, *kept), tuple(captions), named=named, default_split="train")
    return Pairs(rows, name_of(dataset), every=dataset.prompt_choice == "all", limit=dataset.max_train_samples)


def open_rows(
    dataset: Dataset,
    cache_dir: Path | None,
    needed: Collection[Role],
    wanted: Collection[Role] = (),
    *,
    named: Mapping[Role, str | None] | None = None,
    default_split: str | None = None,
) -> Rows:
    """Open the dataset that the flags name, for encoding, editing and scoring alike.

    Args:
        cache_dir: where downloads are kept; default: where the `datasets` library keeps them.
        needed: roles that must have a column.
        wanted: roles that have one where the dataset offers it.
        named: columns that the user names beside those of `dataset`.
        default_split: the split where none is named and there are several; by default none is taken silently.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    name = name_of(dataset)
    if EDITED in needed and evaluation_only(name) and dataset.edited_image_column is None:
        raise SourceError(
            f"{name} is made for evaluation: it holds no edited images to learn from "
            "(--edited_image_column, if your copy has some)"
        )
    flags = {role: getattr(dataset, role.flag, None) for role in (*needed, *wanted)} | dict(named or {})
    flags = {role: None if role is MASK and flag == AUTO else flag for role, flag in flags.items()}
    pick = functools.partial(choose, flags, name, needed=needed, wanted=wanted)
    seeds, tars = in_seeds(name), in_tars(name)
    saved = is_saved(Path(name))
    for flag, what in NOT_THERE.items() if seeds or tars or saved else ():
        if getattr(dataset, flag) and not (saved and flag == "split"):
            raise SourceError(f"{name} has no {what}: leave out --{flag}")
    # Each kind imports what it needs only when it is meant.
    if seeds:
        from .seeds import Seeds

        rows = Seeds(Path(name), pick)
    elif tars:
        from .tars import Tars

        rows = Tars(name, pick, cache_dir)
    else:
        from .tables import open_table

        rows = open_table(dataset, name, pick, cache_dir, default_split)
    if len(rows) == 0:
        raise SourceError(f"{name} holds no samples")
    return rows
