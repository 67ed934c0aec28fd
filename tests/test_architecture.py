"""The rules of the house, read from the sources: floors, rooms, sizes, one of each, and the plan in the docs."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("encode", "infer", "train")

# From the ground up: a module imports from its own room, or from floors below. This list is the architecture.
FLOORS = """
    encode.base
    encode.judging
    encode.config
    encode.cache
    encode.data  encode.models
    encode.geometry  encode.cached  encode.early
    encode.dataset
    encode.planning
    encode.pipeline
    encode.scores
    encode.run
    encode.__main__  encode.keeper
    infer.editing  infer.lora
    infer.config  infer.kind
    infer.models  infer.jobs  infer.score.metrics
    infer.drawing  infer.outputs  infer.export
    infer.edit  infer.summary
    infer.batch
    infer.score  infer.ui
    infer.__main__
    train.demands  train.learning
    train.config
    train.objective  train.agree  train.command
    train.data  train.unet
    train.memory  train.save
    train.watch
    train.machine
    train.setup
    train.need
    train.run
    train.__main__
"""
LARGEST = {"modules in a folder": 12, "lines of a module": 220, "lines of a function": 60}

# What one module does for all, and which; a name, or the end of a dotted one.
ONE_OF_EACH = {
    "PIL.Image.open": {"encode.data.pictures", "infer.outputs"},  # the latter reads what a PNG says of itself
    "load_dataset": {"encode.data.tables"},
    "tqdm": {"encode.base.console"},
    "tyro": {"encode.base.flags", "encode.base.verbs"},
    "get_close_matches": {"encode.base.errors"},
    "register_forward_hook": set(),
    "braceexpand": set(),
}


def paths(root: Path = ROOT) -> dict[str, Path]:
    """Each module of the product by its dotted name; `__init__` files hold nothing and are looked at apart."""
    files = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path for path in files if path.name != "__init__.py"
    }


MODULES = paths()


def imports(source: str, module: str) -> Iterator[str]:
    """Absolute names of all that a module of ip2p imports: at its top, inside functions, for type checkers alone."""
    folder = ["ip2p", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = folder[: len(folder) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """For each module, the modules that it imports."""
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name.removeprefix("ip2p.") for name in imports(path.read_text(), module) if name.startswith("ip2p.")}
        targets = {name if name in modules else name.rpartition(".")[0] for name in names}
        found[module] = (targets & modules.keys()) - {module}
    return found


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The groups of modules that reach each other."""
    reached = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for targets in reached.values():
            if middle in targets:
                targets |= reached[middle]
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }


def room(module: str) -> tuple[int, str]:
    """Number of the floor that a module stands on, from the ground, and its room there."""
    for number, floor in enumerate(FLOORS.strip().splitlines()):
        for name in floor.split():
            if module == name or module.startswith(f"{name}."):
                return number, name
    raise AssertionError(f"{module} stands on no floor: give it a room in FLOORS")


def functions(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Each function and method by its dotted name, with its lines."""

    def inside(node: ast.AST, name: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not isinstance(child, ast.ClassDef):
                    yield f"{name}.{child.name}", (child.end_lineno or 0) - child.lineno + 1
                yield from inside(child, f"{name}.{child.name}")

    return inside(ast.parse(path.read_text()), module)


def uses(source: str, module: str, name: str) -> bool:
    """Whether a module imports `name`, or reaches it as an attribute, as in `Image.open` or `datasets.load_dataset`."""
    imported = set(imports(source, module))
    if any(name in (found, found.partition(".")[0], found.rpartition(".")[2]) for found in imported):
        return True
    owner, _, last = name.rpartition(".")
    nodes = ast.walk(ast.parse(source))
    holders = {ast.unparse(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == last}
    return bool(holders) and (not owner or (owner in imported and owner.rpartition(".")[2] in holders))


def tree(document: str) -> set[str]:
    """The files of the plan: `folder/` and below it, indented by two, folders and `file.py  what it is for`."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if re.search(r"^encode/", block, re.MULTILINE))
    files, folders = set(), []
    for line in block.splitlines():
        if entry := re.match(r"( *)(\w+)(/|\.py)\s{2,}\S", line):
            depth = len(entry[1]) // 2
            folders = [*folders[:depth], entry[2]]
            if entry[3] == ".py":
                files.add(".".join(folders))
    return files


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import ip2p.train.run", "ip2p.train.run"),
        ("from ip2p.train import run", "ip2p.train.run"),
        ("from ...train.run import train", "ip2p.train.run.train"),
        ("from .. import geometry", "ip2p.encode.geometry"),
        ("from .format import Cache", "ip2p.encode.cache.format.Cache"),
        ("def late():\n    from ...train import run", "ip2p.train.run"),
        ("if TYPE_CHECKING:\n    from ..run import encode", "ip2p.encode.run.encode"),
    ],
)
def test_every_way_to_write_an_import_is_seen(source: str, name: str) -> None:
    """The reader of imports, on which the rules below stand, resolves each spelling to an absolute name."""
    assert list(imports(source, "encode.cache.reader")) == [name]


