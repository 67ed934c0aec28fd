"""What a cache holds, and how two caches differ, as plain values."""

from typing import Any

from ..base.files import folder_bytes
from ..cache.format import Cache
from ..cache.samples import counts

COMPARED = ("model", "identity", "encoding", "dataset", "counts")


def describe(cache: Cache) -> dict[str, Any]:
    """What a cache holds; `bytes` are those on the disk.

    Raises:
        CacheError: a small file is missing or damaged.
    """
    cache.check_files()
    arrays = {
        name: {"shape": list(array.shape), "bytes": folder_bytes(cache.folder / "data.zarr" / name)}
        for kind in ("images", "text")
        for name, array in cache.arrays(kind).items()
    }
    return {
        "samples": counts(cache.samples()),
        "views": cache.views,
        "bytes": folder_bytes(cache.folder),
        "arrays": arrays,
        **{part: cache.manifest[part] for part in ("model", "identity", "dataset", "encoding")},
    }


def quarantined(cache: Cache) -> list[dict[str, Any]]:
    """Key, position, instruction and reason of each sample that stands aside."""
    rows = cache.samples().select(["key", "position", "instruction", "reason", "status"]).to_pylist()
    return [row for row in rows if row.pop("status") == "quarantined"]


def compare(a: Cache, b: Cache) -> dict[str, Any]:
    """Fields of the manifests that differ, each with both values, and how many samples are where.

    Raises:
        CacheError: a samples table is missing or damaged.
    """
    both = [{part: cache.manifest[part] for part in COMPARED} | {"views": {"views": cache.views}} for cache in (a, b)]
    fields = {
        f"{part}.{field}" if part != field else part: [side[part].get(field) for side in both]
        for part in both[0]
        for field in both[0][part] | both[1][part]
    }
    keys = []
    for cache in (a, b):
        cache.check_files()
        keys.append(set(cache.samples()["key"].to_pylist()))
    return {
        "fields": {field: values for field, values in fields.items() if values[0] != values[1]},
        "samples": {
            "shared": len(keys[0] & keys[1]),
            "only in a": len(keys[0] - keys[1]),
            "only in b": len(keys[1] - keys[0]),
        },
    }
