"""Tests of training straight from an object store: the same batches, from what a window of the cache holds."""

import contextlib
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import shelf
import tiny
from configs import train_config
from drawn import SEED, contents, draw, one_rank, one_run
from ip2p.encode.base.errors import CacheError, SettingsError
from ip2p.encode.base.files import read_record, write_record
from ip2p.encode.base.store import Place
from ip2p.encode.cache import format as cache_module
from ip2p.encode.cache import remote
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.remote import RemoteCache, open_caches
from ip2p.encode.cache.tables import SHARDS_FILE
from ip2p.encode.cache.window import GIB, at_least
from ip2p.encode.cache.writer import write_state
from ip2p.encode.cached import Samples
from ip2p.encode.keeper.transfer import copy
from ip2p.train.__main__ import main
from ip2p.train.data.batches import gather
from ip2p.train.data.order import make_order
from ip2p.train.data.sweep import sweep_over
from ranks import FORKS
from test_train import assert_same, flags, states

CPU, URL = torch.device("cpu"), "s3://shelf/caches/one"
Drawn = list[tuple[tuple[bytes, ...], list[int]]]


@pytest.fixture(scope="module")
def shaped(sd: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., None]) -> Path:
    """A cache of sixty pairs in five shapes and two views, in fifteen shards each."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD_ROWS", 4)
        data = tiny.dataset(folder / "data", tiny.pairs(60, sizes=tiny.SIDES))
        encode(sd, data, folder / "cache", resolution=32, bucket_step=4, random_flip=True)
    return folder / "cache"


@pytest.fixture(scope="module")
def served(shaped: Path) -> Iterator[shelf.Shelf]:
    """A store that holds the cache."""
    with shelf.serving() as store:
        copy(Place(str(shaped)), Place(URL))
        yield store


@pytest.fixture
def store(served: shelf.Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[shelf.Shelf]:
    """The store, sound and with nothing asked for; whoever fetches from it is impatient."""
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02))
    served.asked.clear()
    yield served
    served.spoil = lambda key, number: ""


def room(cache: Path, share: float) -> float:
    """A window in GiB that holds this share of a cache."""
    return share * sum(file["bytes"] for file in Cache.open(cache).shards().values()) / GIB


def held(folder: Path) -> int:
    """Bytes of the shards that lie below a folder: looked at twice, as files come and go meanwhile."""
    totals = []
    for _ in range(2):
        sizes = []
        for path in folder.glob("*/data.zarr/*/c/**/*"):
            with contextlib.suppress(FileNotFoundError):
                sizes += [path.stat().st_size] if path.is_file() else []
        totals.append(sum(sizes))
    return min(totals)


EPOCHS = 2 * 60 // 5  # in batches of 5


def test_two_epochs_are_those_of_the_local_cache_and_a_run_goes_on_in_their_middle(
    store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """Batches equal bit for bit with the same window, which no moment exceeds; so they do from any position on.

    Each shard comes about once an epoch, but those over which an epoch ends.
    """
    window = room(shaped, 0.4)
    expected = list(draw(Cache.open(shaped), window, EPOCHS))
    found, largest = [], 0
    for one in draw(RemoteCache(URL, tmp_path / "a"), window, EPOCHS):
        found.append(one)
        largest = max(largest, held(tmp_path / "a"))
    assert found == expected
    assert 0.2 * window * GIB < largest <= window * GIB
    fetched = Counter({key: count for key, count in store.asked.items() if "/c/" in key})
    assert len(fetched) == len(Cache.open(shaped).shards())
    assert 1 < fetched.total() / len(fetched) / 2 < 1.6
    middle = EPOCHS // 2 + 3
    again = draw(RemoteCache(URL, tmp_path / "b"), window, EPOCHS - middle, expected[middle - 1][1])
    assert list(again) == expected[middle:]


def test_a_window_that_holds_all_changes_no_order_and_fetches_once(
    store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """The batches are those of a folder without a window, and what is there serves the next run."""
    expected = list(draw(Cache.open(shaped), 0, EPOCHS))
    assert list(draw(RemoteCache(URL, tmp_path), 1, EPOCHS)) == expected
    assert {count for key, count in store.asked.items() if "/c/" in key} == {1}
    store.asked.clear()
    assert list(draw(RemoteCache(URL, tmp_path), 1, EPOCHS)) == expected
    assert set(store.asked) == {"caches/one/manifest.json"}


def test_a_smaller_window_deletes_what_an_earlier_run_has_left(
    store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """At its start, so that the room is kept from then on; and shards that the cache does not have any more."""
    list(draw(RemoteCache(URL, tmp_path), 1, EPOCHS))
    cache, window = RemoteCache(URL, tmp_path), room(shaped, 0.4)
    (cache.folder / "data.zarr/text/c/99").mkdir()
    (cache.folder / "data.zarr/text/c/99/0").write_bytes(b"old")
    Reader(cache, window=window)
    assert 0 < held(tmp_path) <= window * GIB
    assert not (cache.folder / "data.zarr/text/c/99/0").exists()


@pytest.mark.parametrize("fault", ["error", "cut", "wrong"])
def test_faults_of_the_store_that_pass_are_not_seen(
    fault: str, store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """An error, an answer cut short, one with other bytes: the file is asked for again, be it the manifest."""
    window = room(shaped, 0.4)
    expected = list(draw(Cache.open(shaped), window, 20))
    store.spoil = lambda key, number: fault if number == 1 else ""
    assert list(draw(RemoteCache(URL, tmp_path), window, 20)) == expected


@pytest.mark.parametrize("fault", ["error", "cut", "wrong"])
def test_faults_that_stay_are_named_and_never_trained_on(
    fault: str, store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """What comes before them is right, and then a sentence names the file; it does not stay."""
    window, path = room(shaped, 0.4), "data.zarr/edited/c/7/1/0/0"
    expected = list(draw(Cache.open(shaped), window, EPOCHS))
    store.spoil = lambda key, number: fault if key.endswith(path) else ""
    found: Drawn = []
    with pytest.raises(CacheError, match=rf"{URL}.*{path}.*tried 3 times"):
        found.extend(draw(RemoteCache(URL, tmp_path), window, EPOCHS))
    assert found == expected[: len(found)]
    assert not list(tmp_path.glob(f"*/{path}"))


def test_damage_on_this_disk_is_fetched_anew(store: shelf.Shelf, shaped: Path, tmp_path: Path) -> None:
    """Files of an earlier run are checked before they are used."""
    expected = list(draw(Cache.open(shaped), 0, EPOCHS))
    assert list(draw(RemoteCache(URL, tmp_path), 1, EPOCHS)) == expected
    store.asked.clear()
    for path in ("samples.parquet", "data.zarr/text/c/0/0/0"):
        (file,) = tmp_path.glob(f"*/{path}")
        file.write_bytes(b"?" + file.read_bytes()[1:])
    assert list(draw(RemoteCache(URL, tmp_path), 1, EPOCHS)) == expected
    fetched = {key.removeprefix("caches/one/") for key in store.asked}
    assert fetched == {"manifest.json", "samples.parquet", "data.zarr/text/c/0/0/0"}


def test_looking_at_samples_from_all_over_leaves_the_window_as_large(
    store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """Held-out samples are fetched one by one, while the batches go on as if nobody looked."""
    window, cache = room(shaped, 0.4), RemoteCache(URL, tmp_path)
    local, far = Reader(Cache.open(shaped)), Reader(cache, window=window)
    samples = Samples.of_all(local, None)
    for members in samples.by_shape().values():
        assert contents(gather(far, samples, members, CPU)) == contents(gather(local, samples, members, CPU))
        assert held(tmp_path) <= window * GIB


@pytest.mark.slow
def test_processes_of_a_machine_share_the_window(store: shelf.Shelf, shaped: Path, tmp_path: Path) -> None:
    """Two of them get the halves of each batch from one folder of a window's size, and fetch hardly more than one."""
    window, epochs = room(shaped, 0.5), 2 * 60 // 2  # in batches of one sample on each of two
    expected = [list(draw(Cache.open(shaped), window, epochs, None, rank, 2, 1)) for rank in range(2)]
    list(draw(RemoteCache(URL, tmp_path / "alone"), window, epochs, size=2))
    alone = sum(count for key, count in store.asked.items() if "/c/" in key)
    store.asked.clear()
    pairs, step = [FORKS.Pipe() for _ in range(2)], FORKS.Barrier(2)
    more, there = (window, epochs, step), dict(os.environ)  # which the server of forks may be older than
    processes = [
        FORKS.Process(target=one_rank, args=(there, URL, rank, tmp_path / "shared", *more, answer))
        for rank, (_, answer) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    largest = 0
    while not all(answer.poll(0.02) for answer, _ in pairs) and any(process.is_alive() for process in processes):
        largest = max(largest, held(tmp_path / "shared"))
    found = [answer.recv() for answer, _ in pairs]
    for process in processes:
        process.join()
    assert found == [[batch for batch, _ in batches] for batches in expected]
    assert largest <= window * GIB
    assert sum(count for key, count in store.asked.items() if "/c/" in key) <= 1.2 * alone


def test_runs_that_share_a_folder_do_not_disturb_each_other(shaped: Path, tmp_path: Path) -> None:
    """Each deletes what its window has no room for, and fetches what another has deleted, or left half when killed."""
    shares, count = (0.3, 0.5, 0.5), 2 * EPOCHS
    windows = [room(shaped, share) for share in shares]
    expected = [[batch for batch, _ in draw(Cache.open(shaped), window, count)] for window in windows[:2]]
    pairs = [FORKS.Pipe() for _ in shares]
    given = zip(windows, pairs, strict=True)
    runs = [
        FORKS.Process(target=one_run, args=(f"file://{shaped}", tmp_path, window, count, answer))
        for window, (_, answer) in given
    ]
    for run in runs:
        run.start()
    while not held(tmp_path):
        time.sleep(0.01)
    runs[2].kill()
    assert [answer.recv() for answer, _ in pairs[:2]] == expected
    for run in runs:
        run.join()


def test_training_from_a_store_ends_with_the_same_weights_and_goes_on(
    store: shelf.Shelf, sd: Path, shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ip2p-train --cache s3://…`; stopped and gone on with elsewhere, bit for bit."""
    how: dict[str, Any] = {"window": room(shaped, 0.5), "checkpointing_steps": 4, "max_train_steps": 7}
    main(flags(sd, shaped, tmp_path / "local", **how))
    far: Any = URL
    main(flags(sd, far, tmp_path / "far", **how, window_dir=tmp_path / "a"))
    assert_same(states(tmp_path / "local/checkpoint-7"), states(tmp_path / "far/checkpoint-7"))
    assert f"{URL} is gone through with 3 of 15 shards at a time" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "far/checkpoint-7")
    main(flags(sd, far, tmp_path / "far", **how, window_dir=tmp_path / "b", resume_from_checkpoint="latest"))
    assert_same(states(tmp_path / "local/checkpoint-7"), states(tmp_path / "far/checkpoint-7"))


def test_a_window_that_is_too_small_is_told_what_is_enough(
    store: shelf.Shelf, sd: Path, shaped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded: two shards with their texts, of which half is for the next epoch. That does train."""
    far: Any = URL
    how: dict[str, Any] = {"max_train_steps": 4, "window_dir": tmp_path / "windows"}
    with pytest.raises(SystemExit):
        main(flags(sd, far, tmp_path / "out", window=1e-6, **how))
    told = r"--window 1e-06: two shards of s3://shelf/caches/one must fit in, with their texts: give at least --window "
    (least,) = re.findall(rf"{told}(\S+)$", capsys.readouterr().err, re.MULTILINE)
    reader = Reader(Cache.open(shaped), window=0.99 * float(least))
    with pytest.raises(SettingsError, match=f"at least --window {least}$"):
        sweep_over(reader, Samples.of_all(reader, None))
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, far, tmp_path / "out", window=least, **how))
    assert "is gone through with 1 of 15 shards at a time" in capsys.readouterr().out
    assert [at_least(GIB * size) for size in (1.001, 12.34, 0.010411, 999.5)] == ["1.01", "12.4", "0.0105", "1000"]


@pytest.mark.parametrize("fault", ["error", "cut", "wrong"])
def test_a_manifest_that_never_arrives_is_named(fault: str, store: shelf.Shelf, tmp_path: Path) -> None:
    """With what to do about it where the cache lies; no verb of this machine mends it."""
    store.spoil = lambda key, number: fault if "manifest" in key else ""
    with pytest.raises(CacheError, match=r"caches/one/manifest\.json.*; tried 3 times") as told:
        RemoteCache(URL, tmp_path)
    assert ("damaged (wrong checksum): push it again from a whole copy;" in str(told.value)) == (fault == "wrong")


def test_what_a_store_lacks_is_named_at_once(store: shelf.Shelf, shaped: Path, tmp_path: Path) -> None:
    """A shard that is gone, and units that the list leaves out: both are mended there, and by a push from here."""
    lacking = Path(shutil.copytree(shaped, tmp_path / "lacking"))
    path = "data.zarr/edited/c/7/1/0/0"
    (lacking / path).unlink()
    url = f"file://{lacking}"
    said = f"{url}/{path} is missing: push it again from a whole copy$"
    with pytest.raises(CacheError, match=said):
        list(draw(RemoteCache(url, tmp_path / "a"), 1, EPOCHS))
    cache = Cache.open(lacking)
    commits = {unit: commit for unit, commit in cache.commits().items() if unit.name != "images-v1-000007"}
    write_state(lacking, cache.manifest, cache.samples(), commits)
    reader = Reader(RemoteCache(url, tmp_path / "b"))
    samples = Samples.of_all(reader, None)
    with pytest.raises(CacheError, match=r"units\.parquet does not list images-v1-000007: run .* and push it again$"):
        reader.require(samples.rows, samples.text_rows)
    table = cache.samples()
    pending = table.set_column(table.column_names.index("status"), "status", [["pending"] * len(table)])
    write_state(lacking, cache.manifest, pending, cache.commits())
    with pytest.raises(CacheError, match=r"is not finished, 60 of 60 samples are missing: run .* and push it again$"):
        Samples.of(RemoteCache(url, tmp_path / "c"), None)


def test_a_file_that_should_be_enormous_ends_where_it_ends(
    store: shelf.Shelf, shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever size a manifest claims, as much is asked for as there is."""
    record = read_record(shaped / "manifest.json")
    record["files"]["samples.parquet"]["bytes"] = 10**15
    write_record(tmp_path / "manifest.json", record)
    store.put("enormous/manifest.json", (tmp_path / "manifest.json").read_bytes())
    store.put("enormous/samples.parquet", (shaped / "samples.parquet").read_bytes())
    asked: list[int] = []

    def read(self: Place, path: str, *where: int, original: Callable[..., bytes] = Place.read) -> bytes:
        asked.append(len(asked))
        assert len(asked) < 20, "reads on behind the end"
        return original(self, path, *where)

    monkeypatch.setattr(Place, "read", read)
    with pytest.raises(CacheError, match=r"samples\.parquet arrives damaged: push it again from a whole copy; tried 3"):
        RemoteCache("s3://shelf/enormous", tmp_path / "windows")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/x", "/dev/full/x", "s3://shelf/windows"])
def test_a_window_dir_that_cannot_be_used_is_told_by_its_flag(place: str, shaped: Path, tmp_path: Path) -> None:
    """Before anything is fetched."""
    (tmp_path / "file").touch()
    folder = Path(place) if "://" in place else tmp_path / place
    with pytest.raises(SettingsError, match=r"^--window_dir .*(cannot be written|is a url)"):
        open_caches([f"file://{shaped}"], folder)


@pytest.mark.parametrize("name", [".lock", "samples.parquet", "data.zarr/edited/c/7/1/0/0"])
def test_what_others_have_put_into_a_window_is_told_by_its_flag(name: str, shaped: Path, tmp_path: Path) -> None:
    """A folder where a file goes, by its name; it is theirs to delete."""
    url = f"file://{shaped}"
    cache = RemoteCache(url, tmp_path)
    (cache.folder / name).unlink(missing_ok=True)
    (cache.folder / name).mkdir(parents=True)
    found = re.escape(f"Is a directory: '{cache.folder / name}': mend that, or name another folder")
    with pytest.raises(CacheError, match=rf"^--window_dir {tmp_path}: .*{found}"):
        list(draw(RemoteCache(url, tmp_path), 1, EPOCHS))


def test_a_slash_at_the_end_of_a_url_is_none(store: shelf.Shelf, tmp_path: Path) -> None:
    """The same cache has the same window, and is fetched once."""
    assert RemoteCache(f"{URL}/", tmp_path).folder == RemoteCache(URL, tmp_path).folder
    assert max(count for key, count in store.asked.items() if "manifest" not in key) == 1


OUTSIDE = ["../secret", "data.zarr/edited/c/../../../../secret", "/etc/passwd"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("where", ["manifest.json", SHARDS_FILE])
def test_no_path_of_a_store_leads_out_of_the_folder(
    where: str, path: str, store: shelf.Shelf, shaped: Path, tmp_path: Path
) -> None:
    """Whoever wrote the manifest or the list of shards, nothing is fetched to, or read from, elsewhere."""
    hostile = Path(shutil.copytree(shaped, tmp_path / "hostile"))
    file = {"bytes": 4, "crc32c": "01234567"}
    if where == SHARDS_FILE:
        cache = Cache.open(hostile)
        commit = next(iter(cache.commits().values()))
        write_state(hostile, cache.manifest, cache.samples(), {0: commit._replace(files={path: file})})  # type: ignore[dict-item]
    else:
        record = read_record(hostile / where)
        write_record(hostile / where, record | {"files": record["files"] | {path: file}})
    for name in (where, "manifest.json", "samples.parquet"):
        store.put(f"hostile/{name}", (hostile / name).read_bytes())
    for name in shaped.glob("data.zarr/**/zarr.json"):
        store.put(f"hostile/{name.relative_to(shaped).as_posix()}", name.read_bytes())
    with pytest.raises(CacheError, match="which is no file of a cache"):
        RemoteCache("s3://shelf/hostile", tmp_path / "windows")
    assert not [key for key in store.asked if "secret" in key or "passwd" in key]
    assert not (tmp_path / "secret").exists()
    assert not (tmp_path / "windows" / "secret").exists()


def test_caches_that_cannot_be_read_from_a_store_are_told_in_a_sentence(
    store: shelf.Shelf, shaped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None there; no list of shards; no room on the disk."""
    with pytest.raises(CacheError, match="s3://shelf/nowhere is not a cache"):
        RemoteCache("s3://shelf/nowhere", tmp_path)
    with pytest.raises(CacheError, match="s4://x: Protocol not known"):
        RemoteCache("s4://x", tmp_path)
    record = read_record(shaped / "manifest.json")
    write_record(tmp_path / "first.json", record | {"format": 1, "files": {}})
    store.put("first/manifest.json", (tmp_path / "first.json").read_bytes())
    with pytest.raises(CacheError, match=r"first has no units\.parquet, which caches of format 1 lack: pull it"):
        RemoteCache("s3://shelf/first", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(
        SettingsError, match=r"takes 0\.0\d+ GiB more in .*, where 9\.31e-08 are free: give a smaller --window"
    ):
        Reader(RemoteCache(URL, tmp_path), window=1)


def test_an_order_with_a_window_is_a_permutation_that_opens_few_shards_at_a_time(shaped: Path) -> None:
    """Of the samples of each epoch; a batch is of the shards at hand alone, and another epoch goes another way."""
    reader = Reader(Cache.open(shaped), window=room(shaped, 0.5))
    samples = Samples.of_all(reader, None)
    sweep = sweep_over(reader, samples)
    assert sweep is not None
    (width,) = sweep.width.tolist()
    assert 2 < width < 10
    order = make_order(train_config("model", "c"), samples, SEED, 0, sweep)
    epochs = []
    for epoch in (0, 1):
        shards = Counter[int]()
        for one, members in zip(order.orders, order.members, strict=True):
            numbers, _ = one(epoch * one.samples, one.samples)
            assert sorted(numbers.tolist()) == list(range(one.samples))
            epochs.append(numbers.tolist())
            rows = samples.rows[members[numbers]] // 4
            places = np.arange(len(rows)) / len(rows)
            for shard in np.unique(rows).tolist():
                shards[shard] += 1
                at = np.sort(places[rows == shard])
                gaps = np.append(np.diff(at), 1 - at[-1] + at[0])  # on the circle; all but the longest it is at hand
                assert 1 - gaps.max() <= width / 15 + 0.4  # as a shape has about twelve samples
        assert len(shards) == 15
    assert epochs[:5] != epochs[5:]
