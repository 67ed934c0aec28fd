"""What the samples of a dataset are: each is read once and known by its content."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from torch.utils.data import DataLoader

from ..base.console import bar
from ..base.files import content_key
from ..cache.format import SAMPLES
from .pairs import Pair, Pairs


def identify(source: Pairs, workers: int, batch_size: int = 64) -> pa.Table:
    """Read every sample once, in `workers` processes; returns the samples table, in which no sample has a row yet."""
    positions: Any = range(len(source))
    loader = DataLoader(positions, batch_size, num_workers=workers, collate_fn=partial(_identities, source))
    rows: list[dict[str, Any]] = []
    with bar(None, "identify samples", "pair", total=len(source), leave=True) as progress:
        for batch in loader:
            rows += batch
            progress.update(len(batch))
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def _identities(source: Pairs, positions: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the samples table, made where the images are read: in worker processes."""
    rows = []
    for position in positions:
        pair = source[position]
        key = content_key(pair.original or b"", pair.edited or b"")
        instruction = pair.instruction if isinstance(pair.instruction, str) else repr(pair.instruction)
        reason = unusable(pair)
        row = {"key": content_key(key.encode(), instruction.encode()), "pair": key, "position": position}
        row |= {"instruction": instruction, "group": source.group(position), "row": -1, "text_row": -1}
        rows.append(row | {"status": "quarantined" if reason else "pending", "reason": reason})
    return rows


def unusable(pair: Pair) -> str | None:
    """Why a sample cannot even be tried, or None."""
    for side in ("original", "edited"):
        if getattr(pair, side) is None:
            return f"the {side} image is missing"
    if not isinstance(pair.instruction, str):
        return f"the instruction is {type(pair.instruction).__name__}, expected text"
    return None if pair.instruction.strip() else "the instruction is empty"
