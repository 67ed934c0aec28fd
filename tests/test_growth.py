"""Tests of a cache over its life: its dataset grows and changes, encodes are killed, and it holds what it must."""

import functools
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import zarr
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import fakes
from ip2p.encode.base.errors import CacheError
from ip2p.encode.base.files import content_key
from ip2p.encode.cache.format import Cache, Unit
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cache.samples import text_key
from ip2p.encode.data.pairs import Pair
from ip2p.encode.keeper.verify import Finding, repair

ROWS = 4  # of a shard
Texts = st.sampled_from(["make it red", "make it blue", "add a hat", "turn it into a dog", "snow", "night", "day"])
Files = st.integers(0, 5).map(fakes.png)
Pairs = st.builds(Pair, Files, Files, Texts, st.none())


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing is written after it."""


class Life(RuleBasedStateMachine):
    """A dataset that changes, its cache, and what the cache must hold."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.source = fakes.Pairs()
        self.flip = False
        self.pairs: dict[str, Pair] = {}  # every pair that was ever there, by its key
        self.texts = {text_key(""): ""}  # and every instruction
        self.rows: dict[str, int] = {}  # of the pairs that have been in the dataset since they were encoded
        self.left: int | None = None  # moments until the process is killed
        self.survived = True
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name, "cache")
        fakes.install(patch, self.source, ROWS)
        patch.setattr(os, "fsync", lambda _: self.moment())  # the moments before and after each renaming
        patch.setattr(fakes.Encoders, "before", lambda _: self.moment())

    def teardown(self) -> None:
        """Remove the cache."""
        self.temporary.cleanup()

    def moment(self) -> None:
        """A moment at which the process may be killed; from then on it does nothing any more."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    @initialize(new=st.lists(Pairs, min_size=1, max_size=10))
    def begin(self, new: list[Pair]) -> None:
        """A dataset is never empty."""
        self.source += new

    @rule(new=st.lists(Pairs, min_size=1, max_size=6), at_end=st.booleans())
    def grow(self, new: list[Pair], at_end: bool) -> None:
        """Samples are added, some of them equal to others."""
        at = len(self.source) if at_end else 0
        self.source[at:at] = new

    @rule(number=st.integers(0), change=st.fixed_dictionaries({}, optional={"original": Files, "edited": Files}))
    def edit_images(self, number: int, change: dict[str, bytes]) -> None:
        """One or both images of a sample are replaced."""
        at = number % len(self.source)
        self.source[at] = self.source[at]._replace(**change)

    @rule(number=st.integers(0), instruction=Texts)
    def edit_instruction(self, number: int, instruction: str) -> None:
        """The instruction of a sample is replaced."""
        at = number % len(self.source)
        self.source[at] = self.source[at]._replace(instruction=instruction)

    @precondition(lambda self: len(self.source) > 1)
    @rule(number=st.integers(0))
    def remove(self, number: int) -> None:
        """A sample goes away."""
        del self.source[number % len(self.source)]

    @rule()
    def add_flip(self) -> None:
        """From now on --random_flip is given."""
        self.flip = True

    @rule(number=st.integers(0))
    def lose(self, number: int) -> None:
        """A unit is damaged, and `ip2p-cache verify --repair` drops it."""
        if not (units := sorted(self.commits())):
            return  # no precondition: how far a killed encode came depends on its threads, which rules apply must not
        unit = units[number % len(units)]
        repair(self.folder, [Finding(f"commits/{unit.name}.json", "is damaged", unit)])
        assert unit not in self.commits()
        if unit.kind == "images":
            self.rows = {pair: row for pair, row in self.rows.items() if row // ROWS != unit.shard}

    @rule(batch_size=st.integers(1, 5))
    def encode(self, batch_size: int) -> None:
        """An encode that runs to its end writes exactly what is missing, each once, and changes no finished file."""
        wanted, files = self.wanted() - self.held(), self.finished_files()
        fakes.Encoders.log.clear()
        fakes.encode(self.folder, encode_batch_size=batch_size, random_flip=self.flip)
        assert Counter(fakes.Encoders.log) == Counter(dict.fromkeys(wanted, 1))
        assert files.items() <= self.finished_files().items()
        self.check_samples(whole=True)
        found = {sample["pair"]: sample["row"] for sample in Cache.open(self.folder).samples().to_pylist()}
        assert all(found[key] == self.rows[key] for key in found.keys() & self.rows.keys())
        self.rows = found

    @rule(left=st.integers(0, 8) | st.integers(0, 60), batch_size=st.integers(1, 5))
    def encode_killed(self, left: int, batch_size: int) -> None:
        """An encode that is killed repeats nothing that was finished, and leaves nothing that only looks whole."""
        wanted, files, self.left = self.wanted() - self.held(), self.finished_files(), left
        fakes.Encoders.log.clear()
        try:
            fakes.encode(self.folder, encode_batch_size=batch_size, random_flip=self.flip)
            self.survived = True
        except Killed:
            self.survived = False
            self.lose_unrecorded()
        finally:
            self.left = None
        assert Counter(fakes.Encoders.log) <= Counter(dict.fromkeys(wanted, 1))
        assert files.items() <= self.finished_files().items()
        self.check_samples()
        self.rows = {key: row for key, row in self.rows.items() if key in map(key_of, self.source)}

    def wanted(self) -> set[object]:
        """All that the encoders must have seen."""
        self.pairs |= {key_of(pair): pair for pair in self.source}
        self.texts |= {text_key(pair.instruction): pair.instruction for pair in self.source}
        seen = {fakes.seen(pair, flip) for pair in self.source for flip in {False, self.flip or self.has_flip()}}
        return seen | {pair.instruction for pair in self.source} | {""}

    def has_flip(self) -> bool:
        """Whether the cache was made with --random_flip: then what is new gets both views, asked for or not."""
        return (self.folder / "manifest.json").is_file() and len(Cache.open(self.folder).views) == 2

    def held(self) -> set[object]:
        """What the commit records say is there, of whole pairs: in a shard with two views both have the pair."""
        shards: dict[int, dict[int, list[str | None]]] = {}
        held: set[object] = set()
        for unit, record in self.commits().items():
            if unit.kind == "text":
                held |= {self.texts[key] for key in record.keys.to_pylist() if key}
            else:
                shards.setdefault(unit.shard, {})[unit.view] = record.keys.to_pylist()
        for views in shards.values():
            for keys in zip(*views.values(), strict=True):
                if keys[0] and len({*keys}) == 1:
                    held |= {fakes.seen(self.pairs[keys[0]], view == 1) for view in views}
        return held

    def commits(self) -> dict:
        """The records, also of a cache that has no manifest yet."""
        return Cache(self.folder, {}).commits()

    def finished_files(self) -> dict[Path, int]:
        """When each finished shard and its record was written."""
        shards = [path for record in self.commits().values() for path in record.files]
        records = (self.folder / "commits").glob("*.json")
        return {path: path.stat().st_mtime_ns for path in (*records, *(self.folder / shard for shard in shards))}

    def lose_unrecorded(self) -> None:
        """A power failure: of shards without a record only the first bytes have reached the disk."""
        for path in self.folder.glob("data.zarr/*/c/**/*"):
            if path.is_file() and path not in self.finished_files():
                os.truncate(path, path.stat().st_size // 3)

    def check_samples(self, whole: bool = False) -> None:
        """Whatever the cache calls ok is right; a `whole` one describes the present dataset, where all is ok."""
        try:
            cache = Cache.open(self.folder)
            cache.check_files()
        except CacheError:
            assert not whole
            return
        samples = cache.samples().to_pylist()
        group: Any = zarr.open_group(self.folder / "data.zarr", mode="r")
        if whole:
            assert Counter(sample["status"] for sample in samples) == Counter(ok=len(self.source))
            expected = [(n, key_of(pair), pair.instruction) for n, pair in enumerate(self.source)]
            assert [(s["position"], s["pair"], s["instruction"]) for s in samples] == expected
            assert cache.views == ["plain", "flip"][: 1 + (self.flip or len(cache.views) > 1)]
        for columns in ("pair", "row"), ("instruction", "text_row"):
            couples = {tuple(sample[column] for column in columns) for sample in samples}
            assert len(couples) == len({first for first, _ in couples}) == len({second for _, second in couples})
        ok = [sample for sample in samples if sample["status"] == "ok"]
        for sample in ok:
            pair, row = self.pairs[sample["pair"]], sample["row"]
            for view in range(len(cache.views)):
                original, edited = (fakes.moments(fakes.view(file, view == 1)[None])[0] for file in pair[:2])
                assert np.array_equal(group["original"][row, view], original[:4])
                assert np.array_equal(group["edited"][row, view], edited)
            assert np.array_equal(group["text"][sample["text_row"]], fakes.text(sample["instruction"]))
        if whole:
            assert np.array_equal(group["text"][0], fakes.text(""))


def key_of(pair: Pair) -> str:
    """Identity of the images of a pair."""
    return content_key(pair.original or b"", pair.edited or b"")


def live(patch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Run many lives."""
    common: dict[str, Any] = {
        "deadline": None,
        "stateful_step_count": 12,
        "suppress_health_check": list(hypothesis.HealthCheck),
    }
    factory: Any = functools.partial(Life, patch)
    run_state_machine_as_test(factory, settings=hypothesis.settings(**common | settings))


