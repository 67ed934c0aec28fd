"""Caches of instructions alone (`--no_cache_text`): training embeds them, and all else is as with cached text."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import tiny
from ip2p.encode.cache.format import Cache
from ip2p.encode.cache.reader import Reader
from ip2p.encode.cached import Samples
from ip2p.encode.keeper.__main__ import main as keeper
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.models.encoders import TextEncoders
from ip2p.train.__main__ import main
from ip2p.train.data.batches import Batches, null_conditioning
from ip2p.train.data.order import Order, Turns
from ip2p.train.data.text import Texts
from ip2p.train.learning import Objective as Flags
from ip2p.train.need import Model
from ip2p.train.objective import Batch, Objective, noise_scheduler
from test_train import assert_same, flags, states

Encode = Callable[..., None]
CPU = torch.device("cpu")
WATCHED = {"num_validation_samples": 2, "num_validation_images": 1, "validation_steps": 4, "max_train_steps": 4}


@pytest.fixture(scope="module")
def alone(sd: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """The shared cache's pairs, of which the cache keeps no instruction embedded."""
    folder = tmp_path_factory.mktemp("alone") / "sd"
    encode(sd, data, folder, random_flip=True, no_cache_text=True)
    return folder


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def both(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory, encode: Encode
) -> tuple[Checkpoint, Cache, Cache]:
    """A checkpoint, a cache with cached text, and one without."""
    model, folder = request.getfixturevalue(request.param), tmp_path_factory.mktemp("both")
    for name in ("cached", "alone"):
        encode(model, data, folder / name, random_flip=True, no_cache_text=name == "alone")
    return Checkpoint(model), Cache.open(folder / "cached"), Cache.open(folder / "alone")


def batches(cache: Cache, checkpoint: Checkpoint, count: int) -> list[Batch]:
    """The first batches of a run, of four samples each."""
    samples = Samples.of(cache, None)
    order = Order(len(samples.rows), 2, seed=3)
    drawn = Turns([order], [np.arange(order.samples)], [1]).batches([0], 4)
    texts = Texts.of([cache], checkpoint, CPU)
    loader = Batches(Reader(cache), samples, drawn, CPU, batch_size=4, texts=texts)
    found = [copy.deepcopy(next(loader)) for _ in range(count)]
    loader.close()
    return found


