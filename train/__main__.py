"""`ip2p-train`: a cache and a Stable Diffusion checkpoint in, an InstructPix2Pix pipeline out."""

import ctypes
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..encode.base.console import quiet_libraries
from ..encode.base.errors import user_errors
from ..encode.base.flags import parse
from .config import TrainConfig, refused

PROG = "ip2p-train"
LIBRARY = "libcudart.so.12"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` defaults to the command line."""
    with user_errors(PROG):
        arguments = sys.argv[1:] if argv is None else argv
        config = parse(TrainConfig, arguments, PROG, refused())
        quiet_libraries()
        if config.machine.enable_xformers_memory_efficient_attention:
            preload()  # before diffusers is imported
        from .run import train  # only now: torch takes seconds to import, and --help shall not

        train(config)


def preload() -> None:
    """Load the CUDA 12 runtime that xformers' wheel is linked to, which a PyTorch for CUDA 13 does not bring along."""
    importlib.import_module("torch")  # first, so that it has the runtime that it was tested with
    try:
        ctypes.CDLL(LIBRARY)  # PyTorch has loaded it, or the system knows it
    except OSError:
        files = (Path(folder, "nvidia", "cuda_runtime", "lib", LIBRARY) for folder in sys.path)
        if file := next(filter(Path.is_file, files), None):
            ctypes.CDLL(str(file))


if __name__ == "__main__":
    main()