@pytest.mark.slow  # many lives of a cache
def test_a_cache_holds_what_its_dataset_says_whatever_happened_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any growth, edits, removals, kills and a flip added, the right numbers stand in the right rows."""
    live(monkeypatch, max_examples=40, derandomize=True, phases=[hypothesis.Phase.generate])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cache_holds_what_its_dataset_says_in_many_more_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with ten times as many lives; the same ones each time, so that a failure can be repeated."""
    live(monkeypatch, max_examples=400, derandomize=True, database=None, phases=[hypothesis.Phase.generate])


def test_a_first_encode_can_be_killed_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the manifest, before and after each renaming, before each batch: the same command goes on."""

    def dies_at(moment: int) -> bool:
        life = Life(monkeypatch)
        life.begin([Pair(fakes.png(n), fakes.png(n + 1), f"{n}") for n in range(ROWS + 1)])
        life.encode_killed(left=moment, batch_size=3)
        killed = not life.survived
        life.encode(batch_size=3)
        life.teardown()
        return killed

    assert len(list(itertools.takewhile(dies_at, itertools.count()))) > 20


def test_the_empty_instruction_is_restored_though_no_sample_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training needs text row 0 even where the shard around it holds nothing else that is used."""
    source = fakes.Pairs(Pair(fakes.png(n), fakes.png(n), f"old {n}") for n in range(ROWS - 1))
    fakes.install(monkeypatch, source, ROWS)
    fakes.encode(tmp_path)
    source[:] = [pair._replace(instruction="new") for pair in source]
    fakes.encode(tmp_path)
    repair(tmp_path, [Finding("commits/text-000000.json", "is damaged", Unit("text", 0))])
    fakes.Encoders.log.clear()
    fakes.encode(tmp_path)
    assert fakes.Encoders.log == [""]
    Reader(Cache.open(tmp_path))


