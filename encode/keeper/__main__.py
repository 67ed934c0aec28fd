"""`ip2p-cache`: looks after a cache; `ip2p-cache --help` lists what it can do.

The exit status is 1 where `verify` finds something or `diff` a difference, and 2 where a command cannot be used so.
"""

from collections.abc import Sequence

from ..base.begin import begin
from ..base.console import quiet_libraries
from ..base.errors import user_errors
from ..base.verbs import run_verb
from .verbs import VERBS

PROG = "ip2p-cache"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` defaults to the command line."""
    with user_errors(PROG):
        arguments = begin(argv)
        quiet_libraries()
        if status := run_verb(VERBS, arguments, PROG):
            raise SystemExit(status)


if __name__ == "__main__":
    main()
