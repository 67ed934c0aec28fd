"""Tests of encode/keeper/verify.py: no damage goes unnamed, and what is dropped comes back equal."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

import tiny
from ip2p.encode.base.errors import CacheError
from ip2p.encode.base.files import file_record, read_record, write_record
from ip2p.encode.cache import format as cache_module
from ip2p.encode.cache.format import Cache, Unit
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.writer import write_state
from ip2p.encode.keeper.__main__ import main
from ip2p.encode.keeper.verify import repair, verify
from ip2p.encode.planning.draft import open_existing

Encode = Callable[..., None]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs, of which one has no instruction and one a broken image."""
    columns = tiny.pairs(10)
    columns["edit_prompt"][3] = ""
    columns["edited_image"][5] = {"bytes": b"not an image", "path": None}
    return tiny.dataset(tmp_path_factory.mktemp("data") / "broken", columns)


@pytest.fixture(scope="module")
def encode_pairs(sd: Path, pairs: Path, encode: Encode) -> Callable[[Path], None]:
    """Encode those pairs, both views, four rows in a shard."""

    def run(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_module, "SHARD_ROWS", 4)
            encode(sd, pairs, folder, random_flip=True)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encode_pairs: Callable[[Path], None]) -> Path:
    """A finished cache of several shards; copy it before changing it."""
    folder = tmp_path_factory.mktemp("caches") / "several"
    encode_pairs(folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def files(folder: Path) -> list[str]:
    """Paths of all files but the lock."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def damages(content: bytes, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """One bit flipped at both ends and in between, the file cut short, the file gone (None)."""
    last = 8 * len(content) - 1
    for bit in (0, last, *(chance.randint(0, last) for _ in range(3))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)
    for length in {0, len(content) // 2, len(content) - 1}:
        yield f"cut to {length}", content[:length]
    yield "deleted", None


def named(folder: Path) -> list[str]:
    """Every finding as a line."""
    return [f"{finding.path}: {finding.problem}" for finding in verify(folder)]


def reseal(folder: Path, unit: Unit) -> None:
    """Bring a commit record up to date with its shards, as if they had been written so."""
    path = folder / "commits" / f"{unit.name}.json"
    record = read_record(path)
    write_record(path, record | {"files": {name: file_record(folder / name) for name in record["files"]}})
    cache = Cache.open(folder)
    write_state(folder, cache.manifest, cache.samples(), cache.commits())


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """All arrays, read by zarr-python."""
    group = zarr.open_group(folder / "data.zarr", mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def test_a_finished_cache_is_sound(finished: Path, cache: Path) -> None:
    """Nothing is found where nothing is wrong, with quarantined samples, several shards, a partial last one."""
    assert Cache.open(finished).manifest["counts"] == {"ok": 8, "quarantined": 2}
    assert len(files(finished)) == 1 + 2 + 4 + (3 * 2 + 2) + (3 * 2 * 2 + 2)
    assert named(finished) == named(cache) == []


def test_any_damage_to_any_file_is_named(copied: Path) -> None:
    """A flipped bit, a cut or a deletion, in whatever file of the cache, makes a finding with the file's path."""
    chance = random.Random(0)
    for path in files(copied):
        file = copied / path
        content = file.read_bytes()
        for what, damaged in damages(content, chance):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            assert any(path in line for line in named(copied)), (path, what)
        file.write_bytes(content)
    assert named(copied) == []


def test_all_damage_is_named_at_once(copied: Path) -> None:
    """A damaged file does not hide another: all but the tables that a damaged manifest describes are named."""
    damaged = [path for path in files(copied) if path.startswith(("data.zarr/edited/c/", "commits/"))]
    for path in [*damaged, "manifest.json"]:
        content = (copied / path).read_bytes()
        (copied / path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    text = "\n".join(named(copied))
    assert all(path in text for path in damaged if path.startswith("commits/"))
    assert "manifest.json" in text


@pytest.mark.parametrize("name", ["notes.txt", "commits/text.json", "data.zarr/edited/c/0/0/extra", ".DS_Store"])
def test_files_that_do_not_belong_are_named_and_never_deleted(name: str, copied: Path) -> None:
    """A stray file is a finding of its own; repair leaves it, and all else, alone."""
    (copied / name).write_text("mine")
    before = {path: (copied / path).stat().st_mtime_ns for path in files(copied) if path.count("/") > 1}
    findings = verify(copied)
    assert [finding.path for finding in findings] == [name]
    assert repair(copied, findings) == []
    assert {path: (copied / path).stat().st_mtime_ns for path in files(copied) if path.count("/") > 1} == before


STRAYS = "._images-v0-000000.json", "images-v0-000000 (copy).json", "text-0000000.json", "images-v00-000000.json"


def test_strays_among_the_records_are_no_records(
    copied: Path,
    finished: Path,
    tmp_path: Path,
    encode_pairs: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether they are broken or whole: each command passes over them, and no advice is given but to move them away."""
    record = (copied / "commits" / "images-v0-000000.json").read_bytes()
    for name, content in zip(STRAYS, [b"\0\5\x16\7", record, record, b"{}"], strict=True):
        (copied / "commits" / name).write_bytes(content)
    encode_pairs(copied)
    assert Cache.open(copied).commits().keys() == Cache.open(finished).commits().keys()
    main(["info", str(copied)])
    main(["push", str(copied), f"file://{tmp_path / 'pushed'}"])
    assert files(tmp_path / "pushed") == files(finished)
    for flag in [], ["--repair"]:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["verify", str(copied), *flag])
        *lines, last = capsys.readouterr().out.splitlines()
        assert lines == [f"{copied}/commits/{n}: is no part of the cache: move it away" for n in sorted(STRAYS)]
        assert last == "4 findings"
    (copied / "manifest.json").unlink()
    for path in (copied / "commits").iterdir():
        path.unlink() if path.name not in STRAYS else None
    assert open_existing(copied) is None


def test_a_shard_without_record_and_a_leftover_are_dropped(copied: Path) -> None:
    """What a killed process leaves is named and goes: temporary files, and shards that were never committed."""
    leftovers = ["commits/.text-000000.json.77", "data.zarr/text/c/0/0/0.ab12.partial", "data.zarr/text/c/9/0/0"]
    for name in leftovers:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(b"torn")
    findings = verify(copied)
    assert sorted(finding.path for finding in findings) == leftovers
    assert repair(copied, findings) == leftovers
    assert named(copied) == []


def test_numbers_that_are_not_finite_are_named(copied: Path) -> None:
    """A row that was encoded holds finite numbers only, even where all checksums are right."""
    array = zarr.open_group(copied / "data.zarr")["edited"]
    assert isinstance(array, zarr.Array)
    array[5, 1, 2, 3, 4] = np.inf
    reseal(copied, Unit("images", 1, 1))
    assert named(copied) == ["data.zarr/edited/c/1/1/0/0/0: row 5 is not finite (1 such rows)"]


def test_numbers_where_nothing_was_encoded_are_named(copied: Path) -> None:
    """A row of a quarantined sample is NaN throughout."""
    record = read_record(copied / "commits" / "images-v0-000001.json")
    (empty,) = map(int, record["quarantined"])
    array = zarr.open_group(copied / "data.zarr")["original"]
    assert isinstance(array, zarr.Array)
    array[4 + empty, 0, 0, 0, 0] = 0
    reseal(copied, Unit("images", 1, 0))
    (line,) = named(copied)
    assert line.startswith(f"data.zarr/original/c/1/0/0/0/0: row {4 + empty} holds numbers, but nothing was encoded")


def test_samples_that_point_at_other_content_are_named(copied: Path) -> None:
    """A sample's row must hold its pair in every view, and its text row its instruction."""
    path = copied / "commits" / "images-v1-000000.json"
    record = read_record(path)
    first, second, rest = record["keys"][:32], record["keys"][32:64], record["keys"][64:]
    record["keys"] = second + first + rest
    write_record(path, record)
    samples = Cache.open(copied).samples().to_pylist()
    (line,) = named(copied)
    assert f"sample {samples[0]['key']} differs from what its commit records say (2 such samples)" in line


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("commits/images-v0-000001.json", "commits/images-v0-000000.json"),
        ("manifest.json", "commits/text-000000.json"),
        ("commits/text-000000.json", "manifest.json"),
    ],
)
def test_a_record_under_the_name_of_another_is_named(source: str, target: str, copied: Path) -> None:
    """A whole record in the wrong place is damage."""
    shutil.copy(copied / source, copied / target)
    assert any(line.startswith(f"{target}: ") for line in named(copied))


def test_a_cache_without_the_empty_instruction_is_named(copied: Path) -> None:
    """Text row 0 is what conditioning dropout uses; it must be the empty instruction."""
    path = copied / "commits" / "text-000000.json"
    record = read_record(path)
    record["keys"] = "0" * 32 + record["keys"][32:]
    write_record(path, record)
    assert "commits/text-000000.json: does not hold the empty instruction in row 0" in named(copied)


def test_an_unfinished_cache_is_a_finding(copied: Path) -> None:
    """Samples that wait for their encoding are told, with the command that encodes them."""
    cache = Cache.open(copied)
    samples = cache.samples()
    status = ["pending" if n == 9 else status for n, status in enumerate(samples["status"].to_pylist())]
    samples = samples.set_column(samples.column_names.index("status"), "status", [status])
    write_state(copied, cache.manifest, samples, cache.commits())
    manifest = copied / "manifest.json"
    write_record(manifest, read_record(manifest) | {"counts": cache.manifest["counts"]})
    lines = named(copied)
    assert "samples.parquet: 1 samples are not encoded yet: run the same ip2p-encode again" in lines
    assert any(line.startswith("manifest.json: counts") for line in lines)


@pytest.mark.parametrize("how", ["flip", "delete"])
@pytest.mark.parametrize(
    "path",
    [
        "data.zarr/edited/c/1/1/0/0/0",
        "data.zarr/text/c/0/0/0",
        "commits/images-v0-000001.json",
        "commits/text-000000.json",
        "samples.parquet",
        "data.zarr/original/zarr.json",
    ],
)
def test_what_repair_drops_the_next_encode_makes_again(
    path: str, how: str, copied: Path, finished: Path, encode_pairs: Callable[[Path], None]
) -> None:
    """Damage, `--repair`, the same ip2p-encode: then the cache is sound, and equal to what it was, number by number."""
    content = bytearray((copied / path).read_bytes())
    content[len(content) // 2] ^= 16
    (copied / path).write_bytes(content) if how == "flip" else (copied / path).unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(copied), "--repair"])
    assert stopped.value.code == 1
    statuses = Cache.open(copied).samples()["status"].to_pylist() if path != "samples.parquet" else []
    assert ("pending" in statuses) == path.startswith(("data.zarr/edited", "data.zarr/text", "commits"))
    encode_pairs(copied)
    assert named(copied) == []
    was, now = numbers(finished), numbers(copied)
    assert was.keys() == now.keys()
    assert all(np.array_equal(was[name], now[name], equal_nan=True) for name in was)
    assert Cache.open(copied).samples() == Cache.open(finished).samples()


