"""What `pip install` gives a user: the built wheel, in an environment that never sees the sources."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: an old build/ folder in the checkout would leak stale modules into it."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, "source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


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
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


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
