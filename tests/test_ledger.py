"""Tests of the ledger: who gets which row, what counts as cached, what is still to be encoded."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakes
from fakes import Pairs
from ip2p.encode.cache.commits import Commit, Unit
from ip2p.encode.cache.format import SAMPLES
from ip2p.encode.cache.samples import NULL_PROMPT, Ledger, text_key
from ip2p.encode.data.pairs import Pair
from ip2p.encode.planning.index import identify

ROWS = {"images": 4, "text": 3}
SIZES = [12, 8, 10, 6, 0, 1]  # original width and height, edited width and height, crop top and left
Commits = dict[Unit, Commit]
images, texts = partial(Unit, "images"), partial(Unit, "text")


def samples(*contents: tuple[str, str], reason: str | None = None) -> pa.Table:
    """A table of samples that nobody has looked at yet, from (pair, instruction)."""
    status = {"row": -1, "text_row": -1, "status": "quarantined" if reason else "pending", "reason": reason}
    rows = [
        {"key": f"{pair}/{text}", "pair": pair, "position": position, "instruction": text} | status
        for position, (pair, text) in enumerate(contents)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def committed(unit: Unit, *keys: str | None, **reasons: str) -> Commits:
    """The record of a unit whose first rows hold `keys`; reasons by key."""
    keys += (None,) * (ROWS[unit.kind] - len(keys))
    record = {
        "keys": [text_key(key) if unit.kind == "text" and key is not None else key for key in keys],
        "sizes": [key and SIZES for key in keys],
        "quarantined": {str(keys.index(key)): reason for key, reason in reasons.items()},
    }
    return {unit: Commit.of(record)}


def ledger(*records: Commits, views: int = 1) -> Ledger:
    """What is committed in shards of `ROWS` rows."""
    return Ledger({unit: record for commits in records for unit, record in commits.items()}, ROWS, views)


def rows(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["row"].to_pylist(), table["text_row"].to_pylist(), strict=True))


def finish(table: pa.Table, before: Ledger) -> Ledger:
    """The ledger as it stands when everything missing has been encoded."""
    done = dict(before.commits)
    for units, content in before.missing(table):
        for unit in units:
            first = unit.shard * ROWS[unit.kind]
            at = [content.get(first + n) for n in range(ROWS[unit.kind])]
            done |= committed(unit, *(item if item is None or unit.kind == "text" else item.pair for item in at))
    return Ledger(done, ROWS, before.views)


def contents_of(ledger: Ledger) -> dict[Unit, list[str | None]]:
    """What each unit holds."""
    return {unit: commit.keys.to_pylist() for unit, commit in ledger.commits.items()}


def some_of(whole: Ledger, data: st.DataObject, more: int = 0) -> Ledger:
    """What is left of a ledger that lost any of its units, with `more` views than it had."""
    kept = data.draw(st.sets(st.sampled_from(sorted(whole.commits))))
    commits = {unit: record for unit, record in whole.commits.items() if unit in kept}
    return Ledger(commits, ROWS, whole.views + more)


def test_rows_are_given_in_order_of_first_appearance_and_equal_content_shares_one() -> None:
    """Pairs count up from row 0; instructions from row 1, since the empty one has row 0."""
    table = ledger().assign(samples(("a", "red"), ("b", "red"), ("a", "blue"), ("c", "red")))
    assert rows(table) == [(0, 1), (1, 1), (0, 2), (2, 1)]


def test_a_sample_that_cannot_be_tried_gets_no_row() -> None:
    """What has no image or no instruction takes no place in the shards."""
    table = pa.concat_tables([samples(("a", ""), reason="the instruction is empty"), samples(("b", "red"))])
    assert rows(ledger().assign(table)) == [(-1, -1), (0, 1)]


def test_finished_shards_stay_closed() -> None:
    """Known content keeps its row and new content goes behind, though the last finished shard has rows left."""
    held = ledger(committed(images(0), "a", "b"), committed(texts(0), NULL_PROMPT, "red"))
    table = held.assign(samples(("c", "blue"), ("b", "red"), ("a", "blue"), ("d", "red")))
    assert rows(table) == [(4, 3), (1, 1), (0, 3), (5, 1)]


def test_unfinished_shards_before_finished_ones_are_filled() -> None:
    """New content takes the first shard without a record."""
    held = ledger(committed(images(1), "a", "b"))
    assert [row for row, _ in rows(held.assign(samples(("b", "x"), ("c", "x"))))] == [5, 0]


contents = st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from("uvwxyz")), min_size=1, max_size=20)


@given(contents=contents, views=st.integers(1, 2), data=st.data())
def test_a_killed_encode_is_planned_as_it_was(contents: list, views: int, data: st.DataObject) -> None:
    """Whatever units were finished, the same dataset gets the same rows, and the rest is what was missing before."""
    table = ledger().assign(samples(*contents))
    whole = finish(table, ledger(views=views))
    left = some_of(whole, data)
    again = left.settle(left.assign(samples(*contents)))
    assert rows(again) == rows(table)
    assert contents_of(finish(again, left)) == contents_of(whole)


@given(before=contents, after=contents, views=st.integers(1, 2), more=st.integers(0, 1), data=st.data())
def test_any_plan_can_be_finished(before: list, after: list, views: int, more: int, data: st.DataObject) -> None:
    """Over any half-finished encode of another dataset, encoding what is missing leaves every sample ok."""
    left = some_of(finish(ledger().assign(samples(*before)), ledger(views=views)), data, more)
    plan = left.settle(left.assign(samples(*after)))
    end = finish(plan, left)
    assert end.commits.items() >= left.commits.items()
    assert set(end.settle(plan)["status"].to_pylist()) == {"ok"}
    assert not list(end.missing(end.settle(plan)))


def test_content_that_only_one_of_two_views_holds_is_encoded_anew() -> None:
    """A pair that was away while its shard got a second view cannot be added to that shard any more."""
    held = ledger(committed(images(0), "a", "b"), committed(images(0, 1), "a", None))
    assert [row for row, _ in rows(held.assign(samples(("a", "x"), ("b", "x"))))] == [0, 4]


def test_of_two_rows_with_the_same_content_the_one_with_more_views_counts() -> None:
    """A shard that lost its second view does not draw its content back from where that is whole."""
    first, second = committed(images(1), "a"), committed(images(1, 1), "a")
    others = committed(images(0), "a", "b") | committed(images(2), "a")
    held = ledger(others, first, second)
    assert [row for row, _ in rows(held.assign(samples(("a", "x"), ("b", "x"))))] == [4, 1]
    assert [row for row, _ in rows(ledger(others, first).assign(samples(("a", "x"))))] == [0]


def test_a_second_view_keeps_rows_and_asks_for_the_second_view_alone() -> None:
    """Rows stay where the first view is, and only units of the second are missing."""
    held = ledger(committed(images(0), "a", "b"), committed(texts(0), NULL_PROMPT, "x"), views=2)
    table = held.settle(held.assign(samples(("b", "x"), ("a", "x"))))
    assert [row for row, _ in rows(table)] == [1, 0]
    assert [units for units, _ in held.missing(table)] == [[images(0, 1)]]


@pytest.mark.parametrize("retry", [False, True])
def test_quarantined_content_gets_another_row_only_when_it_is_to_be_tried_again(retry: bool) -> None:
    """`--retry_quarantined` moves what was set aside, and nothing else."""
    odd = committed(texts(0), NULL_PROMPT, "x", "y", y="not finite")
    held = ledger(committed(images(0), "a", "b", b="torn"), odd)
    table = held.settle(held.assign(samples(("a", "x"), ("b", "x"), ("a", "y")), retry=retry))
    assert rows(table) == ([(0, 1), (4, 1), (0, 3)] if retry else [(0, 1), (1, 1), (0, 2)])
    again = ["ok", "pending", "pending"]
    assert table["status"].to_pylist() == (again if retry else ["ok", "quarantined", "quarantined"])


def test_content_that_a_later_try_saved_is_good() -> None:
    """Where one row was set aside and another holds the same content, the good one counts."""
    text = committed(texts(0), NULL_PROMPT, "x")
    held = ledger(committed(images(0), "a", a="torn"), committed(images(1), "a"), text)
    table = held.settle(held.assign(samples(("a", "x"))))
    assert rows(table) == [(4, 1)]
    assert table["status"].to_pylist() == ["ok"]


WHOLE = committed(images(0), "a") | committed(images(0, 1), "a") | committed(texts(0), NULL_PROMPT, "x")


@pytest.mark.parametrize("absent", [images(0), images(0, 1), texts(0)])
def test_a_sample_is_pending_while_one_unit_is_missing(absent: Unit) -> None:
    """Text and every view must be committed before a sample is ok."""
    whole = ledger(WHOLE, views=2)
    table = whole.assign(samples(("a", "x")))
    assert whole.settle(table)["status"].to_pylist() == ["ok"]
    rest = ledger({unit: record for unit, record in WHOLE.items() if unit != absent}, views=2)
    assert rest.settle(table)["status"].to_pylist() == ["pending"]
    assert [units for units, _ in rest.missing(rest.settle(table))] == [[absent]]


def test_an_ok_sample_knows_its_sizes() -> None:
    """Source sizes, and the crop in each view, come from the records."""
    sizes = np.array([[12, 8, 10, 6, 0, 3]] * ROWS["images"], np.int32).T
    second = {images(0, 1): WHOLE[images(0, 1)]._replace(sizes=sizes)}
    held = ledger(WHOLE, second, views=2)
    (sample,) = held.settle(held.assign(samples(("a", "x")))).to_pylist()
    assert [sample[f"{side}_{what}"] for side in ("original", "edited") for what in ("width", "height")] == SIZES[:4]
    assert (sample["crop_top"], sample["crop_left"]) == ([0, 0], [1, 3])


def test_one_bad_view_or_text_sets_the_sample_aside_with_its_reason() -> None:
    """Samples that share the bad part share its fate; the others do not."""
    views = committed(images(0), "a", "b") | committed(images(0, 1), "a", "b", b="not finite")
    held = ledger(views, committed(texts(0), NULL_PROMPT, "x", "y", y="too odd"), views=2)
    table = held.settle(held.assign(samples(("a", "x"), ("b", "x"), ("a", "y"))))
    assert table["status"].to_pylist() == ["ok", "quarantined", "quarantined"]
    assert table["reason"].to_pylist() == [None, "not finite", "too odd"]


def test_a_row_that_holds_other_content_does_not_count() -> None:
    """An old plan is not believed where the records say otherwise."""
    held = ledger(committed(images(0), "other"), committed(texts(0), NULL_PROMPT, "x"))
    table = ledger().assign(samples(("a", "x")))
    assert held.settle(table)["status"].to_pylist() == ["pending"]


def test_the_empty_instruction_is_encoded_even_if_no_sample_is_left() -> None:
    """Training always needs the null condition."""
    table = ledger().assign(samples(("a", ""), reason="the instruction is empty"))
    assert list(ledger().missing(table)) == [([texts(0)], {0: NULL_PROMPT})]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (Pair(None, b"x", "red"), "the original image is missing"),
        (Pair(b"x", None, "red"), "the edited image is missing"),
        (Pair(b"x", b"y", None), "the instruction is NoneType, expected text"),
        (Pair(b"x", b"y", 7), "the instruction is int, expected text"),
        (Pair(b"x", b"y", ["red"]), "the instruction is list, expected text"),
        (Pair(b"x", b"y", " \n"), "the instruction is empty"),
        (Pair(b"x", b"y", "make it \ud83d"), "the instruction holds half a character (a lone surrogate)"),
        (Pair(b"", b"y", "red"), None),  # an empty file is found out when it is read
    ],
)
def test_what_cannot_be_tried_stands_aside_from_the_start(pair: Pair, reason: str | None) -> None:
    """Missing sides and unusable instructions are named before anything is decoded."""
    (sample,) = identify(Pairs([pair]), fakes.SQUARES, range(1)).to_pylist()  # type: ignore[arg-type]
    assert (sample["status"], sample["reason"]) == ("quarantined" if reason else "pending", reason)


def test_identity_is_content() -> None:
    """Two samples are the same where both files and the instruction are; the boundary between files counts."""
    pairs = [Pair(b"ab", b"c", "x"), Pair(b"ab", b"c", "x"), Pair(b"ab", b"c", "y"), Pair(b"a", b"bc", "x")]
    table = identify(Pairs(pairs), fakes.SQUARES, range(4))  # type: ignore[arg-type]
    first, same, other_text, other_files = zip(table["pair"].to_pylist(), table["key"].to_pylist(), strict=True)
    assert first == same
    assert first[0] == other_text[0]
    assert first[1] != other_text[1]
    assert first[0] != other_files[0]
