"""What a cache holds, as values that JSON can hold."""

from typing import Any

import pyarrow as pa
from pyarrow.types import is_boolean

from ..base.files import folder_bytes
from ..cache.commits import pc
from ..cache.condition import NUMBER
from ..cache.format import SAMPLES, Cache
from ..cache.keep import kept, kinds
from ..cache.samples import Ledger, counts

PARTS = "model", "identity", "dataset", "encoding", "pair_scores"  # of the manifest; the last where pairs were judged
QUARTILES = 0, 0.25, 0.5, 0.75, 1


def describe(cache: Cache, keep: str | None, *, quarantined: bool) -> dict[str, Any]:
    """Samples by status, views, bytes, arrays, samples by shape, columns beside these with their spread, and `PARTS`.

    Args:
        keep: a condition, to count the samples that it keeps as `kept`; the spread is that of these.
        quarantined: list the samples that stand aside, too.
    """
    table = Ledger.of(cache).settle(cache.samples())
    found: dict[str, Any] = {"samples": counts(table), "views": cache.views, "bytes": folder_bytes(cache.folder)}
    found["arrays"] = {
        name: {"shape": list(array.shape), "bytes": folder_bytes(cache.folder / "data.zarr" / name)}
        for name, array in (cache.arrays("images") | cache.arrays("text")).items()
    }
    groups = table.filter(table["status"].to_numpy() == "ok").group_by(["width", "height"])
    shapes = sorted(groups.aggregate([([], "count_all")]).to_pylist(), key=lambda shape: shape["width"])
    found["shapes"] = {"{width} x {height}".format_map(shape): shape["count_all"] for shape in shapes}
    beside = {name: kind for name, kind in kinds(table.schema).items() if name not in SAMPLES.names}
    # A condition takes truth for a number, but whoever reads this wants to know which it is.
    found["columns"] = {
        name: "boolean" if is_boolean(table.field(name).type) else kind for name, kind in beside.items()
    }
    whole = table["status"].to_numpy() == "ok"
    if keep is not None:
        whole &= kept(cache, keep)
        found["kept"] = int(whole.sum())
    numbers = [name for name, kind in found["columns"].items() if kind == NUMBER]
    found["spread"] = dict(zip(numbers, map(spread, table.select(numbers).filter(whole).columns), strict=True))
    found |= {part: cache.manifest[part] for part in PARTS if part in cache.manifest}
    if quarantined:
        rows = table.select(["key", "position", "instruction", "reason", "status"]).to_pylist()
        found["quarantined"] = [row for row in rows if row.pop("status") == "quarantined"]
    return found


def spread(values: pa.ChunkedArray) -> dict[str, Any]:
    """The smallest number of a column, its quartiles and the largest one, and how many samples have none."""
    there = values.drop_null().cast(pa.float64())
    there = there.filter(pc.invert(pc.is_nan(there)))
    found = pc.quantile(there, QUARTILES).to_pylist() if len(there) else []
    return {"quartiles": found, "missing": len(values) - len(there)}