def test_damaged_small_files_are_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A flipped bit in metadata or samples is mended by the next encode, not believed, and the numbers stay."""
    fakes.install(monkeypatch, fakes.Pairs([Pair(fakes.png(0), fakes.png(1), "x")]), ROWS)
    fakes.encode(tmp_path)
    fakes.Encoders.log.clear()
    for file in (tmp_path / "samples.parquet", *sorted(tmp_path.glob("data.zarr/**/zarr.json"))):
        whole = file.read_bytes()
        for damaged in (whole.replace(b"1", b"3"), whole[:-9], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            fakes.encode(tmp_path)
            assert file.read_bytes() == whole
            Cache.open(tmp_path).check_files()
    assert fakes.Encoders.log == []


@pytest.mark.parametrize("flip", [False, True])
def test_latents_do_not_depend_on_the_batch_size(
    flip: bool, sd: Path, data: Path, tmp_path: Path, encode: Callable[..., None]
) -> None:
    """Up to float tolerance; real encoders take another path through the processor for another batch."""
    for size in (1, 4, 16):
        encode(sd, data, tmp_path / str(size), encode_batch_size=size, random_flip=flip)
    groups: list[Any] = [zarr.open_group(tmp_path / str(size) / "data.zarr", mode="r") for size in (1, 4, 16)]
    for other, name in itertools.product(groups[1:], ("original", "edited", "text")):
        np.testing.assert_allclose(other[name][:], groups[0][name][:], rtol=2**-9, atol=2**-12)
