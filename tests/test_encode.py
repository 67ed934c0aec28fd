"""Tests of the whole encode: cached numbers are those of diffusers and transformers, computed on the fly."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from diffusers import AutoencoderKL, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import fakes
import tiny
from configs import encode_config
from ip2p.encode.data.pairs import Pair
from ip2p.encode.planning import plan

HALF: dict[str, Any] = {"rtol": 2**-10, "atol": 1e-6}  # rounding to float16
Encode = Callable[..., None]


def pixels(image: Image.Image, side: int = 16) -> torch.Tensor:
    """diffusers' transform: squash to a square, to [-1, 1]."""
    values = np.array(image.convert("RGB").resize((side, side))).transpose(2, 0, 1)
    return 2 * (torch.tensor(values).float() / 255) - 1


def numbers(array: object) -> np.ndarray:
    """All of a Zarr array, read by zarr-python."""
    assert isinstance(array, zarr.Array)
    return np.asarray(array[:])


@pytest.mark.parametrize("view", [0, 1])
def test_cached_latents_equal_encoding_on_the_fly(sd: Path, cache: Path, view: int) -> None:
    """Both views hold, up to float16 rounding, what the float32 VAE gives for the plain or the flipped pictures."""
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    group, samples, columns = zarr.open_group(cache / "data.zarr", mode="r"), read(cache), tiny.pairs(10)
    for sample in samples:
        for array, column in (("original", "input_image"), ("edited", "edited_image")):
            image = pixels(columns[column][sample["position"]])
            seen = image.flip(-1) if view else image
            with torch.no_grad():
                posterior = vae.encode(seen[None]).latent_dist  # type: ignore[union-attr]
            expected = [posterior.mode()] if array == "original" else [posterior.mean, posterior.logvar]
            found = torch.from_numpy(numbers(group[array])[sample["row"], view]).float()
            torch.testing.assert_close(found, torch.cat(expected, 1)[0], **HALF)


