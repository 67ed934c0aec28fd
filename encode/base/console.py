"""What users see while a command runs: bars and sentences, by the main process alone."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # torchrun, accelerate, and kinds of MPI


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started; known before any library is imported."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def say(*sentences: str) -> None:
    """Print sentences, a line each, above any bar."""
    if is_main_process():
        for sentence in sentences:
            tqdm.write(sentence, file=sys.stdout)


def warn(sentence: str) -> None:
    """Print a sentence to stderr, above any bar: something was left out, and the work goes on."""
    if is_main_process():
        tqdm.write(sentence, file=sys.stderr)


def bar(items: Iterable[Any] | None, what: str, unit: str, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm over `items`, or one that is told of its progress; gone once done, unless `leave` is given.

    `what` is the work, such as "encode"; `unit` is what is counted, B for bytes; `options` are those of tqdm.
    """
    options = {"leave": False, "unit_scale": unit == "B", "disable": not is_main_process()} | options
    return tqdm(items, desc=what, unit=unit, **options)
