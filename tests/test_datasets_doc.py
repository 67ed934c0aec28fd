"""Runs docs/datasets.md: each section's code, in order, beside datasets of the kinds that it speaks of."""

import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import forms
import test_presets
from forms import PAIRS
from ip2p.encode.__main__ import main
from ip2p.encode.cache.format import Cache
from ip2p.encode.data import columns
from ip2p.encode.judging import CLIP
from test_scores import tiny_judges

TEXT = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in TEXT.split("\n## ")[1:]}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNNABLE = [title for title, section in SECTIONS.items() if "```sh" in section]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, sd: Path) -> Path:
    """A folder with everything that the page names, so that its commands run as they stand."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(sd, world / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    shutil.copytree(tiny_judges(tmp_path_factory.mktemp("judges")).clip, world / CLIP)
    for name in test_presets.SCHEMAS:
        test_presets.write(world / name, name)
    pq.write_table(pq.read_table(next((world / "osunlp" / "MagicBrush").glob("*.parquet"))), world / "pairs.parquet")
    lines = next(code for language, code in BLOCK.findall(TEXT) if language == "jsonl")
    for number, row in enumerate(map(json.loads, lines.splitlines())):
        for side, column in enumerate(("original", "edited")):
            (world / "pairs" / row[column]).parent.mkdir(parents=True, exist_ok=True)
            (world / "pairs" / row[column]).write_bytes(PAIRS[number][side])
    (world / "pairs" / "metadata.jsonl").write_text(lines)
    for folder in ("shards", "others"):
        (world / folder).mkdir()
    for number, (original, edited, text, *_) in enumerate(PAIRS[:2]):
        with tarfile.open(world / "shards" / f"pairs-{number:03}.tar", "w") as tar:
            forms.add(tar, "7.original.jpg", original)
            forms.add(tar, "7.edited.jpg", edited)
            forms.add(tar, "7.txt", text.encode())
        with tarfile.open(world / "others" / f"{number}.tar", "w") as tar:
            forms.add(tar, "7.0.png", original)
            forms.add(tar, "7.1.png", edited)
            forms.add(tar, "7.json", json.dumps({"wish": text, "id": "7"}).encode())
    forms.seeds(world / "clip-filtered-dataset", PAIRS[:8])
    return world


@pytest.fixture
def server(world: Path) -> Iterator[str]:
    """The url at which the tar files are served."""
    with forms.serve(world / "shards") as url:
        yield url


@pytest.mark.parametrize("title", RUNNABLE)
def test_each_example_encodes_all_pairs_of_its_dataset(
    title: str, world: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command fills a cache in which no sample stands aside; smaller pictures are all that the test adds."""
    monkeypatch.chdir(world)
    for number, (language, code) in enumerate(BLOCK.findall(SECTIONS[title])):
        if language == "python":
            exec(compile(code, "docs/datasets.md", "exec"), {})
        elif language == "sh":
            program, *arguments = shlex.split(code.replace("\\\n", "").replace("https://example.org", server))
            assert program == "ip2p-encode"
            arguments[arguments.index("--cache") + 1] = str(tmp_path / f"cache-{number}")
            main([*arguments, "--resolution", "8", "--dataloader_num_workers", "0", "--cache_dir", str(tmp_path)])
            counts = Cache.open(tmp_path / f"cache-{number}").manifest["counts"]
            assert counts.keys() == {"ok"}
            assert counts["ok"] > 1


def test_every_section_about_a_source_has_an_example() -> None:
    """A kind of dataset without a working example is not documented."""
    assert [title for title in SECTIONS if title not in RUNNABLE] == ["Which columns"]


def test_the_table_of_known_datasets_is_the_presets() -> None:
    """The page names each with its columns, and those that are refused."""
    row = r"^\| (\S+/\S+) \| (\S+) \| (\S+) \| (\S+)(?: \(back: (\S+)\))?(?: \(masks: (\S+)\))?"
    row += r"(?: \((captions): input, output\))? \|$"
    rows = re.findall(row, TEXT, re.MULTILINE)
    table = {
        name: {**columns.preset(a, b, text, *filter(None, [back]), mask=mask or None), **captions}
        for name, a, b, text, back, mask, told in rows
        for captions in [columns.CAPTIONS if told else {}]
    }
    assert table == columns.PRESETS
    assert all(name in TEXT for name in columns.EVALUATION_ONLY)
