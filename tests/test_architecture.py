"""The rules of the layout, read from the sources: who imports whom, and what README.md says stands where."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package, and the ones it may import: the cache and the pictures know nothing of training.
MAY_IMPORT = {"encode": {"encode"}, "train": {"encode", "train", "infer"}, "infer": {"infer"}}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).glob("*.py"))]


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of all that a module of `ip2p.<package>` imports, inside its functions as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package itself, two dots are ip2p.
            parents = ["ip2p", package][: 3 - node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def tree(readme: str) -> dict[str, set[str]]:
    """Files per folder in the README's tree: a line `encode/`, then, indented, `cache.py  what it is for`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if re.search(r"^encode/", block, re.MULTILINE))
    files: dict[str, set[str]] = {}
    folder = ""
    for line in block.splitlines():
        if heading := re.match(r"(\S+)/(\s|$)", line):
            folder = heading[1]
        elif entry := re.match(r"\s+(\S+\.py)\s{2,}\S", line):
            files.setdefault(folder, set()).add(entry[1])
    return files


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import ip2p.train.run", "ip2p.train.run"),
        ("from ip2p.train import loop", "ip2p.train.run"),
        ("from ..train.loop import train", "ip2p.train.run.train"),
        ("from .. import train", "ip2p.train"),
        ("from .cache import Cache", "ip2p.encode.cache.format.Cache"),
        ("def late():\n    from ..train import loop", "ip2p.train.run"),
    ],
)
def test_every_way_to_write_an_import_is_seen(source: str, name: str) -> None:
    """The reader of imports, on which the rules below stand, resolves each spelling to an absolute name."""
    assert list(imports(source, "encode")) == [name]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_follow_the_arrows(path: Path) -> None:
    """Training may use encoding and inference; these two use neither training nor each other."""
    package = path.parent.name
    names = [name.split(".") for name in imports(path.read_text(), package)]
    assert {parts[1] for parts in names if parts[0] == "ip2p"} <= MAY_IMPORT[package]
    assert not {parts[0] for parts in names} & MAY_IMPORT.keys(), "the folder name works in the checkout alone"


def test_at_most_two_modules_touch_tyro() -> None:
    """The command line library stays replaceable: no more than two modules import it."""
    users = [
        path for path in MODULES if any(n.split(".")[0] == "tyro" for n in imports(path.read_text(), path.parent.name))
    ]
    assert 1 <= len(users) <= 2, users


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_are_flat(package: str) -> None:
    """No module lies deeper than its package: a nested one would be missing from the wheel without a word."""
    assert (ROOT / package / "__init__.py").is_file()
    assert {path.parent for path in (ROOT / package).rglob("*.py")} == {ROOT / package}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_opens_by_saying_what_it_is_for(path: Path) -> None:
    """Each module starts with a docstring, and that with a paragraph ended like a sentence."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert docstring.split("\n\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_readme_lists_exactly_the_modules_there_are(package: str) -> None:
    """The tree in README.md is the architecture: it names each module, with a comment, and no other."""
    existing = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert tree((ROOT / "README.md").read_text())[package] == existing