def test_cached_text_equals_the_text_encoder_padding_included(sd: Path, cache: Path) -> None:
    """Text rows hold all 77 positions of the last hidden state; row 0 is the empty instruction."""
    tokenizer = CLIPTokenizer.from_pretrained(sd / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder")
    text = numbers(zarr.open_group(cache / "data.zarr", mode="r")["text"])
    rows = {0: ""} | {sample["text_row"]: sample["instruction"] for sample in read(cache)}
    assert len(rows) == 8
    for row, instruction in rows.items():
        tokens = tokenizer(instruction, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected = encoder(tokens.input_ids)[0][0]  # (77, d)
        torch.testing.assert_close(torch.from_numpy(text[row]).float(), expected, **HALF)


def test_sdxl_text_and_pooled_equal_the_pipelines_own_prompt_encoding(
    sdxl: Path, data: Path, tmp_path: Path, encode: Encode
) -> None:
    """SDXL rows hold the penultimate states of both encoders side by side, and the second's pooled output."""
    encode(sdxl, data, tmp_path / "cache")
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(sdxl, force_zeros_for_empty_prompt=False)
    group = zarr.open_group(tmp_path / "cache" / "data.zarr", mode="r")
    for sample in [*read(tmp_path / "cache"), {"text_row": 0, "instruction": ""}]:
        text, _, pooled, _ = pipeline.encode_prompt(
            sample["instruction"], device=torch.device("cpu"), do_classifier_free_guidance=False
        )
        row = sample["text_row"]
        torch.testing.assert_close(torch.from_numpy(numbers(group["text"])[row]).float(), text[0], **HALF)
        torch.testing.assert_close(torch.from_numpy(numbers(group["pooled"])[row]).float(), pooled[0], **HALF)


def test_equal_pairs_and_equal_instructions_are_stored_once(sd: Path, tmp_path: Path, encode: Encode) -> None:
    """Two instructions for one pair share its latents, and a pair given twice stays two samples on one row."""
    columns = tiny.pairs(2)
    columns = {name: [*values, values[0], values[0]] for name, values in columns.items()}
    columns["edit_prompt"] = ["make it red", "make it blue", "make it blue", "make it red"]
    encode(sd, tiny.dataset(tmp_path / "data", columns), tmp_path / "cache")
    samples = read(tmp_path / "cache")
    assert [sample["row"] for sample in samples] == [0, 1, 0, 0]
    assert [sample["text_row"] for sample in samples] == [1, 2, 2, 1]
    assert numbers(zarr.open_group(tmp_path / "cache" / "data.zarr", mode="r")["edited"]).shape[0] == 2


def test_encoding_a_finished_cache_again_encodes_nothing(
    sd: Path, data: Path, cache: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run says that there is nothing to do, loads no encoder and touches no shard."""
    shutil.copytree(cache, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("data.zarr/*/c/**/*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ip2p.encode.models.encoders.Encoders.__init__", lambda *_: pytest.fail("encoders were loaded"))
        encode(sd, data, tmp_path / "cache", random_flip=True)
    assert "nothing to encode" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("data.zarr/*/c/**/*")}


def test_the_samples_table_keeps_source_and_crop_sizes(sd: Path, data: Path, tmp_path: Path, encode: Encode) -> None:
    """24 by 20 pictures, resized to 19 by 16 and cropped in the middle, are recorded as that."""
    encode(sd, data, tmp_path / "cache", center_crop=True)
    sample = read(tmp_path / "cache")[0]
    assert (sample["original_width"], sample["original_height"]) == (24, 20)
    assert (sample["edited_width"], sample["edited_height"]) == (24, 20)
    assert (sample["crop_top"], sample["crop_left"]) == ([0], [1])


def read(cache: Path) -> list[dict]:
    """The rows of the samples table."""
    return pq.read_table(cache / "samples.parquet").to_pylist()


def test_the_next_batch_is_begun_before_the_numbers_of_this_one_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One batch is always in flight, over the ends of shards too; each row gets the numbers of its own picture."""
    pairs = [Pair(fakes.png(2 * n), fakes.png(2 * n + 1), f"make it {n}") for n in range(10)]
    fakes.install(monkeypatch, fakes.Pairs(pairs), 4)
    log: dict[str, list[str]] = {"moments": [], "embed": []}

    def logged(name: str) -> Callable[..., Callable[[], Any]]:
        original = getattr(fakes.Encoders, name)

        def begin(self: fakes.Encoders, batch: Any) -> Callable[[], Any]:
            finish, number = original(self, batch), sum(line.startswith("begin") for line in log[name])
            log[name].append(f"begin {number}")

            def finish_logged() -> Any:
                log[name].append(f"finish {number}")
                return finish()

            return finish_logged

        return begin

    for name in log:
        monkeypatch.setattr(fakes.Encoders, name, logged(name))
    fakes.encode(tmp_path / "cache", encode_batch_size=2)
    assert log == {"moments": in_flight(2 + 2 + 1), "embed": in_flight(1 + 1 + 1)}  # batches of the shards
    group = zarr.open_group(tmp_path / "cache" / "data.zarr", mode="r")
    for sample in read(tmp_path / "cache"):
        for array, file in zip(("original", "edited"), pairs[sample["position"]][:2], strict=True):
            found = numbers(group[array])[sample["row"], 0]
            expected = fakes.moments(fakes.view(file, False)[None])[0].numpy()
            np.testing.assert_array_equal(found, expected[: len(found)])


def in_flight(batches: int) -> list[str]:
    """What happens to batches where each is begun before the one ahead of it is finished."""
    between = [line for n in range(1, batches) for line in (f"begin {n}", f"finish {n - 1}")]
    return ["begin 0", *between, f"finish {batches - 1}"]


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 0), (2, 1, 1), (64, 1, 16), (32, 8, 3), (8, 8, 0)])
def test_processes_on_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int
) -> None:
    """Each process that encodes starts as many workers as its share of the cores allows, and keeps one for itself."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert plan.workers(encode_config(dataset_name="data")) == workers


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_instructions_that_are_cut_short_are_counted_and_one_is_shown(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said each time, since training sees no more of them; one that just fits is not among them."""
    columns = tiny.pairs(4)
    fits, longer = " ".join(["red"] * 75), " ".join(["blue"] * 76)
    columns["edit_prompt"] = [fits, longer, longer, f"{longer} house"]
    data = tiny.dataset(tmp_path / "data", columns)
    for _ in range(2):
        encode(request.getfixturevalue(family), data, tmp_path / "cache")
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "too long" in line)
        assert line.startswith(
            "2 instructions are too long: the text encoder does not see their ends, as in 'blue blue"
        )
        assert len(line) < 200