def test_batches_and_losses_are_those_of_cached_text(both: tuple[Checkpoint, Cache, Cache]) -> None:
    """Latents and time ids are equal, embeddings to a rounding of float16, losses to 1e-5 with the same draws."""
    checkpoint, cached, alone = both
    unet = tiny.unet(8, sdxl=checkpoint.is_sdxl)
    for first, second in zip(batches(cached, checkpoint, 6), batches(alone, checkpoint, 6), strict=True):
        for name in ("original", "edited", "time_ids"):
            assert_same(getattr(first, name), getattr(second, name))
        assert (first.pooled is None) == (second.pooled is None) == (not checkpoint.is_sdxl)
        for name in ("text", "pooled"):
            if (embedded := getattr(first, name)) is not None:
                torch.testing.assert_close(getattr(second, name), embedded, rtol=2**-10, atol=2**-14)
        losses = []
        for cache, batch in ((cached, first), (alone, second)):
            scheduler, null = noise_scheduler(Flags(), checkpoint), null_conditioning(Reader(cache), CPU)
            objective = Objective(scheduler, null, checkpoint.scaling_factor, Flags((0.2,)))
            draws = objective.draw(batch, 1)._replace(dropout=torch.tensor([0.9, 0.1, 0.3, 0.5]))
            losses.append(objective.loss(unet, batch, draws).item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_each_instruction_of_a_batch_is_embedded_once(both: tuple[Checkpoint, Cache, Cache]) -> None:
    """Samples that share it share the work; whose is whose is kept."""
    checkpoint, _, alone = both
    texts = Texts([alone], checkpoint, CPU)
    *ids, which = texts.tokens([0] * 5, [0, 7, 1, 0, 1])  # of seven instructions, the eighth is the first again
    assert [len(tokens) for tokens in ids] == [2] * len(checkpoint.text_encoders)
    assert which.tolist() == [0, 0, 1, 0, 1]
    first, second = alone.samples()["instruction"].to_pylist()[:2]
    expected, pooled = TextEncoders(checkpoint, CPU, torch.float32).embed(texts.encoders.tokenize([first, second]))
    found = texts.embed([*ids, which])
    assert torch.equal(found["text"], expected[which])
    assert ("pooled" in found) == (pooled is not None)


def test_what_is_kept_is_the_empty_instruction_alone(
    both: tuple[Checkpoint, Cache, Cache], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything else of the cache is as ever, and `ip2p-cache` knows it."""
    _, cached, alone = both
    for name, array in alone.arrays("text").items():
        assert array.shape[0] == 1
        assert np.array_equal(array[0], cached.arrays("text")[name][0])
    for name, array in alone.arrays("images").items():
        assert np.array_equal(array[:], cached.arrays("images")[name][:])
    table = alone.samples()
    assert table.drop_columns(["text_row"]).equals(cached.samples().drop_columns(["text_row"]))
    assert set(table["text_row"].to_pylist()) == {0}
    folder = str(alone.folder)
    keeper(["verify", folder, "--reencode", "3"])
    said = capsys.readouterr().out
    assert f"{folder} is sound" in said
    assert "edited mean: at most" in said
    assert "text: at most" not in said
    keeper(["info", folder])
    assert "text             instructions alone\n" in capsys.readouterr().out
    keeper(["preview", folder, "--output", str(tmp_path / "sheet.png"), "--samples", "2"])
    keeper(["push", folder, str(tmp_path / "copy")])
    keeper(["verify", str(tmp_path / "copy")])


def test_a_cache_stays_as_it_was_made(
    sd: Path, data: Path, alone: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """It grows by what is new; with the other flag it is refused, and so is a run on both kinds at once."""
    folder = Path(shutil.copytree(alone, tmp_path / "cache"))
    grown = tiny.dataset(tmp_path / "grown", tiny.pairs(12))
    encode(sd, grown, folder, random_flip=True, no_cache_text=True)
    assert Cache.open(folder).manifest["counts"] == {"ok": 12}
    assert "encoded 2 samples" in capsys.readouterr().out
    keeper(["verify", str(folder)])
    with pytest.raises(SystemExit):
        encode(sd, grown, folder, random_flip=True)
    said = capsys.readouterr().err
    assert "or encode as it was made (--no_cache_text)\n" in said
    assert "text: instructions alone in the cache, None asked for" in said


def test_caches_of_both_kinds_are_not_mixed(
    sd: Path, cache: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run embeds all instructions, or none."""
    with pytest.raises(SystemExit):
        main(flags(sd, (cache, alone), tmp_path, max_train_steps=1))
    assert "was encoded otherwise than" in (said := capsys.readouterr().err)
    assert "instructions alone" in said


def test_a_run_resumes_bit_for_bit(sd: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With held-out samples, their losses and pictures; what the text encoder takes is said at the start."""
    arguments = flags(sd, alone, tmp_path / "out", checkpointing_steps=2, **WATCHED)
    main(arguments)
    size = sum(weight.nbytes for weight in Checkpoint(sd).network("text_encoder", torch.float32).parameters())
    expected = f"instructions are embedded batch by batch: their encoder takes {size / 2**20:,.1f} MiB of the cpu"
    assert expected in capsys.readouterr().out
    whole = states(tmp_path / "out" / "checkpoint-4")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in map(json.loads, lines) if "validation_loss" in line]) == 1
    assert (tmp_path / "out" / "validation" / "step-000004.png").is_file()
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--resume_from_checkpoint", "checkpoint-2"])
    assert_same(states(tmp_path / "out" / "checkpoint-4"), whole)


def test_a_run_is_that_of_cached_text(sd: Path, cache: Path, alone: Path, tmp_path: Path) -> None:
    """The same samples in the same order and the same weights, but for roundings; so a run may change over."""
    changed, weights = {"sample_by": "prompt", "max_train_samples": 9}, []
    for number, folder in enumerate((cache, alone)):
        AcceleratorState._reset_state(reset_partial_state=True)
        main(flags(sd, folder, tmp_path / str(number), max_train_steps=4, checkpointing_steps=2, **changed))
        weights.append(states(tmp_path / str(number) / "checkpoint-4")["unet"])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = flags(sd, alone, tmp_path / "0", max_train_steps=4, **changed)
    main([*arguments, "--resume_from_checkpoint", "checkpoint-2"])
    torch.testing.assert_close(states(tmp_path / "0" / "checkpoint-4")["unet"], weights[0], rtol=1e-4, atol=1e-5)


def test_another_text_encoder_is_refused(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hash is checked, though no number of it but the empty instruction's is in the cache."""
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit):
        main(flags(other, alone, tmp_path / "out", max_train_steps=1))
    assert "text_encoder: " in capsys.readouterr().err


def test_the_memory_of_the_text_encoders_is_foreseen(both: tuple[Checkpoint, Cache, Cache]) -> None:
    """To the byte, from their configuration alone; where text is cached they take none."""
    checkpoint, cached, alone = both
    encoders = TextEncoders(checkpoint, CPU, torch.float32).encoders
    assert Model.of(checkpoint, Reader(alone)).text == sum(
        p.nbytes for encoder in encoders for p in encoder.parameters()
    )
    assert Model.of(checkpoint, Reader(cached)).text == 0
