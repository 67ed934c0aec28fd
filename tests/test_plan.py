"""Tests of the plan on columns: equal to the planner before it, in any cache of any past."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import former
from ip2p.encode.base.files import read_record
from ip2p.encode.cache.commits import Commit, Unit, write_commit
from ip2p.encode.cache.format import SAMPLES
from ip2p.encode.cache.samples import Ledger, text_key
from ip2p.encode.config import NO_FLIP
from ip2p.encode.planning.plan import carry, mark_flips

ROWS = {"images": 4, "text": 3}
PAIRS = [f"{number:032x}" for number in range(9)]
TEXTS = ["red", "turn left", "éleft", "LEFT\u017fide", "a\n", "snow", "clock\u0077ise"]
WORDS = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@st.composite
def records(draw: st.DrawFn, views: int) -> former.Records:
    """Any units, with any content in their rows, some of it twice, some quarantined, views that differ."""
    found: former.Records = {}
    units = [Unit("images", shard, view) for shard in range(4) for view in range(views)]
    for unit in draw(st.sets(st.sampled_from([*units, *(Unit("text", shard) for shard in range(4))]))):
        rows, images = ROWS[unit.kind], unit.kind == "images"
        contents = st.sampled_from(PAIRS) if images else st.sampled_from(TEXTS).map(text_key)
        keys = draw(st.lists(st.none() | contents, min_size=rows, max_size=rows))
        if unit.view and draw(st.booleans()) and (first := found.get(Unit("images", unit.shard))):
            keys = first["keys"]
        null = int(unit == Unit("text", 0))  # the empty instruction, always there and nowhere else
        keys = [*[text_key("")] * null, *keys[null:]]
        at = [row for row, key in enumerate(keys) if key and row >= null]
        bad = draw(st.sets(st.sampled_from(at), max_size=2)) if at else set()
        size = st.lists(st.integers(0, 99), min_size=6, max_size=6)
        sizes = [draw(size) if key and n not in bad else None for n, key in enumerate(keys)] if images else None
        found[unit] = {"keys": keys, "sizes": sizes, "quarantined": {str(n): f"torn {n}" for n in bad}, "files": {}}
    return found


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """A dataset as it was read, or an old plan of it, in which anything may stand."""
    rows = []
    for position in range(draw(st.integers(1, 14))):
        row: dict[str, Any] = {"pair": draw(st.sampled_from(PAIRS)), "instruction": draw(WORDS), "position": position}
        old = draw(st.booleans())
        row |= {"row": draw(st.integers(-1, 15)) if old else -1}
        # Text row 0 is that of the empty instruction, which is no sample's own.
        row |= {"text_row": -1 if row["row"] < 0 else draw(st.integers(1, 11)), "key": f"{position:032x}"}
        status = draw(st.sampled_from(["ok", "pending", "quarantined"])) if row["row"] >= 0 else "pending"
        reason = draw(st.sampled_from([None, "no image"])) if row["row"] < 0 else None
        row |= {"status": "quarantined" if reason else status, "reason": reason, "original_width": 7 if old else None}
        rows.append(row | ({"crop_top": [1], "crop_left": [2]} if old else {}))
    return pa.Table.from_pylist(rows, schema=SAMPLES)


@settings(max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@given(data=st.data(), views=st.integers(1, 3), retry=st.booleans(), table=tables())
def test_a_plan_equals_that_of_the_former_planner(
    data: st.DataObject, views: int, retry: bool, table: pa.Table
) -> None:
    """Rows, text rows, status, reasons, sizes, and what is missing, whatever the records hold."""
    held = data.draw(records(views))
    ledger = Ledger({unit: Commit.of(record) for unit, record in held.items()}, ROWS, views)
    settled = former.settle(held, ROWS, views, table)
    assert ledger.settle(table).to_pylist() == settled.to_pylist()
    expected = former.assign(held, ROWS, table, retry=retry)
    found = ledger.assign(table, retry=retry)
    assert found.to_pylist() == expected.to_pylist()
    expected = former.settle(held, ROWS, views, expected)
    found = ledger.settle(found)
    assert found.to_pylist() == expected.to_pylist()
    assert found.schema == expected.schema
    work = [(units, dict(rows)) for units, rows in ledger.missing(found)]
    assert work == former.missing(held, ROWS, views, expected)


@given(texts=st.lists(WORDS | st.text("left right LEFTMOST\u017f\u212a\v\x1c\n", max_size=12), max_size=30))
@pytest.mark.parametrize("pattern", [NO_FLIP, "none", "", r"^\s|e$", r"(?i)[[:alpha:]]", r"a++b|\Zc", "écla"])
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_flips_are_those_of_pythons_expressions(texts: list[str], pattern: str) -> None:
    """Whatever the instructions and the pattern hold that other engines take otherwise."""
    table = pa.Table.from_pylist([{"instruction": text} for text in texts], schema=SAMPLES)
    assert mark_flips(table, pattern)["flip"].to_pylist() == former.flips(texts, pattern)


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_record_by_column_says_what_one_by_row_says(kind: str, tmp_path: Path) -> None:
    """Keys in one string and sizes in six lists, with rows that hold nothing, are read as those of format 1."""
    keys = [PAIRS[0], None, PAIRS[5], PAIRS[7], None]
    sizes = [[9, 8, 7, 6, 0, 1], None, [5, 4, 3, 2, 1, 0], None, None] if kind == "images" else None
    files = {"data.zarr/edited/c/3/0/0/0/0": {"bytes": 7, "crc32c": "01234567"}}
    write_commit(tmp_path, Unit(kind, 3), keys, sizes, {3: "torn"}, files)
    (path,) = (tmp_path / "commits").iterdir()
    record = read_record(path)
    assert record["keys"] == f"{PAIRS[0]}-{PAIRS[5]}{PAIRS[7]}-"
    old = {"keys": keys, "sizes": sizes, "quarantined": {"3": "torn"}, "files": files}
    new, former = Commit.of(record), Commit.of(json.loads(json.dumps(old)))
    assert new.keys.to_pylist() == former.keys.to_pylist() == keys
    assert new.sizes.tolist() == former.sizes.tolist()
    assert (new.quarantined, new.files) == (former.quarantined, former.files) == ({3: "torn"}, files)


def test_columns_that_a_cache_does_not_know_are_carried_along() -> None:
    """A sample that stays keeps what an extra column says of it, wherever it stands; a new one has nothing there."""
    old = pa.table({"key": ["a", "b", "c"], "row": [0, 1, 2], "score": [1.5, 2.5, 3.5], "source": ["x", None, "z"]})
    new = pa.table({"key": ["c", "d", "b", "c"], "row": [-1] * 4})
    found = carry(old, new)
    assert found.column_names == ["key", "row", "score", "source"]
    assert found["score"].to_pylist() == [3.5, None, 2.5, 3.5]
    assert found["source"].to_pylist() == ["z", None, None, "z"]
