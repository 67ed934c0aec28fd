"""What `--keep` takes for a condition, and which rows it keeps."""

import random

import pyarrow as pa
import pytest

from ip2p.encode.base.errors import SettingsError
from ip2p.encode.cache.condition import FUNCTIONS, Condition, parse
from ip2p.encode.cache.keep import kinds, matching

TABLE = pa.table(
    {
        "score": [1.5, 5.0, 9.0, None, float("nan")],
        "year": [1, 2, 3, 4, 2**53 + 1],
        "source": ["a", "b'c", None, "A", "ü"],
        "ok": [True, False, None, True, True],
        "a b": [1, 1, 2, 2, 3],
        "vector": [[1.0]] * 5,
        "key": pa.array([b"0"] * 5, pa.binary()),
    }
)


def rows(text: str) -> list[int]:
    """The rows that a condition keeps of the table."""
    condition = parse(text, kinds(TABLE.schema))
    return matching(TABLE.select(condition.columns), condition).nonzero()[0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score > 2", [1, 2]),
        ("not score > 2", [0]),  # neither NULL nor NaN, which is NULL here, is more or less than anything
        ("score is null or score >= 9.", [2, 3, 4]),
        ("SCORE > 2 AND Year < 3", [1]),
        ("year = 9007199254740993", [4]),
        ("year = 1 or year = 2 and ok", [0]),
        ("(year = 1 or year = 2) and not ok", [1]),
        ("source = 'b''c'", [1]),
        ("source <> 'a'", [1, 3, 4]),
        ("source like 'A' -- either case", [0, 3]),
        ("source not glob '[aA]' /* and so on", [1, 4]),
        ('"a b" between 2 and 2 and `a b` = [a b] + 0', [2, 3]),
        ("ok", [0, 3, 4]),
        ("ok = false", [1]),
        ("source in ('a', 'A') and year not in (1)", [3]),
        ("source is not null and length(source) > 1", [1]),
        ("coalesce(score, -1) < 0", [3, 4]),
        ("lower(source) || '!' = 'a!'", [0, 3]),
        ("cast(substr(source || '7', 2) as integer) = 7", [0, 3, 4]),
        ("min(year, score) < - - 2", [0]),
        ("year % 2 = 1 and ~year & 2 = 2", [0, 4]),
        ("null", []),
        ("1 = 1", [0, 1, 2, 3, 4]),
    ],
)
def test_a_condition_keeps_the_rows_for_which_it_is_true(text: str, expected: list[int]) -> None:
    """As SQL has it: names in either case, text in single quotes, and what is unknown is not kept."""
    assert rows(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"scor" > 7', r"no column scor, but score, year, source, ok, a b; did you mean score\?"),
        ('source = "nowhere"', "no column nowhere, .*; text stands in 'single' quotes"),
        ("vector > 1", "no column vector"),
        ("key = 'x'", "no column key"),
        ("number > 1", "no column number"),
        ("c0 > 1", "no column c0"),
        ("samples.score > 1", "cannot be read from"),
        *[
            (mixed, "text stands for a number or is compared with one")
            for mixed in (
                "source > 7",
                "score > '7'",
                "'abc' > 7",
                "(source) = ((7))",
                "lower(source) < year",
                "source || 1 > 7",
                "score in (1, '2')",
                "source in (1)",
                "score between 1 and '2'",
                "source between 1 and 2",
                "score not between 'a' and 'b'",
                "score is not 'a'",
                "score like 'a%'",
                "source like 1",
                "source + 1 > 0",
                "-source < 0",
                "coalesce(score, 'x') = 'x'",
                "max(source, 1) = 1",
                "abs(source) = 1",
                "length(year) = 1",
                "substr(source, 'a') = 'b'",
                "source",
                "score > 1 and source",
                "not source",
                "cast(score as text) > 7",
            )
        ],
        ("", "expected a column, a number or text, found the end"),
        ("score >", "found the end"),
        ("score > 1 2", "expected and, or, or the end, found 2"),
        ("score > 1)", r"found \)"),
        ("(score > 1", r"expected \), found the end"),
        ("score > 'a", 'cannot be read from "\'a" on'),
        ("score > 0x10", "cannot be read"),
        ("score = ?", "cannot be read"),
        ("score > :a", "cannot be read"),
        ("x'00' = 1", "no column x"),
        ("score > 1\0", "cannot be read"),
        ("source = '\0'", "null character"),
        ("source = '\udcff'", r"source = '\\udcff': expected text in UTF-8"),
        ("score > 1; drop table samples", "cannot be read from '; drop"),
        ("1) union select (2", r"found \)"),
        ("score > (select 1)", "no column select"),
        ("exists (select 1)", "no function exists"),
        ("source in (select name from sqlite_master)", "no column select"),
        ("random() > 0", "no function random, but abs"),
        ("load_extension('x')", "no function load_extension"),
        ("readfile('/etc/passwd') = ''", "no function readfile"),
        ("current_timestamp > ''", "no column current_timestamp"),
        ("date('now') > ''", "no function date"),
        ("min(score) < 1", "misuse of aggregate"),
        ("abs(1, 2)", "wrong number of arguments"),
        ("(" * 5000 + "1" + ")" * 5000, "nested more than 100 deep"),
        ("not " * 5000 + "ok", "nested more than 100 deep"),
        (" or ".join(["ok"] * 5000), "too large"),
        ("length(" + "replace(" * 15 + "'aaaa'" + ", 'a', 'aaaa')" * 15 + ") > 0", "too big"),
        ("abs(-9223372036854775807 - 1) > 0", "integer overflow"),
    ],
)
def test_what_is_no_condition_is_answered_in_a_line(text: str, said: str) -> None:
    """Mistakes that SQLite forgives, junk and attacks: nothing is kept by them, and no line is endless."""
    with pytest.raises(SettingsError, match=said) as caught:
        rows(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_several_columns_of_a_name_are_told_apart_by_case() -> None:
    """SQL does not mind case, datasets do."""
    table = {"Score": "number", "score": "text"}
    assert parse("Score > 1", table).columns == ["Score"]
    with pytest.raises(SettingsError, match="SCORE may be Score or score: write the column as it is called"):
        parse("SCORE > 1", table)


@pytest.mark.parametrize(
    "sql",
    [
        "1) union select number from samples where (random() > 0",
        "(select count(*) from sqlite_master) = 0",
        "(with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n) = 0",
        "load_extension('x')",
        "writefile('x', 'y')",
        "current_timestamp > ''",
        "1); drop table samples; --",
        "1) returning (1",
    ],
)
def test_the_engine_refuses_what_a_condition_never_needs(sql: str) -> None:
    """Were such a thing understood as a condition, the engine would still read its one table alone."""
    with pytest.raises(SettingsError, match="--keep"):
        matching(TABLE.select(["year"]), Condition("", sql, ["year"]))


def test_rows_that_are_not_there_are_not_kept() -> None:
    """Were the engine to name others, they would select nothing, and no other row."""
    sql = "year < 3) union select -1 union select 5 union select 'a' union select null where (1"
    hostile = Condition("", sql.replace("year", "c0"), ["year"])
    assert matching(TABLE.select(["year"]), hostile).tolist() == [True, True, False, False, False]


def test_junk_never_ends_otherwise_than_in_a_line() -> None:
    """Whatever tokens follow each other, rows are kept or a sentence says why not."""
    pieces = [*"()+-*/%,;'\"`[]=<>&|~?.", "||", "<=", "!=", "--", "/*", "*/", "\n", "1", "0.5", "1e9", "9" * 30, "'x'"]
    pieces += ["score", "source", "[a b]", '"ok"', "and", "or", "not", "in", "is", "null", "between", "like", "glob"]
    pieces += [
        "case",
        "when",
        "then",
        "end",
        "cast(",
        "as",
        "text",
        "select",
        "from",
        "samples",
        *map("{}(".format, FUNCTIONS),
    ]
    random_ = random.Random(0)
    kept = refused = 0
    for _ in range(3000):
        text = " ".join(random_.choices(pieces, k=random_.randint(1, 7)))
        try:
            kept += rows(text) is not None
        except SettingsError:
            refused += 1
    assert kept > 10
    assert refused > 2000
