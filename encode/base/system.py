"""What systems after POSIX tell of a process, each in its own way; on any other one this module cannot be imported."""

import os
import sys

from .errors import SettingsError

try:
    import fcntl as fcntl
    import resource
except ModuleNotFoundError:
    raise SettingsError(
        "caches are locked and mapped as Linux and macOS do it, which this system lacks: encode and train there "
        "(WSL is Linux, too); ip2p-infer edits pictures here as well"
    ) from None

NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Flag of mmap(2) for addresses that no memory is set aside for; others than Linux set none aside anyway."""


def cores() -> int:
    """Cores that this process may use; macOS says no more than how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_memory() -> int:
    """The most bytes that this process has held at once: macOS counts bytes, others KiB (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
