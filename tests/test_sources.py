"""Tests of the sources: whatever form a dataset has, the same pairs come out of it."""

import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from forms import (
    KINDS,
    NAMES,
    PAIRS,
    Flags,
    Kind,
    add,
    image_files,
    metadata_jsonl,
    opened,
    parquet,
    paths,
    seeds,
    shards,
    stream,
)
from ip2p.encode.__main__ import main
from ip2p.encode.cache import format as cache
from ip2p.encode.cache.format import Cache
from ip2p.encode.data.pairs import Pair

Run = Callable[..., None]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def encoded(encode: Run, sd: Path, flags: Flags, cache: Path) -> tuple[dict[str, np.ndarray], list]:
    """Encode a dataset; its arrays by name, and its samples."""
    encode(sd, cache=cache, resolution=8, **{"dataset": None} | flags)
    opened = Cache.open(cache)
    arrays = opened.arrays("images") | opened.arrays("text")
    return {name: np.asarray(array[:]) for name, array in arrays.items()}, opened.samples().to_pylist()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, sd: Path, encode: Run) -> tuple[dict[str, np.ndarray], list]:
    """What the cache of 64 pairs holds that came as Parquet."""
    folder = tmp_path_factory.mktemp("reference")
    return encoded(encode, sd, parquet(folder / "data", PAIRS), folder / "cache")


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.__name__)
def test_the_same_pairs_give_the_same_cache_from_every_source(
    kind: Kind,
    sd: Path,
    tmp_path: Path,
    encode: Run,
    reference: tuple[dict[str, np.ndarray], list],
) -> None:
    """Files pass through unchanged, so keys, order and all numbers are those of the same pairs in Parquet."""
    arrays, samples = encoded(encode, sd, kind(tmp_path / "data", PAIRS), tmp_path / "cache")
    assert arrays.keys() == reference[0].keys()
    assert all(np.array_equal(arrays[name], reference[0][name], equal_nan=True) for name in arrays)
    groups = [sample.pop("group") for sample in samples]  # the one thing that the original project's layout adds
    assert samples == [{name: value for name, value in sample.items() if name != "group"} for sample in reference[1]]
    assert all(groups) if kind is seeds else not any(groups)
    assert Counter(sample["status"] for sample in samples) == {"ok": 64}


@every_kind
def test_a_source_is_read_in_any_order_in_any_process(kind: Kind, tmp_path: Path) -> None:
    """Sources travel to worker processes, which ask for samples as they like."""
    source = pickle.loads(pickle.dumps(opened(kind(tmp_path / "data", PAIRS[:9]))))
    assert [source[index] for index in reversed(range(len(source)))] == PAIRS[8::-1]
    with pytest.raises(IndexError):
        source[9]


@every_kind
def test_the_fingerprint_tells_whether_a_dataset_changed(kind: Kind, tmp_path: Path) -> None:
    """It stays when nothing changed, and is another when one edited image is another of the same size."""
    other = PAIRS[6]._replace(edited=(PAIRS[6].edited or b"")[:-2] + b"\0\0")
    flags = kind(tmp_path / "data", PAIRS[:9])
    first = opened(flags).fingerprint()
    assert opened(flags).fingerprint() == first
    shutil.rmtree(tmp_path / "data")
    kind(tmp_path / "data", [*PAIRS[:6], other, *PAIRS[7:9]])
    changed = opened(flags)
    assert changed[6] == other
    assert changed.fingerprint() != first


@pytest.mark.parametrize("kind", [paths, metadata_jsonl, seeds], ids=lambda kind: kind.__name__)
def test_an_image_that_changes_beside_its_table_changes_the_fingerprint(kind: Kind, tmp_path: Path) -> None:
    """The list of the pairs stays as it is, but one file has a later time."""
    flags = kind(tmp_path / "data", PAIRS[:9])
    before = opened(flags).fingerprint()
    image = sorted((tmp_path / "data").rglob("*.jpg"))[3]
    os.utime(image, (image.stat().st_atime + 1, image.stat().st_mtime + 1))
    assert opened(flags).fingerprint() != before


@pytest.mark.parametrize("kind", [parquet, paths, metadata_jsonl, shards, seeds], ids=lambda kind: kind.__name__)
def test_a_missing_image_stands_aside_and_nothing_else_moves(kind: Kind, sd: Path, tmp_path: Path, encode: Run) -> None:
    """A side that is not there is a reason in the samples table, not a crash, and its neighbors stay what they are."""
    pairs = [*PAIRS[:2], PAIRS[2]._replace(edited=None), *PAIRS[3:5]]
    flags = kind(tmp_path / "data", pairs)
    for empty in (file for file in (tmp_path / "data").rglob("*.jpg") if not file.stat().st_size):
        empty.unlink()
    if kind is shards:
        drop_empty_members(tmp_path / "data")
    _, samples = encoded(encode, sd, flags, tmp_path / "cache")
    assert [sample["reason"] for sample in samples] == [None, None, "the edited image is missing", None, None]


