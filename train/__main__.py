"""`ip2p-train`: a cache and a Stable Diffusion checkpoint in, an InstructPix2Pix pipeline out."""

import sys
from collections.abc import Sequence

from ..encode.base.errors import user_errors
from ..encode.base.flags import parse
from .config import TrainConfig, refused
from .unet.xformers import preload

PROG = "ip2p-train"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` defaults to the command line."""
    with user_errors(PROG):
        arguments = sys.argv[1:] if argv is None else argv
        config = parse(TrainConfig, arguments, PROG, refused())
        if config.machine.enable_xformers_memory_efficient_attention:
            preload()  # before diffusers is imported
        from .run import train  # only now: torch takes seconds to import, and --help shall not

        train(config)


if __name__ == "__main__":
    main()
