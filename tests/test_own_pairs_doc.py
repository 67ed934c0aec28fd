"""Runs docs/own-pairs.md with a stand-in for the large model: its loop, its lines, its command."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import tiny
from forms import PAIRS, jpeg, opened
from ip2p.encode.__main__ import main
from ip2p.encode.cache.format import Cache

TEXT = (Path(__file__).parents[1] / "docs" / "own-pairs.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def code(language: str) -> list[str]:
    """The blocks in a language, in order."""
    return [block for found, block in BLOCKS if found == language]


def test_the_loop_makes_pairs_that_the_command_encodes(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each photo is edited by each instruction, once; scores of the lines on the page can be kept."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(2):
        tiny.picture(number, (20, 12)).save(f"photos/{number + 1}.jpg")
    Path("instructions.txt").write_text(code("text")[0])
    asked = []

    def edit(image: Image.Image, prompt: str) -> Any:
        asked.append(prompt)
        return SimpleNamespace(images=[tiny.picture(7 + len(asked), (32, 32))])  # large models choose their own size

    edit.to = lambda _: edit  # type: ignore[attr-defined]
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: edit)
    for _ in range(2):
        exec(compile(code("python")[0], "docs/own-pairs.md", "exec"), {})
    assert asked == 2 * ["make it snowy", "turn day into night"]
    with Image.open("pairs/edited/2-1.png") as edited:
        assert edited.size == (20, 12)
    shutil.copytree(sd, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    _, *arguments = shlex.split(code("sh")[0].replace("\\\n", ""))
    main([*arguments, "--resolution", "8", "--dataloader_num_workers", "0"])
    assert Cache.open(Path("cache")).manifest["counts"] == {"ok": 4}
    Path("pairs/metadata.jsonl").write_text(code("jsonl")[0])
    kept = opened({"train_data_dir": Path("pairs")}, keep_columns=("score",))
    assert (len(kept), kept[1].instruction) == (2, "turn day into night")
    assert kept.kept()["score"].to_pylist() == [8.5, 3]


def test_each_turn_of_a_chain_becomes_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the picture before it, with its own instruction; the last one leads to the final image."""
    monkeypatch.chdir(tmp_path)
    Path("turns").mkdir()
    names = ["original_input_image", "edit_turn1", "edit_turn2", "final_image"]
    for number, name in enumerate(names):
        Path(f"turns/{name}.jpg").write_bytes(jpeg(number))
    files = [{"id": name, "url": f"{name}.jpg"} for name in reversed(names)]
    row = {"files": files, "metadata_edit_turn_prompts": [PAIRS[n].instruction for n in (0, 4, 8)]}
    Path("turns/multi_turn.jsonl").write_text(json.dumps(row) + "\n")
    exec(compile(code("python")[1], "docs/own-pairs.md", "exec"), {})
    source = opened({"train_data_dir": Path("turns")})
    assert [source[turn][:3] for turn in range(3)] == [
        (jpeg(turn), jpeg(turn + 1), PAIRS[4 * turn].instruction) for turn in range(3)
    ]
