"""What each operating system tells of a process in its own way."""

import os
import resource
import sys


def cores() -> int:
    """Cores that this process may use; macOS says no more than how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_memory() -> int:
    """The most bytes that this process has held at once: macOS counts bytes, others KiB (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
