"""Tests of the pages as a whole: links lead somewhere, and the index names each page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub makes links of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_to_a_page_and_a_heading_that_are_there(page: Path) -> None:
    """Of links inside the repository; those to elsewhere are not followed."""
    for place, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text()):
        target = (page.parent / place) if place else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), f"{place}#{anchor}"


def test_the_index_names_each_page() -> None:
    """A page that nobody finds is not written."""
    index = (ROOT / "docs" / "README.md").read_text()
    lacks = [page.name for page in PAGES[2:] if page.name != "README.md" and f"]({page.name})" not in index]
    assert lacks == []


def test_no_page_installs_ip2p_from_an_index() -> None:
    """It is on none."""
    assert [page.name for page in PAGES if re.search(r"pip install ['\"]?ip2p", page.read_text())] == []
