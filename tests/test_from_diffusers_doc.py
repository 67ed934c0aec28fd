"""Tests of docs/from-diffusers.md: what it says about other scripts is guarded by tests that exist."""

import re
from pathlib import Path

import pytest

from ip2p.encode.base.flags import flags_of
from ip2p.encode.config import EncodeConfig
from ip2p.train.config import TrainConfig
from test_flags import FLAGS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "from-diffusers.md").read_text(encoding="utf-8")
GUARDS = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)))


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below a heading."""
    lines = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.parametrize(("file", "name"), GUARDS, ids=[name for _, name in GUARDS])
def test_each_test_that_the_page_names_is_there(file: str, name: str) -> None:
    """A test that is renamed takes its mention along."""
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_each_difference_names_the_test_that_guards_it() -> None:
    """No row of the table is a mere claim."""
    rows = table("What is different on purpose")
    assert len(rows) > 30
    for there, here, guards in rows:
        assert there
        assert here
        assert re.fullmatch(r"(`test_\w+\.py::test_\w+` ?)+", guards), there


def test_the_table_of_flags_names_each_flag_of_both_scripts_and_no_other() -> None:
    """Each stands in one row; a star is for all that begin so."""
    names = [name for flags, *_ in table("Flags") for name in re.findall(r"`(\w+\*?)`", flags)]
    known = flags_of(EncodeConfig).keys() | flags_of(TrainConfig).keys()
    assert len(names) == len(set(names))
    for name in names:
        assert [flag for flag in known if re.fullmatch(name.replace("*", ".*"), flag)], name
    for flag in FLAGS.keys() & known:
        assert [name for name in names if re.fullmatch(name.replace("*", ".*"), flag)], flag