LATE = "def late():\n    from .tables import x"
TYPED = "if TYPE_CHECKING:\n    from .tables import x"


@pytest.mark.parametrize("hidden", [LATE, TYPED], ids=["late", "typed"])
def test_a_circle_is_found_however_it_is_hidden(tmp_path: Path, hidden: str) -> None:
    """As those that `sources` and `tables`, `keeper` and `verbs` once were."""
    (tmp_path / "encode").mkdir()
    (tmp_path / "encode" / "sources.py").write_text(hidden)
    (tmp_path / "encode" / "tables.py").write_text("from .sources import file_state")
    assert circles(arrows(paths(tmp_path))) == {frozenset({"encode.sources", "encode.tables"})}
    (tmp_path / "encode" / "tables.py").write_text("")
    assert circles(arrows(paths(tmp_path))) == set()


def test_no_circle_of_modules() -> None:
    """Late imports and those for type checkers count."""
    assert circles(arrows(MODULES)) == set()


def test_arrows_lead_down() -> None:
    """Each module imports from its own room or from lower floors: train, then infer, then encode."""
    up = []
    for module, targets in arrows(MODULES).items():
        floor, own = room(module)
        up += [f"{module} -> {target}" for target in targets if room(target)[1] != own and room(target)[0] >= floor]
    assert up == []


def test_floors_hold_no_empty_rooms() -> None:
    """What the list of floors names is there."""
    assert {room(module)[1] for module in MODULES} == set(FLOORS.split())


def test_folder_names_of_the_checkout_are_not_imported() -> None:
    """`import encode` works in the checkout alone."""
    names = {(module, name) for module, path in MODULES.items() for name in imports(path.read_text(), module)}
    assert [(module, name) for module, name in names if name.split(".")[0] in PACKAGES] == []


def test_nothing_is_too_large() -> None:
    """A newcomer sees a folder at a glance, and reads any module in one sitting."""
    found: dict[str, dict[str, int]] = {what: {} for what in LARGEST}
    for module, path in MODULES.items():
        folder = module.rpartition(".")[0]
        found["modules in a folder"][folder] = found["modules in a folder"].get(folder, 0) + 1
        found["lines of a module"][module] = len(path.read_text().splitlines())
        found["lines of a function"] |= dict(functions(module, path))
    for what, most in LARGEST.items():
        assert {name: count for name, count in found[what].items() if count > most} == {}, what


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_of_each(name: str) -> None:
    """What all commands need is done in one place."""
    users = {module for module, path in MODULES.items() if uses(path.read_text(), module, name)}
    assert users == ONE_OF_EACH[name]


def test_files_are_put_in_place_by_one_function() -> None:
    """Only what writes files whole, and three that write folders whole, rename."""
    renames = re.compile(r"\bos\.(replace|rename)\(|\.rename\(|\b(temporary|unfinished|partial)\w*\.replace\(")
    users = {module for module, path in MODULES.items() if renames.search(path.read_text())}
    assert users == {"encode.base.files", "encode.models.single_file", "train.save.best", "train.save.checkpoint"}


def test_the_ground_floor_is_light() -> None:
    """The manners of all commands stand on small libraries: whatever imports them does not wait for torch."""
    names = {
        name.split(".")[0]
        for module, path in MODULES.items()
        if module.startswith("encode.base.")
        for name in imports(path.read_text(), module)
    }
    assert names & {"torch", "numpy", "accelerate", "datasets", "diffusers", "transformers", "zarr"} == set()


def test_scripts_are_called_differently() -> None:
    """They import each other by their bare names, and one process may see several folders of them."""
    names = [path.name for folder in ("bench", "examples/openmoji", "tests") for path in (ROOT / folder).glob("*.py")]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_by_saying_what_it_is_for(module: str) -> None:
    """Each module starts with a docstring, and that with a paragraph ended like a sentence."""
    docstring = ast.get_docstring(ast.parse(MODULES[module].read_text())) or ""
    assert docstring.split("\n\n")[0].endswith((".", ":"))


def test_the_plan_names_exactly_the_modules_there_are() -> None:
    """The tree in docs/architecture.md is the architecture: it names each module, with a comment, and no other."""
    assert tree((ROOT / "docs" / "architecture.md").read_text()) == MODULES.keys()