def drop_empty_members(folder: Path) -> None:
    """Write tar files again without the members that hold nothing."""
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        with tarfile.open(path, "w") as tar:
            for name, content in files.items():
                if content:
                    add(tar, name, content)


def many_prompts(folder: Path) -> Flags:
    """Three rows with two, no and one instruction, two of them with one that leads back."""
    rows: list[dict[str, object]] = [
        {"edit": ["make it red", "turn it red"], "inverse_edit": "make it blue"},
        {"edit": [], "inverse_edit": None},
        {"edit": ["make it snowy"], "inverse_edit": "make it green"},
    ]
    for row, files in zip(rows, image_files(folder, PAIRS[:3]), strict=True):
        row |= {"input": files["input_image"], "output": files["edited_image"]}
    lines = map(json.dumps, rows)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"train_data_dir": folder}


def test_each_instruction_of_a_list_can_be_a_sample_of_its_own(sd: Path, tmp_path: Path, encode: Run) -> None:
    """With --prompt_choice all they share the row of their images; a row without any stands aside, as before."""
    flags = many_prompts(tmp_path / "data")
    first = opened(flags)
    assert [pair.instruction for pair in map(first.__getitem__, range(len(first)))] == [
        "make it red",
        None,
        "make it snowy",
    ]
    _, samples = encoded(encode, sd, flags | {"prompt_choice": "all"}, tmp_path / "cache")
    assert [sample["instruction"] for sample in samples] == ["make it red", "turn it red", "None", "make it snowy"]
    assert [sample["row"] for sample in samples] == [0, 0, -1, 1]


def test_reversed_pairs_follow_the_pairs_they_belong_to(tmp_path: Path) -> None:
    """Each row gives the pair, then the edited image as the original with the inverse instruction."""
    flags = many_prompts(tmp_path / "data") | {"reverse_pairs": True}
    (a, b), (c, d), (e, f) = (pair[:2] for pair in PAIRS[:3])
    source = opened(flags)
    found = [source[index] for index in range(len(source))]
    assert found[:2] == [Pair(a, b, "make it red"), Pair(b, a, "make it blue")]
    assert found[2:4] == [Pair(c, d, None), Pair(d, c, None)]
    assert found[4:] == [Pair(e, f, "make it snowy"), Pair(f, e, "make it green")]
    every = opened(flags, prompt_choice="all", max_train_samples=4)
    assert [every[index].instruction for index in range(len(every))] == [
        "make it red",
        "turn it red",
        "make it blue",
        None,
    ]
    assert every.fingerprint() != source.fingerprint()


@every_kind
def test_no_more_samples_are_used_than_asked_for(kind: Kind, tmp_path: Path) -> None:
    """--max_train_samples takes the first ones, and all where there are fewer."""
    flags = kind(tmp_path / "data", PAIRS[:9])
    assert len(opened(flags, max_train_samples=100)) == 9
    source = opened(flags, max_train_samples=4)
    assert [source[index] for index in range(len(source))] == PAIRS[:4]


