"""Scores edits batch by batch, and keeps the scores that are there already."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...encode.base.console import bar, warn
from ...encode.base.errors import EditError, Ip2pError
from ...encode.base.files import whole
from ...encode.data.pictures import open_picture
from ...encode.models.judge import Judge
from ..config import EvaluateConfig
from ..jobs import Job
from ..outputs import model_stamp, settings_in
from .metrics import Edit, measure


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
    judged_by = [[name, model_stamp(name)] for name in (config.scoring.clip_model, config.scoring.dino_model)]
    known, records = _read(file), {}
    missing: list[tuple[Job, Path, str]] = []
    for job, path in edits:
        try:
            identity = _identity(job, path, [*judged_by, config.scoring.published_clip_range])
        except Ip2pError as error:
            warn(f"skipped {job.label}: {error}")
            continue
        if known.get(job.stem, {}).get("of") == identity:
            records[job.stem] = known[job.stem]
        else:
            missing.append((job, path, identity))
    if not missing:
        return records

    renewed = {job.stem for job, _, _ in missing}
    _write(file, (record for stem, record in known.items() if stem not in renewed))
    with file.open("a", encoding="utf-8") as lines, bar(None, "scoring", "pair", total=len(missing)) as shown:
        for batch in (
            missing[i : i + config.editing.batch_size] for i in range(0, len(missing), config.editing.batch_size)
        ):
            opened: list[tuple[str, str, Edit]] = []
            for job, path, identity in batch:
                try:
                    target = open_picture(job.target()) if job.target else None
                    edit = Edit(open_picture(job.image()), open_picture(path), target, job.captions)
                    opened.append((job.stem, identity, edit))
                except Ip2pError as error:
                    warn(f"skipped {job.label}: {error}")
            scores = measure(judge, [edit for _, _, edit in opened]) if opened else []
            for (stem, identity, _), values in zip(opened, scores, strict=True):
                records[stem] = {"pair": stem, "of": identity, **values}
                lines.write(json.dumps(records[stem], ensure_ascii=False) + "\n")
            lines.flush()
            shown.update(len(batch))
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


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with whole(file) as unfinished:
        unfinished.write_text("".join(lines), encoding="utf-8")
