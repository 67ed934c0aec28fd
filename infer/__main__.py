"""ip2p-infer: finds pictures and prompts, edits what is not there yet, draws the contact sheet."""

import contextlib
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .config import InferConfig, parse
from .errors import EditError

if TYPE_CHECKING:
    from PIL import Image

    from .edit import Editor
    from .inputs import Job

SHEET_ROWS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, or the process's own arguments; return its exit status."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except EditError as error:
        print(f"ip2p-infer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nip2p-infer: stopped; the same command continues with what is missing", file=sys.stderr)
        return 130


def run(config: InferConfig) -> int:
    """Edit everything that `config` names, and report."""
    from .inputs import find_jobs
    from .outputs import output_paths

    jobs = find_jobs(config)
    work = list(zip(jobs, output_paths(config, jobs), strict=True))
    edited, kept, failed = edit_all(config, work)
    done = [(job, paths) for job, paths in work if job.stem not in failed]
    if config.sheet and done:
        save_sheet(config, done)
    for line in compare_with_targets(done):
        print(line)
    counts = {"edited": edited, "already there": kept, "skipped": len(failed)}
    print(", ".join(f"{count} {what}" for what, count in counts.items() if count), "->", config.output)
    return 0 if done else 1


def edit_all(config: InferConfig, work: Sequence[tuple["Job", list[Path]]]) -> tuple[int, int, set[str]]:
    """Edit and save batch by batch.

    Returns:
        How many inputs were edited, how many were there already, and the stems of those that failed.
    """
    from .outputs import is_there, model_stamp, save, settings_of
    from .pictures import open_picture

    editor: Editor | None = None
    stamp = model_stamp(config.model)
    edited = kept = 0
    failed: set[str] = set()
    with tqdm(total=len(work), unit="picture", desc="editing") as bar:
        for start in range(0, len(work), config.batch_size):
            batch: list[tuple[Image.Image, str, list[tuple[Path, str]]]] = []
            for job, paths in work[start : start + config.batch_size]:
                try:
                    if not job.prompt.strip():
                        raise EditError("the prompt is empty")
                    content = job.image()
                    files = list(zip(paths, settings_of(config, stamp, content, job.prompt), strict=True))
                    if all(itertools.starmap(is_there, files)):
                        kept += 1
                    else:
                        batch.append((open_picture(content), job.prompt, files))
                except EditError as error:
                    failed.add(job.stem)
                    tqdm.write(f"skipped {job.label}: {error}", file=sys.stderr)
            if batch:
                editor = editor or load_editor(config)
                pictures = iter(edit(editor, config, [image for image, _, _ in batch], [text for _, text, _ in batch]))
                for path, settings in (file for _, _, files in batch for file in files):
                    save(next(pictures), path, settings)
                edited += len(batch)
            bar.update(min(config.batch_size, len(work) - start))
    return edited, kept, failed


def load_editor(config: InferConfig) -> "Editor":
    """Load the model that `config` names."""
    from .edit import Editor

    editor = Editor(
        config.model,
        device=config.device,
        dtype=config.dtype,
        variant=config.variant,
        revision=config.revision,
        scheduler=config.scheduler,
    )
    editor.pipeline.set_progress_bar_config(desc="denoising", position=1, leave=False)
    return editor


def edit(
    editor: "Editor", config: InferConfig, images: Sequence["Image.Image"], prompts: Sequence[str]
) -> list["Image.Image"]:
    """Edit pictures with the settings of `config`."""
    return editor.edit(
        images,
        prompts,
        seed=config.seed,
        num_images=config.num_images,
        num_inference_steps=config.num_inference_steps,
        image_guidance_scale=config.image_guidance_scale,
        guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale,
        negative_prompt=config.negative_prompt,
        resolution=config.resolution,
        batch_size=config.batch_size,
    )


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
    from .scores import psnr

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
