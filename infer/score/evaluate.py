"""ip2p-infer evaluate: edits held-out pairs with each model, has the edits scored, compares the models."""

import functools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...encode.base.console import warn
from ...encode.base.errors import EditError
from ...encode.base.flags import dump
from ..batch import edit_all, load_editor
from ..config import EvaluateConfig
from ..jobs import Job, find_jobs
from ..models import check_model
from ..outputs import output_paths
from .curve import draw_curve

# Image guidance along the paper's curve, as in the original project's metrics/compute_metrics.py.
CURVE = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)

# Each score's title, and what it needs beside original and prompt; `metrics.measure` says how they are defined.
TARGET = "edited pictures (--edited_image_column)"
BEFORE = "captions of the originals (--original_caption_column)"
AFTER = "captions of the edited pictures (--edited_caption_column)"
SCORES = {
    "l1": ("L1", {TARGET}),
    "l2": ("L2", {TARGET}),
    "psnr": ("PSNR", {TARGET}),
    "clip_i": ("CLIP-I", {TARGET}),
    "dino": ("DINO", {TARGET}),
    "clip_t": ("CLIP-T", {AFTER}),
    "clip_direction": ("CLIP direction", {BEFORE, AFTER}),
    "clip_image": ("CLIP image", set[str]()),
}


def evaluate(config: EvaluateConfig) -> int:
    """Edit and score everything that `config` names; return the exit status.

    The output folder gets MODEL/image_1.5_text_7.5/ with the edits and, in scores.jsonl, the scores of each;
    results.json with their means; and curve.png, if `config.scoring.curve`.
    """
    folder, scales = (
        Path(config.scoring.output),
        CURVE if config.scoring.curve else (config.editing.image_guidance_scale,),
    )
    for model in config.model:
        check_model(model, config.loading.revision)
    captions = config.scoring.original_caption_column, config.scoring.edited_caption_column
    jobs = find_jobs(config.infer("", scales[0], folder), captions)
    left_out = missing_columns(jobs[0])
    if config.scoring.curve and "clip_direction" in left_out:
        raise EditError(f"--curve needs {left_out['clip_direction']}")

    from ...encode.models.judge import Judge
    from .scoring import score_all

    judge = Judge(
        config.scoring.clip_model, config.scoring.dino_model, config.loading.device, config.scoring.published_clip_range
    )
    results: list[dict[str, Any]] = []
    for model in config.model:
        load = functools.cache(functools.partial(load_editor, config.infer(model, scales[0], folder)))
        for scale in scales:
            warn(f"{model}, image guidance {scale:g}, text guidance {config.editing.guidance_scale:g}")
            place = folder_of(folder, model, scale, config.editing.guidance_scale)
            run = config.infer(model, scale, place)
            work = list(zip(jobs, output_paths(run, jobs), strict=True))
            failed = edit_all(run, work, load)[2]
            edits = [(job, path) for job, (path,) in work if job.stem not in failed]
            records = score_all(config, judge, edits, place / "scores.jsonl")
            if not records:
                warn("ip2p-infer: no pair could be scored")
                return 1
            jobs = [job for job in jobs if job.stem in records]  # what is bad is said once, and left out for all
            means = {
                name: statistics.fmean(record[name] for record in records.values())
                for name in SCORES
                if name not in left_out
            }
            results.append({"model": model, "image_guidance_scale": scale, "pairs": len(records), **means})
    report(config, results, left_out)
    return 0


def missing_columns(job: Job) -> dict[str, str]:
    """The scores that the dataset's columns do not allow, each with what they lack."""
    there = {TARGET: job.target, BEFORE: job.captions[0], AFTER: job.captions[1]}
    lacking = {what for what, value in there.items() if value is None}
    return {name: " and ".join(sorted(needs & lacking)) for name, (_, needs) in SCORES.items() if needs & lacking}


def folder_of(folder: Path, model: str, image: float, text: float) -> Path:
    """Where a model's edits at these scales are kept."""
    place = folder / re.sub(r"[^\w.-]+", "_", model).strip("_.") / f"image_{image:g}_text_{text:g}"
    place.mkdir(parents=True, exist_ok=True)
    return place


def report(config: EvaluateConfig, results: Sequence[dict[str, Any]], left_out: Mapping[str, str]) -> None:
    """Print the table, and write results.json and the curve."""
    folder = Path(config.scoring.output)
    print(table(results))
    for lack in sorted(set(left_out.values())):
        titles = ", ".join(SCORES[name][0] for name in left_out if left_out[name] == lack)
        print(f"left out: {titles}; the dataset has no {lack}")
    settings = dump(config)
    content = json.dumps({"settings": settings, "left_out": left_out, "results": results}, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(content + "\n", encoding="utf-8")
    if config.scoring.curve:
        lines: dict[str, list[tuple[float, float, str]]] = {model: [] for model in config.model}
        for row in results:
            point = row["clip_direction"], row["clip_image"], f"{row['image_guidance_scale']:.1f}"
            lines[row["model"]].append(point)
        draw_curve(lines, "CLIP text-image direction similarity", "CLIP image similarity").save(folder / "curve.png")
    print("->", folder / "results.json")


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each result, under titles."""
    titles = {"model": "model", "image_guidance_scale": "image guidance", "pairs": "pairs"}
    titles |= {name: title for name, (title, _) in SCORES.items() if name in results[0]}
    rows = [list(titles.values())]
    for result in results:
        rows.append([f"{result[name]:.4f}" if name in SCORES else str(result[name]) for name in titles])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    lines = ("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], rest)]) for row in rows)
    return "\n".join(lines)
