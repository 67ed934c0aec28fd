"""`ip2p-train`: a cache, or a dataset, and a Stable Diffusion checkpoint in, an InstructPix2Pix pipeline out."""

import ctypes
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..encode.base.begin import begin
from ..encode.base.console import quiet_libraries, say
from ..encode.base.errors import Stopped, user_errors
from .command import PROG, look, read

LIBRARY = "libcudart.so.12"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` defaults to the command line."""
    with user_errors(PROG):
        encoding, config = read(begin(argv))
        look(encoding, config)
        quiet_libraries()
        if config.machine.enable_xformers_memory_efficient_attention:
            preload()  # before diffusers is imported
        # Only now: torch takes seconds to import, and --help shall not.
        from .run import train
        from .setup import encode_first

        try:
            train(encode_first(encoding, config) if encoding else config)
        except Stopped as stopped:
            say(str(stopped))
            raise SystemExit(128 + stopped.signal) from None


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
