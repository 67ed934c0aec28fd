"""Writes the newest results into the tables of the docs, each figure with the file that it comes from."""

import json
import re
from pathlib import Path
from typing import Any

from common import RESULTS, Row, number

PAPER = "On paper"
PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("performance.md", "memory.md")]


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def filled(page: str, results: Path) -> str:
    """The page with its tables written anew: each stands between `<!-- NAME: PATTERN -->` and `<!-- end -->`.

    NAME is a results file and PATTERN a regular expression for its rows. What its group `column` takes of their names
    heads a column, and rows that are otherwise called the same are one.
    """
    return re.sub(
        r"(<!-- (\w+): ([^\n]+) -->\n).*?(<!-- end -->)",
        lambda found: found[1] + table(results / f"{found[2]}.jsonl", found[3]) + found[4],
        page,
        flags=re.DOTALL,
    )


def table(file: Path, pattern: str) -> str:
    """The rows of a results file whose names match, as Markdown: of its newest line, whose commit and load it names.

    Medians have the lowest and the highest of what they are of in brackets. A benchmark that was run in parts has
    several lines of one commit, alike but for what they leave out: they count as one.
    """
    if not file.is_file():
        return f"\nNot measured yet (`bench/results/{file.name}`).\n\n"
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    measured = [line for line in lines if place(line) == place(lines[-1]) and commit(line) == commit(lines[-1])]
    found: dict[str, dict[str, Any]] = {}
    for line in measured:
        found |= line["rows"]
    rows = [Row(**{name: row[name] for name in Row._fields if name in row}) for row in found.values()]
    where = place(lines[-1])[0]
    commits = " and ".join(dict.fromkeys(str(line["commit"]) for line in measured))
    load = f", load {max(line['machine']['load'] for line in measured):g}" if where != PAPER else ""
    head = f"{where}, {lines[-1]['date'][:10]}, commit {commits}{load} (`bench/results/{file.name}`)"
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if named := re.search(pattern, row.what):
            column = named.groupdict().get("column") or ""
            line = cells.setdefault(row.what.removesuffix(column).rstrip(": "), {})
            shown = f"{number(row.value)} {row.unit}" + f" ({row.spread})" * bool(row.spread)
            line |= {column: shown} | ({"bar": row.bar} if row.bar else {})
    columns = [*dict.fromkeys(column for line in cells.values() for column in line if column != "bar")]
    columns += ["bar"] * any("bar" in line for line in cells.values())
    table = [[head, *columns], ["---"] * (1 + len(columns))]
    table += [[name, *(line.get(column, "") for column in columns)] for name, line in cells.items()]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in table) + "\n"


def commit(line: dict[str, Any]) -> str:
    """What was measured, whether the tree was clean or, as once could be, was not."""
    return str(line["commit"]).removesuffix("-dirty")


def place(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a line was measured, and with what settings."""
    machine = line["machine"]
    settings = {name: value for name, value in line["settings"].items() if name != "only"}
    if "rounds" not in settings:
        return PAPER, settings
    return machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}", settings


if __name__ == "__main__":
    main()
