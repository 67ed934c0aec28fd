"""What a dataset holds, by content: read once, in blocks that all processes share and that outlive a killed one."""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from ..base.console import bar
from ..base.errors import CacheError, SampleError
from ..base.files import content_key, file_record, storable, whole
from ..cache.commits import pc
from ..cache.format import SAMPLES
from ..data.pairs import Pair, Pairs, unusable
from ..geometry import Geometry

FOLDER, JUDGED = ".index", ".scores"  # in the cache, until the plan and the table have what lies there
WAITING = f"{FOLDER}/", f"{JUDGED}/"
BLOCK = 2**16  # positions whose identities are kept at once
BATCH = 64  # of them that a worker reads at once


class Index:
    """The identities of a dataset's samples, in blocks of positions, until the plan of the cache is written.

    A block is a file whose name ends in its checksum; one that is damaged is read anew.

    Args:
        cache: the folder of the cache.
        fingerprint: of the dataset.
        samples: how many it has.
        geometry: which shapes they may have.
    """

    def __init__(self, cache: Path, fingerprint: str, samples: int, geometry: Geometry):
        self.folder, self.fingerprint, self.geometry = cache / FOLDER, fingerprint, geometry
        if geometry.bucket_step:
            self.fingerprint += f"-{geometry.resolution}-{geometry.bucket_step}"
        self.spans = [range(start, min(start + BLOCK, samples)) for start in range(0, samples, BLOCK)]

    def make(self, source: Pairs, workers: int, process: int = 0, processes: int = 1) -> None:
        """Read every sample of this process's share of the blocks that are not there yet, in `workers` processes."""
        from torch.utils.data import DataLoader  # seconds to import, which whoever checks a cache does not need

        absent = [number for number in range(process, len(self.spans), processes) if not self._file(number)]
        spans = [self.spans[number] for number in absent]
        batches: Any = [span[at : at + BATCH] for span in spans for at in range(0, len(span), BATCH)]
        every: Any = range(len(source))
        read = partial(identify, source, self.geometry)
        tables = iter(DataLoader(every, batch_sampler=batches, num_workers=workers, collate_fn=read))
        with bar(None, "identify samples", "pair", total=sum(map(len, spans)), leave=True) as progress:
            for number, span in zip(absent, spans, strict=True):
                parts = []
                for table in islice(tables, -(-len(span) // BATCH)):
                    parts.append(table)
                    progress.update(len(table))
                self.keep(number, pa.concat_tables(parts))

    def keep(self, number: int, block: pa.Table) -> None:
        """Write a block."""
        write_block(self.folder, f"{self.fingerprint}-{number:06d}", block)

    def read(self) -> pa.Table:
        """All blocks as a table of samples, in which none has a row yet; a `CacheError` if one is gone."""
        files = [self._file(number) for number in range(len(self.spans))]
        if None in files:
            raise CacheError(f"{self.folder} has lost what was read of the dataset: run the same ip2p-encode again")
        return pa.concat_tables(pq.read_table(file, schema=SAMPLES) for file in files)

    def forget_failures(self) -> None:
        """Give up the blocks in which something could not be read, since that may have been mended."""
        for file in filter(None, map(self._file, range(len(self.spans)))):
            if pc.any(pq.read_table(file, columns=["reason"])["reason"].is_valid()).as_py():
                file.unlink()

    def _file(self, number: int) -> Path | None:
        """The file of a block that is there and whole."""
        return next(whole_blocks(self.folder, f"{self.fingerprint}-{number:06d}"), None)


def write_block(folder: Path, name: str, block: pa.Table) -> None:
    """Write a table into a file that is called `name` and its checksum."""
    content = io.BytesIO()
    pq.write_table(block.combine_chunks(), content, compression="zstd")
    checksum = google_crc32c.value(content.getvalue())
    with whole(folder / f"{name}-{checksum:08x}.parquet") as unfinished:
        unfinished.write_bytes(content.getvalue())


def whole_blocks(folder: Path, name: str) -> Iterator[Path]:
    """The files that `write_block` wrote under a name, as far as they are undamaged."""
    return (file for file in folder.glob(f"{name}-*.parquet") if file.stem.endswith(file_record(file)["crc32c"]))


def identify(source: Pairs, geometry: Geometry, positions: Sequence[int]) -> pa.Table:
    """Rows of the samples table, made where the images are read: in worker processes."""
    rows = []
    for position in positions:
        try:
            pair = source[position]
            reason = unusable(pair)
        except SampleError as error:
            pair, reason = Pair(None, None, ""), str(error)
        key = pair.key
        text = pair.instruction if isinstance(pair.instruction, str) else repr(pair.instruction)
        instruction, group = storable(text), source.group(position)
        row = {"key": content_key(key.encode(), instruction.encode()), "pair": key, "position": position}
        row |= {"instruction": instruction, "group": group, "row": -1, "text_row": -1}
        row |= geometry.planned(pair.original or b"")._asdict()
        rows.append(row | {"status": "quarantined" if reason else "pending", "reason": reason})
    return pa.Table.from_pylist(rows, schema=SAMPLES)
