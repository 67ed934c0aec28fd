"""xformers' attention, for those who ask for it: the library that its wheel lacks, and a line where it cannot run."""

import ctypes
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...encode.base.errors import SettingsError, reason

if TYPE_CHECKING:  # diffusers imports xformers, for which `preload` has to come first
    from diffusers import UNet2DConditionModel

LIBRARY = "libcudart.so.12"


def preload() -> None:
    """Load the CUDA 12 runtime that xformers' wheel is linked to, which a PyTorch for CUDA 13 does not bring along."""
    importlib.import_module("torch")  # first, so that it has the runtime that it was tested with
    try:
        ctypes.CDLL(LIBRARY)  # PyTorch has loaded it, or the system knows it
    except OSError:
        files = (Path(folder, "nvidia", "cuda_runtime", "lib", LIBRARY) for folder in sys.path)
        if file := next(filter(Path.is_file, files), None):
            ctypes.CDLL(str(file))


def use_xformers(unet: "UNet2DConditionModel") -> None:
    """Let the attention of the UNet run in xformers, in place.

    Raises:
        SettingsError: xformers is not installed, or cannot run here.
    """
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
        raise SettingsError(
            f"--enable_xformers_memory_efficient_attention: {reason(error).rstrip(' .:')}; "
            "pip install 'ip2p[gpu]', or leave the flag out: PyTorch's own attention is the same kernel"
        ) from None
