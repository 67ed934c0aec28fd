"""What all commands begin with: their arguments, and what holds for each of them alike."""

import sys
from collections.abc import Sequence
from importlib.metadata import version

from .arguments import expand
from .console import show_messages

QUIET, LOUD = "--quiet", "--no_quiet"


def begin(argv: Sequence[str] | None) -> list[str]:
    """The arguments of a command, by default those of this process, with what `--config` files hold in their place.

    `--quiet`, which leaves warnings and errors, is heard and left out, and so is `--no_quiet`, which takes it back.
    `--version` is answered, and ends the command.
    """
    given = expand(list(sys.argv[1:] if argv is None else argv))
    if "--version" in given:
        print("ip2p", version("ip2p"))
        raise SystemExit
    heard = [argument for argument in given if argument in (QUIET, LOUD)]
    show_messages(quiet=heard[-1:] == [QUIET])
    return [argument for argument in given if argument not in heard]
