"""A property of datasets: whatever stands in random cells, the good samples are encoded, the bad ones stand aside."""

import csv
import json
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fakes
import tiny
from forms import NAMES, Flags, add, image_files, pair
from ip2p.encode import run
from ip2p.encode.__main__ import main
from ip2p.encode.base.errors import SourceError
from ip2p.encode.base.files import content_key
from ip2p.encode.cache.format import Cache
from ip2p.encode.config import Dataset
from ip2p.encode.data.opening import open_pairs
from ip2p.encode.models import encoders

ROWS, SHARE = 24, 0.12  # of the cells that hold junk
Row = dict[str, Any]
PICTURE, TEXT = (pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string())


class Junk:
    """Random values of many kinds.

    Attributes:
        paths: texts that name no picture: too long, with a NUL, in a loop, a folder, a pipe, by an unknown protocol.
    """

    paths = (
        "x" * 300,
        "x" * 5000 + ".png",
        "images/\0.jpg",
        "\0",
        "loop",
        "loop/a.jpg",
        "images",
        "pipe",
        "no.jpg",
        "a://b",
    )

    def __init__(self, seed: str):
        self.random = random.Random(seed)

    def bytes(self) -> bytes:
        """What is no image and no JSON; often not UTF-8 either."""
        return b"\x80" + self.random.randbytes(self.random.choice([0, 1, 50, 10_000]))

    def text(self) -> str:
        """Up to 100,000 characters, maybe with lines, quotes and NULs, or the name of a picture at the end."""
        letters = self.random.choice(["ab c", 'a",\n', "äß漢字", "a\0", "[{"])
        size = self.random.choice([1, 300, 5000, 100_000])
        return "x" + "".join(self.random.choices(letters, k=size)) + self.random.choice(["x", "logo.png"])

    def path(self) -> str:
        """One of `paths`."""
        return self.random.choice(self.paths)

    def number(self) -> int | float:
        """No text."""
        return self.random.choice([0, 7, -1.5, 10**15])

    def list(self) -> list[Any]:
        """Nothing that a sample can be made of."""
        return self.random.choice([[], [3], [[]], [[[1]]], [None], [{"a": 1}]])

    def nothing(self) -> None:
        """An empty cell."""


