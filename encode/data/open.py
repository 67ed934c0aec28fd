"""Which kind of dataset a name means, and opening it: for encoding, editing and scoring alike."""

import functools
from collections.abc import Collection
from pathlib import Path

from ..base.errors import SourceError
from ..config import Dataset
from .columns import EDITED, INVERSE, ORIGINAL, PROMPT, Role, choose, evaluation_only
from .pairs import Pairs, Rows


def open_pairs(dataset: Dataset, cache_dir: Path | None) -> Pairs:
    """Open the pairs of images and instructions that the flags name, those of the split train unless one is named.

    Raises:
        SourceError: no such dataset, split or column; the message names those there are.
    """
    needed = (ORIGINAL, EDITED, PROMPT, INVERSE) if dataset.reverse_pairs else (ORIGINAL, EDITED, PROMPT)
    rows = open_rows(dataset, cache_dir, needed, default_split="train")
    return Pairs(rows, name_of(dataset), every=dataset.prompt_choice == "all", limit=dataset.max_train_samples)


def open_rows(
    dataset: Dataset,
    cache_dir: Path | None,
    needed: Collection[Role],
    wanted: Collection[Role] = (),
    *,
    captions: dict[Role, str | None] | None = None,
    default_split: str | None = None,
) -> Rows:
    """Open the dataset that the flags name.

    Args:
        cache_dir: where downloads are kept; default: where the `datasets` library keeps them.
        needed: roles that must have a column.
        wanted: roles that have one where the dataset offers it.
        captions: columns that the user names beside those of `dataset`.
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
    flags = {role: getattr(dataset, role.flag, None) for role in (*needed, *wanted)} | (captions or {})
    pick = functools.partial(choose, flags, name, needed=needed, wanted=wanted)
    # Each kind imports what it needs only when it is meant.
    seeds = (Path(name) / "seeds.json").is_file()
    tars = f"{name}/*.tar" if any(Path(name).glob("*.tar")) else name
    in_tars = tars.endswith(".tar") or "{" in tars or "://" in tars
    if dataset.split and (seeds or in_tars):
        raise SourceError(f"{name} has no splits: leave out --split {dataset.split}")
    if seeds:
        from .seeds import open_seeds

        rows = open_seeds(Path(name), pick)
    elif in_tars:
        from .tars import open_tars

        rows = open_tars(tars, pick, cache_dir)
    else:
        from .tables import open_table

        rows = open_table(dataset, name, pick, cache_dir, default_split)
    if len(rows) == 0:
        raise SourceError(f"{name} holds no samples")
    return rows


def name_of(dataset: Dataset) -> str:
    """What the user calls the dataset."""
    return dataset.dataset_name or str(dataset.train_data_dir)
