"""What users see while a command runs: bars and sentences, by the main process alone.

Sentences go to the logger `ip2p`, and bars are drawn where it lets mere information through. Commands show both, unless
`--quiet` is given; in Python nothing but warnings is seen until `logging` is told otherwise.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from tqdm import tqdm

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # torchrun, accelerate, and kinds of MPI


def is_main_process() -> bool:
    """Whether this is the first of the processes that a launcher started; known before any library is imported."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


LOGGER = logging.getLogger("ip2p")


class Console(logging.Handler):
    """Prints messages, a line each, above any bar: warnings to stderr, others to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        file = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=file)
        file.flush()


def show_messages(*, quiet: bool = False) -> None:
    """Let this process print what is said: all of it, or warnings alone."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    if not LOGGER.handlers:
        LOGGER.addHandler(Console())
    LOGGER.propagate = False  # a library that sets up logging would print each message a second time


def is_quiet() -> bool:
    """Whether nothing but warnings is to be seen."""
    return not LOGGER.isEnabledFor(logging.INFO)


def say(*sentences: str) -> None:
    """Tell users something, a sentence each."""
    if is_main_process():
        for sentence in sentences:
            LOGGER.info(sentence)


def warn(sentence: str) -> None:
    """Warn users in a sentence: something was left out, and the work goes on."""
    if is_main_process():
        LOGGER.warning(sentence)


def amount(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def bar(items: Iterable[Any] | None, what: str, unit: str, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm over `items`, or one that is told of its progress; gone once done, unless `leave` is given.

    `what` is the work, such as "encode"; `unit` is what is counted, B for bytes; `options` are those of tqdm.
    """
    options = {"leave": False, "unit_scale": unit == "B", "disable": is_quiet() or not is_main_process()} | options
    return tqdm(items, desc=what, unit=unit, **options)


LIBRARIES = ("transformers.utils.logging", "diffusers.utils.logging")
"""Those that draw bars while they load and save."""


def quiet_libraries() -> None:
    """Leave it to us to speak: libraries tell of errors alone, and draw no bars but those of downloads and datasets.

    For commands, before anything large is imported. Processes that they start take most of this over. Whoever sets a
    library's own variable, such as TRANSFORMERS_VERBOSITY=info, or asks Python for warnings, is told more.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its errors are raised as well
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which asks for kernels that we have no use for
    for library in ("HF_HUB", "HF_DATASETS") if is_quiet() else ():
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning, append=True)  # what will change in libraries concerns us
    warnings.filterwarnings("ignore", ".*deprecated", UserWarning, append=True)
    for module in filter(None, map(sys.modules.get, LIBRARIES)):
        _take_bars(module)
    if not any(isinstance(finder, _Imports) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Imports())


class _Imports(MetaPathFinder):
    """Waits for the libraries to be imported, which takes seconds: earlier there is no switch to turn."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in LIBRARIES else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_take(module: ModuleType) -> None:
                execute(module)
                _take_bars(module)

            spec.loader.exec_module = execute_and_take  # type: ignore[method-assign]
        return spec


def _take_bars(library: ModuleType) -> None:
    hub = importlib.import_module("huggingface_hub.utils")
    hidden = hub.are_progress_bars_disabled()
    library.disable_progress_bar()  # transformers' takes those of downloads along
    if not hidden:
        hub.enable_progress_bars()
