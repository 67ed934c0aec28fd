"""ip2p-infer: finds pictures and prompts, has them edited, draws the contact sheet; or scores models."""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..encode.base.errors import EditError, Ip2pError
from .config import InferConfig, parse, parse_evaluate

if TYPE_CHECKING:
    from PIL import Image

    from .jobs import Job

SHEET_ROWS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, or the process's own arguments; return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments and arguments[0] == "evaluate":
            from .score.evaluate import evaluate

            return evaluate(parse_evaluate(arguments[1:]))
        return run(parse(arguments))
    except Ip2pError as error:
        print(f"ip2p-infer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nip2p-infer: stopped; the same command continues with what is missing", file=sys.stderr)
        return 130


def run(config: InferConfig) -> int:
    """Edit everything that `config` names, and report."""
    if config.ui:
        from .ui.serve import serve

        return serve(config)

    from .batch import edit_all, load_editor
    from .jobs import find_jobs
    from .outputs import output_paths

    jobs = find_jobs(config)
    work = list(zip(jobs, output_paths(config, jobs), strict=True))
    edited, kept, failed = edit_all(config, work, partial(load_editor, config))
    done = [(job, paths) for job, paths in work if job.stem not in failed]
    if config.sheet and done:
        save_sheet(config, done)
    if not config.sweep:
        for line in compare_with_targets(done):
            print(line)
    counts = {"edited": edited, "already there": kept, "skipped": len(failed)}
    print(", ".join(f"{count} {what}" for what, count in counts.items() if count), "->", config.output)
    return 0 if done else 1


def save_sheet(config: InferConfig, done: Sequence[tuple["Job", list[Path]]]) -> None:
    """Draw the first `SHEET_ROWS` of the pictures that are there, whichever run made them."""
    from .pictures import open_picture
    from .sheet import contact_sheet

    edits = [f"edited, seed {config.seed + k}" for k in range(config.num_images)]
    targets = ["target"] if any(job.target for job, _ in done) else []

    def rows() -> Iterator[tuple[str, list["Image.Image | None"]]]:
        for job, paths in done[:SHEET_ROWS]:
            pictures: list[Image.Image | None] = [open_picture(job.image()), *map(open_picture, paths)]
            yield job.prompt, pictures + ([target_of(job)] if targets else [])

    sheet = Path(str(config.sheet))
    sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows(), ["original", *edits, *targets]).save(sheet)
    print(f"contact sheet of {min(len(done), SHEET_ROWS)} of {len(done)} inputs: {sheet}")


def target_of(job: "Job") -> "Image.Image | None":
    """The picture that the edit should have become, where there is one that can be read."""
    from .pictures import open_picture

    with contextlib.suppress(EditError):
        return open_picture(job.target()) if job.target else None
    return None


def compare_with_targets(done: Sequence[tuple["Job", list[Path]]]) -> Iterator[str]:
    """Say how near the edits came to their targets, beside how near the originals were."""
    from .pictures import open_picture
    from .score.scores import psnr

    before: list[float] = []
    after: list[float] = []
    for job, paths in done:
        if (target := target_of(job)) is not None:
            before.append(psnr(open_picture(job.image()), target))
            after += [psnr(open_picture(path), target) for path in paths]
    if before:
        edited, original = statistics.fmean(after), statistics.fmean(before)
        yield f"PSNR to the target, {len(before)} pairs: edited {edited:.2f} dB, original {original:.2f} dB"


if __name__ == "__main__":
    sys.exit(main())
