"""What `pip install` gives a user: source distribution and wheel, in an environment that never sees the sources."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from test_architecture import imports

ROOT = Path(__file__).parents[1]
FOLDERS = ("encode", "train", "infer")
SOURCES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = PROJECT["scripts"]


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed, started away from the sources and without PYTHON* variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, f"{command} ended with {process.returncode}:\n{process.stdout}{process.stderr}"
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel made of that.

    They are built from a copy: an old build/ folder in the checkout would leak stale modules into them.
    """
    folder = tmp_path_factory.mktemp("built")
    unwanted = (".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*unwanted))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, "source", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sources(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    (path,) = built.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel in it, which borrows the dependencies of the running one.

    A folder named in a .pth file joins sys.path, but its own .pth files are not read: so the editable install
    of the running environment stays behind.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    scripts, purelib = places(folder)
    (purelib / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", scripts / "python", *install, cwd=folder)
    return folder


def places(environment: Path) -> tuple[Path, Path]:
    """The folders of scripts and of pure Python packages in a virtual environment."""
    names = {"base": str(environment), "platbase": str(environment)}
    paths = sysconfig.get_paths("venv", vars=names)
    return Path(paths["scripts"]), Path(paths["purelib"])


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    """A wheel holds each module of the three packages, the marks of their types and metadata: no tests, no examples."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"ip2p/{source}" for source in SOURCES} | {f"ip2p/{folder}/py.typed" for folder in FOLDERS}


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    """Whoever receives the wheel receives the licence text with it."""
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith("/Apache-2.0.txt"))
        assert archive.read(licence) == (ROOT / "LICENSES" / "Apache-2.0.txt").read_bytes()


def test_the_source_distribution_holds_all_of_the_repository(sources: Path) -> None:
    """Whatever git tracks, and nothing more but what setuptools adds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    names = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    added = {name for name in names if name.startswith("ip2p.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - added == {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.mark.slow
def test_an_index_would_take_both(built: Path) -> None:
    """Their metadata and README are as `twine check` wants them."""
    files = [*built.glob("*.whl"), *built.glob("*.tar.gz")]
    assert len(files) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)


@pytest.mark.slow
def test_the_tests_of_a_source_distribution_run(sources: Path, environment: Path) -> None:
    """Against the wheel, in an environment without the checkout: some that read docs and sources, some that compute."""
    scripts, purelib = places(environment)
    program = "import ip2p.encode; print(ip2p.encode.__file__)"
    assert Path(run(scripts / "python", "-c", program, cwd=sources).strip()).is_relative_to(purelib)
    some = [f"tests/test_{name}.py" for name in ("architecture", "flags", "reader")]
    said = run(scripts / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *some, cwd=sources)
    assert re.search(r"^\d+ passed", said.splitlines()[-1])


@pytest.mark.slow
def test_type_checkers_see_the_hints(environment: Path, tmp_path: Path) -> None:
    """In a program that imports the installed packages, a right use is none, and a wrong one an error."""
    scripts, _ = places(environment)
    lines = [
        "from ip2p.infer import Editor",
        'made = Editor("model").edit("photo.jpg", "make it snowy")[0].size',
        "width: str = made[0]",
    ]
    (tmp_path / "program.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--level", "error"]
    command += ["--pythonpath", str(scripts / "python"), "program.py"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = json.loads(checked.stdout)["generalDiagnostics"]
    assert [(one["rule"], one["range"]["start"]["line"]) for one in found] == [("reportAssignmentType", 2)]


def test_nobody_is_told_to_install_what_no_index_has() -> None:
    """As long as ip2p is on none, texts name the packages of its extras."""
    folders = ("bench", "docs", "encode", "examples", "infer", "train")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py")]
    files += ROOT.glob("*.md")
    assert len(files) > len(SOURCES)
    assert [path for path in files if re.search(r"pip install\s+'?ip2p", path.read_text(encoding="utf-8"))] == []


def test_no_private_module_of_zarr_is_imported() -> None:
    """Its core may change with any version; caches are to last."""
    names = {name for source in SOURCES for name in imports((ROOT / source).read_text(), source)}
    assert "zarr.abc.buffer.Buffer" in names
    assert {name for name in names if name.startswith("zarr.core") or re.match(r"zarr\b.*\._", name)} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_installed_command_answers_help(environment: Path, script: str) -> None:
    """Each console script of an installation answers --help with its usage."""
    scripts, _ = places(environment)
    assert f"usage: {script}" in run(scripts / script, "--help", cwd=environment)
    assert run(scripts / script, "--version", cwd=environment) == f"ip2p {PROJECT['version']}\n"


@pytest.mark.slow
def test_every_installed_module_imports_without_the_sources(environment: Path) -> None:
    """Each module imports from the wheel alone, so none reaches for a file or a name of the checkout."""
    modules = sorted(f"ip2p.{source.removesuffix('.py').replace('/', '.')}" for source in SOURCES)
    program = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    scripts, purelib = places(environment)
    origins = run(scripts / "python", "-c", program, *modules, cwd=environment).splitlines()
    assert [Path(origin).resolve() for origin in origins] == [
        (purelib / name.replace(".", "/")).with_suffix(".py").resolve() for name in modules
    ]
