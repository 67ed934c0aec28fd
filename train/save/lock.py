"""The lock that keeps an output folder to one run."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ...encode.base.console import say
from ...encode.base.errors import TrainError
from ...encode.cache.writer import locked


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[None]:
    """Keep an output folder to this run.

    Raises:
        TrainError: another run trains into it; the message says which process.
    """
    held = contextlib.ExitStack()
    try:
        lock = held.enter_context(locked(output_dir))
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    except BlockingIOError:
        who = (output_dir / ".lock").read_text(encoding="utf-8")
        raise TrainError(
            f"--output_dir {output_dir} is in use by another ip2p-train ({who}): wait for it, stop it, or name another "
            "folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        say(f"{output_dir} lies on a disk without locks: nothing keeps another run out of it")
    with held:
        yield
