"""One reader of datasets: whatever form they have, encoding, editing and scoring find the same rows in them."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets.config
import pytest

import fakes
from forms import KINDS, PAIRS, Flags, Kind, csv_file, image_files, metadata_jsonl, opened, parquet, shards
from ip2p.encode.base.errors import EditError, SourceError
from ip2p.encode.base.flags import changed, parse
from ip2p.encode.data.pairs import Pair
from ip2p.encode.planning.index import identify
from ip2p.infer.config import EvaluateConfig, InferConfig, Inputs, Outputs
from ip2p.infer.jobs import Job, find_jobs

WORDS = [pair._replace(instruction=word) for pair, word in zip(PAIRS, ("None", "null", "NA", "nan", "1"), strict=False)]


def jobs_of(flags: Flags, **more: object) -> list[Job]:
    """What `ip2p-infer --table` makes of a dataset that flags of `ip2p-encode` name."""
    table = str(flags.get("dataset_name") or flags["train_data_dir"])
    return find_jobs(changed(InferConfig("model", Inputs(table=table), Outputs("out")), **more))


def pair_of(job: Job) -> Pair:
    """What a job edits, and into what."""
    assert job.target
    return Pair(job.image(), job.target(), job.prompt)


def cached(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep what is fetched in `folder`: editing has no flag that says where."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_edited_is_what_is_encoded(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each form of dataset the jobs are the pairs: same files, same instruction, same order."""
    cached(monkeypatch, tmp_path / "downloads")
    flags = kind(tmp_path / "data", PAIRS[:9])
    pairs = opened(flags)
    jobs = jobs_of(flags)
    assert [pair_of(job) for job in jobs] == [pairs[index] for index in range(len(pairs))] == PAIRS[:9]
    assert len({job.stem for job in jobs}) == 9
    assert pair_of(pickle.loads(pickle.dumps(jobs[5]))) == PAIRS[5]


