"""Which samples of a cache a condition keeps: the columns that it names go into an SQLite table in memory.

The engine is told to refuse whatever does more than read that table, or depends on more than it.
"""

import contextlib
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from ..base.console import say
from ..base.errors import SettingsError, explained
from .commits import pc
from .condition import FUNCTIONS, NUMBER, TEXT, Condition, Kind, parse
from .format import Cache
from .tables import SAMPLES_FILE

CALLED = {*FUNCTIONS, "like", "glob"}  # the latter two by the operators
LONGEST = 2**24  # bytes of a text, which `replace` of `replace` could make of any length


def kinds(schema: pa.Schema) -> dict[str, Kind]:
    """What the columns of a table hold that conditions can name: numbers (truth is one) and text."""
    numbers = types.is_boolean, types.is_integer, types.is_floating
    found = {
        field.name: TEXT if types.is_string(field.type) else NUMBER if any(is_(field.type) for is_ in numbers) else None
        for field in schema
    }
    return {name: kind for name, kind in found.items() if kind}


def kept(cache: Cache, text: str) -> np.ndarray:
    """The samples of a cache for which a condition is true, neither false nor NULL, (N,) bool.

    Raises:
        SettingsError: the condition cannot be used; see `parse`.
    """
    condition = condition_on(cache, text)
    return matching(pq.read_table(cache.folder / SAMPLES_FILE, columns=condition.columns), condition)


def condition_on(cache: Cache, text: str) -> Condition:
    """A condition on the samples of a cache, read; raises as `kept` does."""
    try:
        return parse(text, kinds(pq.read_schema(cache.folder / SAMPLES_FILE)))
    except SettingsError as error:
        raise SettingsError(f"{cache.name}: {error}") from None


def some_kept(cache: Cache, text: str) -> np.ndarray:
    """As `kept`, and say how many that are; a SettingsError also where it keeps no usable sample."""
    mask = kept(cache, text)
    usable = pc.equal(cache.samples("status")["status"], "ok").to_numpy()
    left, there = int((mask & usable).sum()), int(usable.sum())
    if there and not left:
        found = f"--keep {text}: that is true of none of the {there:,} samples of {cache.name}"
        raise SettingsError(f"{found}; `ip2p-cache info {cache.folder}` shows what its columns hold")
    say(f"--keep {text}: {left:,} of {there:,} samples of {cache.name}")
    return mask


def matching(table: pa.Table, condition: Condition) -> np.ndarray:
    """The rows of a table of the condition's columns for which it is true, (N,) bool."""
    mask, names = np.zeros(len(table), bool), ["number", *(f"c{n}" for n in range(table.num_columns))]
    refused = explained(SettingsError, f"--keep {condition.text}", sqlite3.Error)
    with contextlib.closing(sqlite3.connect(":memory:")) as engine, refused:
        engine.execute(f"create table samples ({', '.join(names)})")
        rows = zip(range(len(table)), *(column.to_pylist() for column in table.columns), strict=True)
        engine.executemany(f"insert into samples values ({', '.join('?' * len(names))})", rows)
        engine.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        engine.set_authorizer(_authorize)
        for (number,) in engine.execute(f"select number from samples where ({condition.sql})"):
            if number in range(len(mask)):
                mask[number] = True
    return mask


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    reads = action == sqlite3.SQLITE_SELECT or (action == sqlite3.SQLITE_READ and first == "samples")
    calls = action == sqlite3.SQLITE_FUNCTION and second in CALLED
    return sqlite3.SQLITE_OK if reads or calls else sqlite3.SQLITE_DENY
