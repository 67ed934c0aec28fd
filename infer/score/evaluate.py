"""ip2p-infer evaluate: edits held-out pairs with each model, scores the edits, compares the models."""

import contextlib
import functools
import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...encode.base.console import bar, say, warn
from ...encode.base.errors import EditError
from ...encode.base.files import check_folder, whole
from ...encode.base.flags import dump
from ...encode.config import Dataset
from ...encode.data.pictures import open_picture
from ...encode.data.places import check_place
from ...encode.models.judge import Judge
from ..batch import edit_all, load_editor, skipping
from ..config import EvaluateConfig
from ..jobs import Job, find_jobs
from ..kind import check_model
from ..outputs import model_stamp, output_paths, settings_in
from .curve import draw_curve
from .memory import Memory
from .metrics import Edit, measure

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
    scoring, text, steps = config.scoring, config.editing.guidance_scale, config.editing.num_inference_steps
    folder, scales = Path(scoring.output), CURVE if scoring.curve else (config.editing.image_guidance_scale,)
    check_folder(folder, "--output")
    check_place(Dataset(dataset_name=config.dataset), folder, "--output")
    for model in config.model:
        check_model(model, config.loading.revision, config.loading.lora, config.loading.cache_dir)
    captions = scoring.original_caption_column, scoring.edited_caption_column
    jobs = find_jobs(config.infer("", scales[0], folder), captions)
    left_out = _missing_columns(jobs[0])
    if scoring.curve and "clip_direction" in left_out:
        raise EditError(f"--curve needs {left_out['clip_direction']}")
    models, loading = (scoring.clip_model, scoring.dino_model), config.loading
    judge = Memory(*models, loading.device, scoring.published_clip_range, loading.cache_dir)
    scored: list[tuple[str, float, dict[str, dict[str, Any]]]] = []
    with bar(None, "editing", "picture", total=len(config.model) * len(scales) * len(jobs)) as shown:
        for model in config.model:
            shown_scales = ", ".join(f"{scale:g}" for scale in scales)
            say(f"{model}, {steps} steps, image guidance {shown_scales}, text guidance {text:g}")
            name = re.sub(r"[^\w.-]+", "_", model).strip("_.")
            places = [folder / name / f"image_{scale:g}_text_{text:g}" for scale in scales]
            for place in places:
                check_folder(place, "--output")
                place.mkdir(parents=True, exist_ok=True)
            runs = [config.infer(model, scale, place) for scale, place in zip(scales, places, strict=True)]
            load = functools.cache(functools.partial(load_editor, runs[0]))
            edits, _ = edit_all(
                [(run, list(zip(jobs, output_paths(run, jobs), strict=True))) for run in runs], load, shown
            )
            for scale, place, done in zip(scales, places, edits, strict=True):
                stems = {job.stem for job in jobs}
                there = [(job, path) for job, (path,) in done if job.stem in stems]
                records = score_all(config, judge, there, place / "scores.jsonl")
                if not records:
                    warn("ip2p-infer: no pair could be scored")
                    return 1
                jobs = [job for job in jobs if job.stem in records]  # what is bad is said once, and left out for all
                scored.append((model, scale, records))
    results: list[dict[str, Any]] = []
    for model, scale, records in scored:
        means = {
            name: statistics.fmean(records[job.stem][name] for job in jobs) for name in SCORES if name not in left_out
        }
        how = {"num_inference_steps": steps, "image_guidance_scale": scale}
        results.append({"model": model, **how, "guidance_scale": text, "pairs": len(jobs), **means})
    report(config, results, left_out)
    return 0


