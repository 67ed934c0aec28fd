"""Caches in the real format, filled with random numbers, and made cold at will."""

import gc
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ip2p.encode.base.files import read_record, write_record
from ip2p.encode.base.flags import build as flags_into
from ip2p.encode.cache.commits import Unit
from ip2p.encode.cache.format import SAMPLES, Cache, shard_rows
from ip2p.encode.cache.samples import NULL_PROMPT, SIZES, Ledger, text_key
from ip2p.encode.cache.shapes import RowShapes
from ip2p.encode.cache.writer import UnitWriter, prepare, write_state
from ip2p.encode.config import EncodeConfig
from ip2p.encode.data.columns import Role, Rows, preset
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.data.pairs import Pairs
from ip2p.encode.geometry import Shape
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.planning.draft import describe


def build(
    folder: Path,
    samples: int,
    shapes: RowShapes,
    model: Path | None = None,
    config: EncodeConfig | None = None,
    latents: Sequence[Shape] = (),
) -> Cache:
    """Write a finished cache of `samples` samples, each with an instruction of its own.

    With a `model`, it is a cache that this checkpoint can be trained from, however large: all shards of an array but
    the last are then one file under many names. With a `config` as well, it says that this encode has made it.
    With `latents`, samples have these shapes in turns, and `shapes` is of rows that have room for the largest.
    """
    rows = {kind: shard_rows(kind, arrays.values(), samples) for kind, arrays in shapes.items()}
    resolution = 8 * (math.isqrt(shapes["images"]["original"][-1]) if latents else shapes["images"]["original"][-1])
    manifest: dict[str, Any] = {"views": ["plain"], "encoding": {"resolution": resolution}, "vae_scale_factor": 8}
    if model:
        flags = {"pretrained_model_name_or_path": str(model), "cache": folder, "resolution": resolution}
        source = open_pairs(config.dataset, config.model.cache_dir) if config else Pairs(_Numbers(samples), "synthetic")
        config = config or flags_into(EncodeConfig, flags | {"dataset_name": "synthetic"})
        manifest = describe(config, source, Checkpoint(model), shapes, 1)
    numbers, sizes = np.arange(samples), [resolution] * 4 + [0, 0]
    names = [f"{number:032x}" for number in numbers]
    columns: dict[str, Any] = {field.name: pa.nulls(samples, field.type) for field in SAMPLES}
    columns |= {"key": names, "pair": names, "position": numbers, "instruction": names}
    columns |= {"row": numbers, "text_row": numbers + 1, "status": ["ok"] * samples}
    columns |= {"crop_top": [[0]] * samples, "crop_left": [[0]] * samples, "flip": [True] * samples}
    columns |= {name: [resolution] * samples for name in SIZES}
    sides = np.resize(8 * np.array(latents or [(resolution // 8, resolution // 8)]), (samples, 2))
    columns |= {"height": sides[:, 0], "width": sides[:, 1]}
    table = pa.Table.from_pydict(columns, schema=SAMPLES)
    prepare(folder, shapes, table, Ledger({}, rows, 1))
    write_state(folder, manifest | {"shard_rows": rows}, table, {})

    cache, random = Cache.open(folder), np.random.Generator(np.random.SFC64(0))
    keys = {"images": names, "text": [text_key(NULL_PROMPT), *map(text_key, names)]}
    for kind, arrays in shapes.items():
        last = (len(keys[kind]) - 1) // rows[kind]
        for shard in range(last + 1):
            if model and 0 < shard < last:
                _repeat(cache, arrays, Unit(kind, shard), keys[kind][shard * rows[kind] : (shard + 1) * rows[kind]])
                continue
            writer = UnitWriter(cache, Unit(kind, shard))
            values = {
                name: random.standard_normal((writer.stop - writer.first, *shape), np.float32).astype(np.float16)
                for name, shape in arrays.items()
            }
            for at, row in enumerate(range(writer.first, writer.stop)):
                writer.put(row, keys[kind][row], {name: value[at] for name, value in values.items()}, sizes)
            writer.commit()
    write_state(folder, cache.manifest, table, cache.commits())
    return Cache.open(folder)


class _Numbers(Rows):
    """A dataset of which no more is read than its size."""

    columns = preset("original", "edited", "instruction")

    def __init__(self, samples: int):
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def read(self, row: int, *roles: Role) -> tuple[Any, ...]:
        raise NotImplementedError

    def texts(self, role: Role) -> Iterable[Any]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "synthetic"


def _repeat(cache: Cache, arrays: Iterable[str], unit: Unit, keys: list[str]) -> None:
    """Give the files of the first shard another name, with a record of other content."""
    first, dimensions = Unit(unit.kind, 0), 5 if unit.kind == "images" else 3
    record = read_record(cache.folder / "commits" / f"{first.name}.json") | {"shard": unit.shard, "keys": "".join(keys)}
    for name in arrays:
        old, new = (cache.shard_path(name, one, dimensions - (name == "pooled")) for one in (first, unit))
        (cache.folder / new).parent.mkdir(parents=True, exist_ok=True)
        os.link(cache.folder / old, cache.folder / new)
        record["files"][new] = record["files"].pop(old)
    write_record(cache.folder / "commits" / f"{unit.name}.json", record)


def forget(cache: Cache) -> None:
    """Make the operating system drop the shards from memory."""
    gc.collect()  # a reader that is done with may be part of a circle, and have them mapped
    for path in cache.shards():
        _drop(cache.folder / path)


def _drop(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        for _ in range(100):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not any(_in_memory(file.fileno(), at) for at in range(0, path.stat().st_size, 2**20)):
                return
            time.sleep(0.05)  # what is being read ahead cannot be dropped before it has arrived
    raise RuntimeError(f"{path} stays in memory, mapped by something: nothing cold can be measured")


def _in_memory(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without the disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