def good_rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows that name files in `folder`, and what they mean: both files and the instruction."""
    pairs = [pair(number) for number in range(ROWS)]
    rows = image_files(folder, pairs)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return list(rows), [dict(zip(NAMES, each[:3], strict=True)) for each in pairs]


def spoil(junk: Junk, rows: list[Row], meant: list[Row], *kinds: str) -> None:
    """Put junk into random cells; what is meant becomes None, or the text where an instruction is one."""
    for row, meaning in zip(rows, meant, strict=True):
        for name in NAMES:
            if junk.random.random() < SHARE:
                kind = junk.random.choice(["text" if name == "edit_prompt" else "path", *kinds])
                row[name] = getattr(junk, kind)()
                meaning[name] = row[name] if kind == "text" else None


def jsonl(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """Lines of JSON, where a cell may hold anything but bytes."""
    rows, meant = good_rows(folder)
    spoil(junk, rows, meant, "number", "list", "nothing")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"train_data_dir": folder}, meant


def table_of_text(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """A CSV file, where all is text."""
    rows, meant = good_rows(folder)
    spoil(junk, rows, meant, "nothing")
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(rows)
    return {"dataset_name": folder / "pairs.csv"}, meant


def columns(folder: Path, junk: Junk) -> tuple[pa.Table, list[Row]]:
    """Images by path and as bytes, and instructions that are not all UTF-8."""
    rows, meant = good_rows(folder)
    spoil(junk, rows, meant, "bytes", "nothing")
    for number, row in enumerate(rows):
        for name in NAMES[:2]:
            if meant[number][name] and number % 2:
                row[name] = meant[number][name]
            is_bytes = isinstance(row[name], bytes)
            row[name] = {"bytes": row[name] if is_bytes else None, "path": None if is_bytes else row[name]}
    texts = [text.encode() if isinstance(text, str) else text for text in (row["edit_prompt"] for row in rows)]
    unchecked = pa.Array.from_buffers(TEXT, ROWS, pa.array(texts, pa.binary()).buffers())
    images = [pa.array([row[name] for row in rows], PICTURE) for name in NAMES[:2]]
    return pa.Table.from_arrays([*images, unchecked], NAMES), meant


def parquet(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """A Parquet file beside its images."""
    table, meant = columns(folder, junk)
    pq.write_table(table, folder / "pairs.parquet")
    return {"dataset_name": folder / "pairs.parquet"}, meant


def stream(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """The same, read as a stream."""
    flags, meant = parquet(folder, junk)
    return flags | {"streaming": True}, meant


def saved(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """What `save_to_disk` writes."""
    table, meant = columns(folder, junk)
    datasets.Dataset(table).save_to_disk(folder)
    return {"dataset_name": folder}, meant


def tar(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """A tar file, whose members hold any bytes, or are left out."""
    _, meant = good_rows(folder)
    rows = [dict(row) for row in meant]
    spoil(junk, rows, meant, "bytes", "number", "list")
    with tarfile.open(folder / "pairs.tar", "w") as file:
        for number, row in enumerate(rows):
            for name, member in zip(NAMES, ("original.jpg", "edited.jpg", "json"), strict=True):
                value = row[name]
                if member == "json" and not isinstance(value, bytes):
                    value = json.dumps({"edit_prompt": value, "number": number}).encode()
                add(file, f"{number:03}.{member}", value if isinstance(value, bytes) else b"\x80")
    return {"dataset_name": folder / "pairs.tar"}, meant


def seeds(folder: Path, junk: Junk) -> tuple[Flags, list[Row]]:
    """The layout of the InstructPix2Pix repository: files of any content, folders and seeds of any name."""
    _, meant = good_rows(folder)
    rows = [dict(row) for row in meant]
    spoil(junk, rows, meant, "bytes", "number", "list")
    listed: list[Any] = []
    for number, row in enumerate(rows):
        place = folder / f"{number:03}"
        place.mkdir()
        for name, file in zip(NAMES, ("11_0.jpg", "11_1.jpg", "prompt.json"), strict=True):
            value = row[name]
            if name == "edit_prompt" and not isinstance(value, bytes):
                value = json.dumps({"edit": value}).encode()
            (place / file).write_bytes(value if isinstance(value, bytes) else b"\x80")
        listed.append([place.name, ["11"]])
        if junk.random.random() < SHARE:
            spoiled = junk.random.choice([junk.path, junk.number, junk.list, lambda: "\ud800"])()
            listed[-1] = junk.random.choice([[spoiled, ["11"]], [place.name, [spoiled]]])
            meant[number]["input_image"] = None
    (folder / "seeds.json").write_text(json.dumps(listed))
    return {"train_data_dir": folder}, meant


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [jsonl, table_of_text, parquet, stream, saved, tar, seeds], ids=lambda k: k.__name__)
def test_good_samples_are_encoded_and_bad_ones_stand_aside_with_a_reason(
    kind: Callable[[Path, Junk], tuple[Flags, list[Row]]], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends well; each sample is there, in its place, with its own files and text or with a short reason."""
    monkeypatch.setattr(run, "find_checkpoint", lambda *_, **__: fakes.Checkpoint())
    monkeypatch.setattr(encoders, "Encoders", fakes.Encoders)
    flags, meant = kind(tmp_path / "data", Junk(f"{kind.__name__} {seed}"))
    flags |= {"pretrained_model_name_or_path": "fake", "cache": tmp_path / "cache", "cache_dir": tmp_path / "downloads"}
    main(tiny.arguments(flags | {"resolution": fakes.RESOLUTION, "dataloader_num_workers": 0}))
    samples = Cache.open(tmp_path / "cache").samples().to_pylist()
    assert [sample["position"] for sample in samples] == list(range(ROWS))
    bad = 0
    for sample, meaning in zip(samples, meant, strict=True):
        original, edited, text = meaning.values()
        if None in (original, edited, text):
            bad += 1
            assert sample["status"] == "quarantined"
            assert 0 < len(sample["reason"]) < 300
            assert "\n" not in sample["reason"]
        else:
            assert (sample["status"], sample["reason"]) == ("ok", None)
            assert (sample["pair"], sample["instruction"]) == (content_key(original, edited), text)
    assert 0 < bad < ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("a.jsonl", '{"input_image": "a.png", "edited', "line 301 is no JSON: "),
        ("a.jsonl", "[1]", "line 301 holds a list, expected an object"),
        ("a.csv", "a.png,b.png,x,y,z", "Expected 3 fields in line 301, saw 5"),
    ],
)
def test_a_malformed_line_is_named_by_its_file_and_number(
    tmp_path: Path, name: str, line: str, said: str, *, streaming: bool
) -> None:
    """From 1 on, as editors count."""
    columns = ["input_image", "edited_image", "edit_prompt"]
    good = json.dumps(dict(zip(columns, ("a.png", "b.png", "x"), strict=True)))
    head, row = (good, good) if name.endswith("jsonl") else (",".join(columns), "a.png,b.png,x")
    file = tmp_path / name
    file.write_text("\n".join([head, *[row] * 299, line, row, ""]))
    with pytest.raises(SourceError, match=re.escape(f"dataset {file} cannot be opened: ") + ".*" + re.escape(said)):
        open_pairs(Dataset(dataset_name=str(file), streaming=streaming), tmp_path / "downloads")
