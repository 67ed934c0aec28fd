"""`ip2p-infer`: a trained pipeline and pictures in, edited pictures out; or scores of models."""

import sys
from collections.abc import Sequence
from functools import partial

from ..encode.base.errors import user_errors
from ..encode.base.flags import parse
from .config import EvaluateConfig, InferConfig

# The rest is imported once flags are read: torch takes seconds to import, and --help shall not.
PROG = "ip2p-infer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, 0 or 1; `argv` defaults to the command line.

    Wrong flags, models and datasets end it through SystemExit with status 2, and Ctrl-C with 130.
    """
    with user_errors(PROG):
        arguments = sys.argv[1:] if argv is None else argv
        if arguments and arguments[0] == "evaluate":
            scoring = parse(EvaluateConfig, arguments[1:], f"{PROG} evaluate")
            from .score.evaluate import evaluate

            return evaluate(scoring)
        config = parse(InferConfig, arguments, PROG)
        if config.page.ui:
            from .ui.serve import serve

            return serve(config)
        return edit(config)


def edit(config: InferConfig) -> int:
    """Edit everything that `config` names, and report; the status is 1 if there is no edited picture."""
    from .batch import edit_all, load_editor
    from .jobs import find_jobs
    from .outputs import output_paths
    from .score.compare import print_psnr, save_sheet

    jobs = find_jobs(config)
    work = list(zip(jobs, output_paths(config, jobs), strict=True))
    edited, kept, failed = edit_all(config, work, partial(load_editor, config))
    done = [(job, paths) for job, paths in work if job.stem not in failed]
    if config.outputs.sheet and done:
        save_sheet(config, done)
    if not config.outputs.sweep:
        print_psnr(done)
    counts = {"edited": edited, "already there": kept, "skipped": len(failed)}
    print(", ".join(f"{count} {what}" for what, count in counts.items() if count), "->", config.outputs.output)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