@pytest.mark.parametrize(
    "wrong",
    [
        {"shard_rows": {"images": 4, "text": 0}},
        {"shard_rows": {"images": 7, "text": 4}},
        {"vae_scale_factor": 8},
        {"views": ["plain", "flip", "crop9"]},
        {"masks": True},
        {"files": None},
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_the_arrays_is_told(
    wrong: dict[str, object], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though its seal is right: before rows are read at wrong places, or latents taken for others."""
    write_record(copied / "manifest.json", read_record(copied / "manifest.json") | wrong)
    expected = "lists no files" if "files" in wrong else f"of {next(iter(wrong))}.*, and the arrays say .*: encode anew"
    with pytest.raises(CacheError, match=f"manifest.json.* {expected}"):
        Reader(Cache.open(copied))
    with pytest.raises(SystemExit):
        main(["verify", str(copied)])
    out, err = capsys.readouterr()
    assert re.search(f"manifest.json.* {expected}", out + err)
    assert "--repair" not in out + err


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
)


def test_repair_does_not_touch_a_cache_that_is_being_written(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--repair` takes the lock of an encode; where another process holds it, it refuses and deletes nothing."""
    (copied / "commits" / "text-000000.json").write_text("{}")
    before = files(copied)
    command = [sys.executable, "-c", HOLD, copied / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(SystemExit) as stopped:
            main(["verify", str(copied), "--repair"])
        other.communicate(b"\n")
    assert stopped.value.code == 2
    assert "another ip2p-encode" in capsys.readouterr().err
    assert files(copied) == before


def test_findings_are_lines_for_people_and_json_for_machines(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per finding with the path of the file, the exit status 1, and the same as JSON."""
    victim = copied / "data.zarr" / "text" / "c" / "0" / "0" / "0"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(copied)])
    assert stopped.value.code == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{victim}: has ")
    assert "--repair" in last
    with pytest.raises(SystemExit):
        main(["verify", str(copied), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert [wrong["path"] for wrong in answer["wrong"]] == ["data.zarr/text/c/0/0/0"]


def test_what_is_no_cache_is_not_verified(tmp_path: Path) -> None:
    """A folder without any part of a cache, or a cache of another format, is a user's mistake."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not a cache"):
        verify(tmp_path)
    write_record(tmp_path / "manifest.json", {"format": 99})
    with pytest.raises(CacheError, match="format 99"):
        verify(tmp_path)
