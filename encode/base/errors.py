"""What users read instead of a traceback.

Each message says what was found, what was expected, and the flag or command that mends it. Any other exception
than an `Ip2pError` is a bug and keeps its traceback.
"""

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What no program can help: disks that are full, broken or read-only, names and permissions."""


class Ip2pError(RuntimeError):
    """Base of all errors that are shown to the user as one or two lines."""


class SettingsError(Ip2pError):
    """A flag or a configuration file that cannot be used."""


class SourceError(Ip2pError):
    """A dataset that cannot be read, or lacks what was asked of it."""


class ModelError(Ip2pError):
    """A checkpoint that cannot be read, or is not of the expected kind."""


class TrainError(Ip2pError):
    """A training run that cannot go on as it is."""


class Stopped(TrainError):
    """A training run that ended early by a signal, after a checkpoint."""

    def __init__(self, step: int, signal: int):
        again = "--resume_from_checkpoint latest, or on a dataset with the same command"
        super().__init__(f"stopped at step {step}: continue with {again}")
        self.signal = signal


class EditError(Ip2pError, ValueError):
    """A setting, model or picture that editing cannot use."""


class SampleError(EditError):
    """A part of one sample that cannot be read; whoever encodes sets the sample aside with the reason."""


class ImageError(SampleError):
    """A picture that cannot be read or decoded."""


class CacheError(Ip2pError):
    """A cache that is missing, unfinished, damaged or in use."""


class CacheMismatch(CacheError):
    """A cache that was made by another model, or with other settings."""


def reason(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def of_hub(error: BaseException) -> str:
    """What to do about an error that comes from the Hub, or from its absence; empty for any other.

    Its library is not imported for that: kinds are known by their names, in the chain of causes or in what is said.
    """
    chain = list[BaseException]()
    link: BaseException | None = error
    while link and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    said = " ".join([*(kind.__name__ for link in chain for kind in type(link).__mro__), *map(str, chain)])
    offline = getattr(sys.modules.get("huggingface_hub.constants"), "HF_HUB_OFFLINE", False)
    if re.search("GatedRepoError|gated dataset", said):
        place = re.search(r"(https?://[^/\s]+/(datasets/)?[\w.-]+/[\w.-]+)/resolve/", said)
        page = place[1] if place else "its page on the Hub"
        return f"; its licence is to be accepted: do so on {page}, then `hf auth login`"
    if "OfflineModeIsEnabled" in said or ("LocalEntryNotFoundError" in said and offline):
        return "; HF_HUB_OFFLINE is set, and it was not fetched before: unset that once, while there is a network"
    if re.search("RepositoryNotFoundError|doesn't exist on the Hub", said):
        return "; look for a slip in the name; if it is private, `hf auth login`"
    if re.search("ConnectError|NetworkError|ConnectTimeout|LocalEntryNotFoundError", said):
        return "; the Hub is out of reach, and it was not fetched before: name a folder, or try again with a network"
    return ""


@contextlib.contextmanager
def explained(kind: type[Ip2pError], what: str, *errors: type[Exception], hint: str = "") -> Iterator[None]:
    """Raise errors of other libraries (these, or all) as one of ours: `what`, a colon, the reason, and the hint."""
    meant = errors or (Exception,)
    try:
        yield
    except (Ip2pError, MemoryError):
        raise
    except meant as error:
        raise kind(f"{what}: {reason(error)}{hint}{of_hub(error)}") from None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean NEAREST?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


@contextlib.contextmanager
def user_errors(prog: str) -> Iterator[None]:
    """Show `Ip2pError` and Ctrl-C as a line instead of a traceback; exit with status 2 and 130.

    So are errors of the disk, wherever they come up. Whoever stops reading the output, as `| head` does, ends the
    command quietly.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except Ip2pError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped; the same command continues from what is saved", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno in REFUSALS:
            where = f"{error.filename}: " if error.filename else ""
            print(f"{prog}: {where}{error.strerror}; what is finished is kept", file=sys.stderr)
            raise SystemExit(2) from None
        if not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise SystemExit(141) from None  # as a shell reports SIGPIPE
