"""`ip2p-encode`: a dataset and a Stable Diffusion checkpoint in, a cache out."""

import gc
from collections.abc import Sequence

from .base.begin import begin
from .base.console import quiet_libraries
from .base.errors import user_errors
from .base.flags import parse
from .base.refused import REFUSED
from .config import EncodeConfig
from .early import check

PROG = "ip2p-encode"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` defaults to the command line."""
    with user_errors(PROG):
        config = parse(EncodeConfig, begin(argv), PROG, REFUSED)
        check(config)
        quiet_libraries()
        from .run import encode  # only now: torch takes seconds to import, and --help shall not

        gc.freeze()  # what was imported stays: the collector needs a second to go through it, again and again
        encode(config)


if __name__ == "__main__":
    main()