def score_all(
    config: EvaluateConfig, judge: Judge, edits: Sequence[tuple[Job, Path]], file: Path
) -> dict[str, dict[str, Any]]:
    """Score each edit that was not scored before in the same way; one that cannot be is reported.

    Args:
        edits: inputs, each with the file of its edited picture.
        file: JSONL with a record for each edit: `pair`, the input's stem; `of`, a hash of all that the scores
            depend on; and the scores.

    Returns:
        The records by the inputs' stems.
    """
    scoring, size = config.scoring, config.editing.batch_size
    judged_by = [[name, model_stamp(name)] for name in (scoring.clip_model, scoring.dino_model)]
    known, records = _read(file), {}
    _write(file, known)  # without a line that an interruption tore, if there is one
    with file.open("a", encoding="utf-8") as lines, bar(None, "scoring", "pair", total=len(edits)) as shown:
        for start in range(0, len(edits), size):
            batch: list[tuple[str, str, Edit]] = []
            for job, path in edits[start : start + size]:
                with skipping(job):
                    identity = _identity(job, path, [*judged_by, scoring.published_clip_range])
                    if known.get(job.stem, {}).get("of") == identity:
                        records[job.stem] = known[job.stem]
                        continue
                    target = open_picture(job.target()) if job.target else None
                    edit = Edit(open_picture(job.image()), open_picture(path), target, job.captions)
                    batch.append((job.stem, identity, edit))
            scores = measure(judge, [edit for _, _, edit in batch]) if batch else []
            for (stem, identity, _), values in zip(batch, scores, strict=True):
                records[stem] = {"pair": stem, "of": identity, **values}
                lines.write(_line(records[stem]))
            lines.flush()
            shown.update(min(size, len(edits) - start))
    _write(file, known | records)
    return records


def _identity(job: Job, path: Path, judged_by: list[Any]) -> str:
    """A hash of all that an edit's scores depend on: how it was made, what it is compared with, and by what."""
    if any(caption is not None and not caption.strip() for caption in job.captions):
        raise EditError("a caption is empty")
    target = hashlib.sha256(job.target()).hexdigest() if job.target else None
    return hashlib.sha256(json.dumps([settings_in(path), target, job.captions, judged_by]).encode()).hexdigest()[:16]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that an interruption tore
            record = json.loads(line)
            records[record["pair"]] = record
    return records


def _write(file: Path, records: Mapping[str, dict[str, Any]]) -> None:
    with whole(file) as unfinished:
        unfinished.write_text("".join(map(_line, records.values())), encoding="utf-8")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _missing_columns(job: Job) -> dict[str, str]:
    """The scores that the dataset's columns do not allow, each with what they lack."""
    there = {TARGET: job.target, BEFORE: job.captions[0], AFTER: job.captions[1]}
    lacking = {what for what, value in there.items() if value is None}
    return {name: " and ".join(sorted(needs & lacking)) for name, (_, needs) in SCORES.items() if needs & lacking}


def report(config: EvaluateConfig, results: Sequence[dict[str, Any]], left_out: Mapping[str, str]) -> None:
    """Print the table, and write results.json and the curve."""
    folder = Path(config.scoring.output)
    print(_table(results))
    for lack in sorted(set(left_out.values())):
        titles = ", ".join(SCORES[name][0] for name in left_out if left_out[name] == lack)
        say(f"left out: {titles}; the dataset has no {lack}")
    content = {"settings": dump(config), "left_out": left_out, "results": results}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    if config.scoring.curve:
        lines: dict[str, list[tuple[float, float, str]]] = {model: [] for model in config.model}
        for row in results:
            point = row["clip_direction"], row["clip_image"], f"{row['image_guidance_scale']:.1f}"
            lines[row["model"]].append(point)
        draw_curve(lines, "CLIP text-image direction similarity", "CLIP image similarity").save(folder / "curve.png")
    say(f"-> {folder / 'results.json'}")


def _table(results: Sequence[dict[str, Any]]) -> str:
    """One line for each result, under titles."""
    titles = {"model": "model", "num_inference_steps": "steps", "image_guidance_scale": "image guidance"}
    titles |= {"guidance_scale": "text guidance", "pairs": "pairs"}
    titles |= {name: title for name, (title, _) in SCORES.items() if name in results[0]}
    rows = [[f"{result[name]:.4f}" if name in SCORES else str(result[name]) for name in titles] for result in results]
    rows.insert(0, list(titles.values()))
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], rest)]) for row in rows)
