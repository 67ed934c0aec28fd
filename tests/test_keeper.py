"""Tests of `ip2p-cache` as its users see it."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from ip2p.encode.cache.format import Cache
from ip2p.encode.keeper.__main__ import main
from ip2p.encode.keeper.verbs import VERBS

Encode = Callable[..., None]


@pytest.fixture(scope="module")
def quarantined(tmp_path_factory: pytest.TempPathFactory, sd: Path, encode: Encode) -> Path:
    """A cache of one view and four pairs, of which the second has no instruction."""
    columns = tiny.pairs(4)
    columns["edit_prompt"][1] = " "
    folder = tmp_path_factory.mktemp("quarantined")
    encode(sd, tiny.dataset(folder / "data", columns), folder / "cache")
    return folder / "cache"


def test_info_says_what_is_inside(quarantined: Path, sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples by status, views, shapes, bytes on the disk, model, dataset and encoding: for people and as JSON."""
    main(["info", str(quarantined)])
    text = capsys.readouterr().out
    for part in ("3 ok, 1 quarantined", "views: plain", "3 x 1 x 4 x 8 x 8", "4 x 77 x 16", str(sd), "resolution"):
        assert part in text
    main(["info", str(quarantined), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == {"ok": 3, "quarantined": 1}
    assert found["arrays"]["edited"]["shape"] == [3, 1, 8, 8, 8]
    (shard,) = (path for path in (quarantined / "data.zarr" / "edited" / "c").rglob("*") if path.is_file())
    metadata = quarantined / "data.zarr" / "edited" / "zarr.json"
    assert found["arrays"]["edited"]["bytes"] == shard.stat().st_size + metadata.stat().st_size
    assert found["encoding"] == Cache.open(quarantined).manifest["encoding"]


def test_info_counts_what_the_records_hold(
    quarantined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not what a table says that was written before records were lost."""
    copy = shutil.copytree(quarantined, tmp_path / "cache")
    shutil.rmtree(copy / "commits")
    main(["info", str(copy), "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == {"pending": 3, "quarantined": 1}


def test_info_lists_the_quarantined(quarantined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--quarantined names key, position, instruction and reason of each sample that stands aside, and of no other."""
    main(["info", str(quarantined), "--quarantined", "--json"])
    (sample,) = json.loads(capsys.readouterr().out)["quarantined"]
    key = Cache.open(quarantined).samples()["key"].to_pylist()[1]
    assert sample == {"key": key, "position": 1, "instruction": " ", "reason": "the instruction is empty"}
    main(["info", str(quarantined), "--quarantined"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(part in last for part in (key, "position 1", "the instruction is empty"))


def test_diff_names_fields_and_counts_shared_samples(
    quarantined: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each field of the manifests that differs is shown with both values; samples are compared by their keys."""
    with pytest.raises(SystemExit) as stopped:
        main(["diff", str(cache), str(quarantined), "--json"])
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fields"]["views"] == [["plain", "flip"], ["plain"]]
    assert found["fields"]["counts.quarantined"] == [None, 1]
    assert not any(field.startswith(("identity.", "encoding.")) for field in found["fields"])
    assert found["samples"] == {"shared": 3, "only in a": 7, "only in b": 1}
    with pytest.raises(SystemExit):
        main(["diff", str(cache), str(quarantined)])
    text = capsys.readouterr().out
    assert "samples: 3 in both, 7 only in" in text
    assert f"views\n  {cache}: ['plain', 'flip']\n  {quarantined}: ['plain']" in text


def test_diff_of_a_cache_and_its_copy_is_silent(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No field is shown and the exit status is 0 where nothing differs."""
    copy = shutil.copytree(cache, tmp_path / "copy")
    main(["diff", str(cache), str(copy)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("samples: 10 in both, 0 only in")


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_and_the_overview_names_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`ip2p-cache --help` lists the verbs, `ip2p-cache VERB --help` the flags of one, with or without a cache."""
    main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: ip2p-cache")
    assert f"\n  {verb} " in text
    for arguments in ([verb, "--help"], [verb, "a", "b", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: ip2p-cache {verb}")


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"]])
def test_help_waits_for_no_heavy_import(arguments: list[str]) -> None:
    """Help comes at once: neither torch nor zarr is imported for it."""
    code = (
        "import sys; from ip2p.encode.keeper.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print({'torch', 'zarr', 'datasets', 'diffusers', 'pyarrow'} & set(sys.modules))"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 20
    assert "usage: ip2p-cache" in result.stdout
    assert result.stdout.endswith("set()\n")


def test_flags_may_stand_in_a_file(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--config` gives the flags of a verb, after what stands before them."""
    (tmp_path / "flags.yaml").write_text("json: true\n")
    main(["info", str(cache), "--config", str(tmp_path / "flags.yaml")])
    assert json.loads(capsys.readouterr().out)["samples"] == {"ok": 10}


@pytest.mark.parametrize("verb", ["info", "verify", "push"])
def test_only_what_encodes_or_decodes_waits_for_torch(verb: str, cache: Path, tmp_path: Path) -> None:
    """To look at a cache, check it, or copy it, the networks are not imported."""
    code = (
        "import sys; from ip2p.encode.keeper.__main__ import main\n"
        "main(sys.argv[1:]); print({'torch', 'datasets', 'diffusers'} & set(sys.modules))"
    )
    arguments = [verb, str(cache), *([str(tmp_path / "copy")] if verb == "push" else [])]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (
            ["verfy", "CACHE"],
            "no verb verfy: expected one of info, verify, preview, diff, push, pull; did you mean verify",
        ),
        (["info"], "expected `ip2p-cache info CACHE`, then flags"),
        (["info", "--json"], "expected `ip2p-cache info CACHE`, then flags"),
        (["diff", "CACHE"], "expected `ip2p-cache diff A B`, then flags"),
        (["info", "CACHE", "CACHE"], "expected `ip2p-cache info CACHE`, then flags"),
        (["verify", "CACHE", "--cache_di", "x"], "unknown flag --cache_di; did you mean --cache_dir?"),
        (["verify", "CACHE", "--reencode", "x"], "--reencode x: expected a whole number"),
        (["info", "CACHE", "--jsn"], "unknown flag --jsn; did you mean --json?"),
        (["info", "nowhere"], "nowhere is not a cache"),
        (["verify", "nowhere"], "nowhere is not a cache"),
        (["preview", "nowhere"], "nowhere is not a cache"),
        (["diff", "CACHE", "nowhere"], "nowhere is not a cache"),
        (["verify", "CACHE", "--reencode", "-1"], "--reencode -1: expected 0 or more"),
        (["preview", "CACHE", "--samples", "0"], "--samples 0: expected 1 or more"),
    ],
)
def test_wrong_use_is_answered_in_a_line(
    arguments: list[str], part: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what was found and what was expected; the exit status is 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(cache) if argument == "CACHE" else argument for argument in arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ip2p-cache: {part}")


def test_a_damaged_table_is_told_by_all_that_read_it(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """info, preview and diff do not show what they cannot trust."""
    damaged = Path(shutil.copytree(cache, tmp_path / "damaged"))
    content = bytearray((damaged / "samples.parquet").read_bytes())
    content[100] ^= 1
    (damaged / "samples.parquet").write_bytes(content)
    for arguments in (["info", str(damaged)], ["preview", str(damaged)], ["diff", str(cache), str(damaged)]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "samples.parquet is damaged" in capsys.readouterr().err