@pytest.mark.parametrize("kind", [stream, shards], ids=lambda kind: kind.__name__)
def test_more_workers_and_processes_than_shards_lose_and_repeat_nothing(
    kind: Kind, sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes with four workers each encode every pair of two or three shards exactly once."""
    monkeypatch.setattr(cache, "SHARD_ROWS", 8)
    for name, value in {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    flags = kind(tmp_path / "data", PAIRS) | {"pretrained_model_name_or_path": sd, "cache": tmp_path / "cache"}
    arguments = tiny.arguments(flags | {"resolution": 8, "dataloader_num_workers": 4})
    processes = [FORK.Process(target=run_rank, args=(rank, arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = Cache.open(tmp_path / "cache")
    samples = found.samples().to_pylist()
    assert [(s["position"], s["row"], s["status"]) for s in samples] == [(n, n, "ok") for n in range(64)]
    keys = [
        key
        for unit, record in found.commits().items()
        if unit.kind == "images"
        for key in record.keys.to_pylist()
        if key
    ]
    assert Counter(keys) == Counter(sample["pair"] for sample in samples)


FORK = multiprocessing.get_context("fork")  # a new interpreter would import for seconds


def run_rank(rank: int, arguments: list[str]) -> None:
    """What `accelerate launch` starts, without a GPU."""
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")  # more than there are cores
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    main(arguments)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def columns_named(*names: str) -> Callable[[Path], Flags]:
    """A builder of a folder whose columns are called otherwise."""

    def build(folder: Path) -> Flags:
        rows = [dict(zip(names, row.values(), strict=True)) for row in image_files(folder, PAIRS[:2])]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {"train_data_dir": folder}

    return build


def broken(name: str, change: Callable[[Path], object]) -> Callable[[Path], Flags]:
    """A builder of tar files of which one is changed."""

    def build(folder: Path) -> Flags:
        flags = shards(folder, PAIRS[:9])
        change(folder / name)
        return flags

    return build


def two_splits(folder: Path) -> Flags:
    """A dataset that has no split called train."""
    parquet(folder, PAIRS[:4])
    (folder / "train-00000-of-00002.parquet").rename(folder / "test.parquet")
    (folder / "train-00001-of-00002.parquet").rename(folder / "validation.parquet")
    return {"dataset_name": folder}


def urls(folder: Path) -> Flags:
    """Images that are links."""
    folder.mkdir()
    row = dict(zip(NAMES, ("https://example.org/a.jpg", "https://example.org/b.jpg", "make it red"), strict=True))
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    return {"train_data_dir": folder}


def empty(folder: Path) -> Flags:
    """A folder without anything."""
    folder.mkdir()
    return {"train_data_dir": folder}


def one_level_up(folder: Path) -> Flags:
    """A folder that has the list of its pairs one level below."""
    return {"train_data_dir": Path(str(metadata_jsonl(folder / "train", PAIRS[:2])["train_data_dir"])).parent}


def both_lists(folder: Path) -> Flags:
    """A folder with two lists of its pairs."""
    shutil.copy(
        Path(str(metadata_jsonl(folder, PAIRS[:2])["train_data_dir"]), "metadata.jsonl"), folder / "metadata.csv"
    )
    return {"train_data_dir": folder}


def no_seeds(folder: Path) -> Flags:
    """A seeds.json of another form."""
    folder.mkdir()
    (folder / "seeds.json").write_text('{"a": 1}')
    return {"train_data_dir": folder}


def nothing_listed(folder: Path) -> Flags:
    """A list without a line."""
    folder.mkdir()
    (folder / "metadata.jsonl").touch()
    return {"train_data_dir": folder}


def empty_shard(folder: Path) -> Flags:
    """A tar file without a member."""
    folder.mkdir()
    tarfile.open(folder / "pairs.tar", "w").close()
    return {"dataset_name": folder / "pairs.tar"}


def archive(folder: Path) -> Flags:
    """A file that is no dataset."""
    folder.mkdir()
    (folder / "pairs.zip").touch()
    return {"dataset_name": folder / "pairs.zip"}


@pytest.mark.parametrize(
    ("build", "more", "parts"),
    [
        (columns_named("a", "b", "c"), {}, ["original images are in no column", "a, b, c", "--original_image_column"]),
        (columns_named("input", "source", "c"), {}, ["original images may be in input, source", "--original_image"]),
        (columns_named("before", "after", "instruktion"), {"edit_prompt_column": "instruction"}, ["mean instruktion?"]),
        (columns_named("input", "output", "edit"), {"reverse_pairs": True}, ["lead back", "--inverse_prompt_column"]),
        (columns_named("input", "output", "edit"), {"edit_prompt_column": "input"}, ["holds images, expected string"]),
        (two_splits, {}, ["has no split train: choose one of", "test", "validation", "--split"]),
        (urls, {}, ["input_image", "holds urls, expected images"]),
        (empty, {}, ["has no metadata.jsonl, metadata.csv, metadata.parquet or seeds.json", "--dataset_name"]),
        (one_level_up, {}, ["has no metadata.jsonl", "data/train"]),
        (both_lists, {}, ["has metadata.jsonl and metadata.csv: expected one"]),
        (no_seeds, {}, ["seeds.json", "expected [[dir, [seed, ...]], ...]"]),
        (nothing_listed, {}, ["metadata.jsonl is empty"]),
        (empty_shard, {}, ["pairs.tar holds no samples"]),
        (archive, {}, ["pairs.zip is a file of no known kind", ".parquet", ".tar"]),
        (broken("pairs-1.tar", Path.unlink), {}, ["pairs-1.tar is not there", "3 tar files"]),
        (broken("pairs-1.tar", lambda path: os.truncate(path, 9000)), {}, ["pairs-1.tar cannot be read", "tar file"]),
        (broken("pairs-0.tar", lambda path: path.write_bytes(gzip.compress(b"x"))), {}, ["as an uncompressed tar"]),
        (lambda folder: shards(folder, PAIRS[:3]), {"edit_prompt_column": "text"}, ["did you mean txt?", "edited.jpg"]),
        (lambda folder: shards(folder, PAIRS[:3]), {"split": "train"}, ["has no splits: leave out --split"]),
        (lambda folder: shards(folder, PAIRS[:3]), {"streaming": True}, ["leave out --streaming"]),
        (lambda folder: shards(folder, PAIRS[:3]), {"dataset_config_name": "all"}, ["leave out --dataset_config_name"]),
        (lambda folder: {"dataset_name": "gopher://x/a.tar"}, {}, ["gopher://x/a.tar cannot be fetched"]),
    ],
)
def test_wrong_datasets_are_answered_in_a_line(
    build: Callable[[Path], Flags],
    more: Flags,
    parts: list[str],
    sd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each answer names what was found and what mends it."""
    flags = build(tmp_path / "data") | more
    with pytest.raises(SystemExit, match="2"):
        main(tiny.arguments({"pretrained_model_name_or_path": sd, "cache": tmp_path / "cache"} | flags))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "ip2p-encode" in line)
    for part in parts:
        assert part in line