@pytest.mark.parametrize("kind", [csv_file, metadata_jsonl, shards], ids=lambda kind: kind.__name__)
def test_words_that_mean_nothing_elsewhere_are_prompts(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt is text, whatever other readers take it for."""
    cached(monkeypatch, tmp_path / "downloads")
    flags = kind(tmp_path / "data", WORDS[: 4 if kind is csv_file else 5])
    pairs = opened(flags)
    assert [job.prompt for job in jobs_of(flags)] == [pairs[index].instruction for index in range(len(pairs))]
    assert jobs_of(flags)[0].prompt == "None"


def test_editing_never_takes_the_training_split_silently(tmp_path: Path) -> None:
    """Encoding takes train where there are several splits; editing asks."""
    flags = parquet(tmp_path / "data", PAIRS[:8])
    assert len(jobs_of(flags)) == 8, "there is but one"
    shutil.copy(tmp_path / "data" / "train-00000-of-00002.parquet", tmp_path / "data" / "test-00000-of-00001.parquet")
    assert len(opened(flags)) == 8
    with pytest.raises(SourceError, match=r"several splits: choose one of \w+, \w+ with --split"):
        jobs_of(flags)
    assert len(jobs_of(flags, split="test")) == 4


def test_a_missing_picture_costs_its_job_alone(tmp_path: Path) -> None:
    """It is named when its turn comes, and the other jobs are what they are."""
    flags = metadata_jsonl(tmp_path / "data", PAIRS[:3])
    (tmp_path / "data" / "images" / "1a.jpg").unlink()
    (tmp_path / "data" / "images" / "2b.jpg").unlink()
    first, second, third = jobs_of(flags)
    assert pair_of(first) == PAIRS[0]
    with pytest.raises(EditError, match=r"no picture in column input_image: images/1a\.jpg is not there"):
        second.image()
    assert second.target
    assert second.target() == PAIRS[1].edited
    with pytest.raises(EditError, match="no picture in column edited_image"):
        pair_of(third)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a" * 300 + ".jpg", "File name too long"),
        ("a\0.jpg", "embedded null"),
        ("loop/a.jpg", "Too many levels of symbolic links"),
        ("nothing://a.jpg", "Protocol not known: nothing"),
        (7, "the image is int, expected a file"),
    ],
)
def test_a_picture_that_cannot_be_read_costs_its_job_and_its_sample_alone(
    name: object, reason: str, tmp_path: Path
) -> None:
    """Whatever the file system says of its name is the reason, while editing and while encoding."""
    rows: list[dict] = list(image_files(tmp_path / "data", PAIRS[:3]))
    (tmp_path / "data" / "loop").symlink_to("loop")
    rows[1]["input_image"] = name
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags: Flags = {"dataset_name": tmp_path / "data"}
    first, second, third = jobs_of(flags)
    assert (pair_of(first), pair_of(third)) == (PAIRS[0], PAIRS[2])
    with pytest.raises(EditError, match=rf"column input_image cannot be read: .*{reason}"):
        second.image()
    assert second.target
    assert second.target() == PAIRS[1].edited
    aside = identify(opened(flags), fakes.SQUARES, range(3))["reason"].to_pylist()
    assert (aside[0], aside[2]) == (None, None)
    assert reason in aside[1]


@pytest.mark.timeout(60)  # reading a pipe never ends
def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    """Nor is a device: what is no file is missing."""
    flags = metadata_jsonl(tmp_path / "data", PAIRS[:2])
    for name in ("0a.jpg", "1b.jpg"):
        (tmp_path / "data" / "images" / name).unlink()
    os.mkfifo(tmp_path / "data" / "images" / "0a.jpg")
    (tmp_path / "data" / "images" / "1b.jpg").symlink_to("/dev/zero")
    reasons = identify(opened(flags), fakes.SQUARES, range(2))["reason"].to_pylist()
    assert reasons == ["the original image is missing", "the edited image is missing"]


def sparse(folder: Path) -> Flags:
    """Columns of images of which every second is empty, and captions."""
    rows = image_files(folder, PAIRS[:2])
    rows = [row | {"original_prompt": "a cat", "edited_prompt": "a red cat"} for row in rows]
    del rows[1]["edited_prompt"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"dataset_name": folder}


def known(folder: Path) -> Flags:
    """A dataset that is known by its name."""
    columns = ("src_img", "edited_img", "edited_prompt_list")
    folder /= "OmniEdit-Filtered-1.2M"
    rows = [dict(zip(columns, row.values(), strict=True)) for row in image_files(folder, PAIRS[:2])]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"original": "a.jpg"}) for row in rows))
    return {"dataset_name": folder}


def tables_for_editing(folder: Path) -> Flags:
    """The column names that `ip2p-infer --help` gives."""
    rows = [
        dict(zip(("image", "target", "prompt"), row.values(), strict=True)) for row in image_files(folder, PAIRS[:2])
    ]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"dataset_name": folder / "table.jsonl"}


def image_folder(folder: Path) -> Flags:
    """What the datasets library calls an image folder."""
    rows = [
        {"file_name": row["input_image"], "edited_file_name": row["edited_image"], "text": row["edit_prompt"]}
        for row in image_files(folder, PAIRS[:2])
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"dataset_name": folder}


@pytest.mark.parametrize("build", [known, tables_for_editing, image_folder], ids=lambda build: build.__name__)
def test_columns_are_found_by_the_same_rules(build: Callable[[Path], Flags], tmp_path: Path) -> None:
    """A known dataset, and names that are used for editing or for training, need no flag in either command."""
    flags = build(tmp_path)
    pairs = opened(flags)
    assert [pair_of(job) for job in jobs_of(flags)] == [pairs[0], pairs[1]] == PAIRS[:2]
    assert [job.stem for job in jobs_of(flags)] == ["0a", "1a"]


def test_captions_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    """Scores need them, edits do not; a row without one has an empty one, and other columns are taken by flag."""
    table = str(sparse(tmp_path / "data")["dataset_name"])
    config = InferConfig("model", Inputs(table=table), Outputs("out"))
    assert [job.captions for job in find_jobs(config)] == [(None, None)] * 2
    assert [job.captions for job in find_jobs(config, (None, None))] == [("a cat", "a red cat"), ("a cat", "")]
    assert find_jobs(config, ("edit_prompt", None))[0].captions == (PAIRS[0].instruction, "a red cat")
    evaluation = parse(EvaluateConfig, ["--model", "m", "--dataset", table, "--output", "out"], "ip2p-infer evaluate")
    assert find_jobs(evaluation.infer("m", 1.5, tmp_path), (None, None))[1].captions == ("a cat", "")


def test_one_prompt_needs_no_column_of_prompts(tmp_path: Path) -> None:
    """With --prompt a folder of images is a table, and targets are taken only where there are some."""
    image_files(tmp_path / "data", PAIRS[:2])
    jobs = jobs_of({"dataset_name": tmp_path / "data" / "images"}, prompt="make it red")
    assert [(job.prompt, job.target) for job in jobs] == [("make it red", None)] * 4
    assert jobs[1].image() == PAIRS[0].edited


def test_the_place_of_tar_files_is_taken_from_braces_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both name the same jobs; braces without an end are said to stand for nothing."""
    cached(monkeypatch, tmp_path / "downloads")
    flags = shards(tmp_path / "data", PAIRS[:9])
    by_folder = [pair_of(job) for job in jobs_of({"dataset_name": tmp_path / "data"})]
    assert by_folder == [pair_of(job) for job in jobs_of(flags)] == PAIRS[:9]
    with pytest.raises(SourceError, match="stands for no files"):
        jobs_of({"dataset_name": f"{tmp_path}/${{nothing}}.tar"})
