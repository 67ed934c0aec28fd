"""Tests of the OpenMoji example's starter checkpoint, and of the scripts that train it."""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import captions
import contrast
import fit
import openmoji
import starter
import text
import text_to_image
import vae


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The committed starter."""
    return StableDiffusionPipeline.from_pretrained(starter.STARTER, safety_checker=None)


def test_the_committed_vae_reconstructs_held_out_emoji() -> None:
    """Read from its float16 file, the autoencoder reaches 28 dB PSNR on emoji that it has never seen."""
    unseen = [code for code in openmoji.hexcodes() if openmoji.is_held_out(code)][::14]
    model = AutoencoderKL.from_pretrained(starter.STARTER / "vae")
    assert model.dtype == torch.float32
    assert vae.psnr(model, vae.pixels_of(unseen)) >= 28


def test_the_starter_loads_in_float32_and_stays_small(pipeline: Any) -> None:
    """diffusers and transformers load every part as float32, though at most 24 MB are stored."""
    assert {part.dtype for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet)} == {torch.float32}
    assert pipeline.unet.config.in_channels == 4
    assert sum(file.stat().st_size for file in starter.STARTER.rglob("*") if file.is_file()) <= 24e6


def test_latents_are_scaled_to_unit_variance(pipeline: Any) -> None:
    """The scaling factor is one over the standard deviation of training latents."""
    seen = [code for code in openmoji.hexcodes() if not openmoji.is_held_out(code)][::100]
    spread = vae.latent_std(pipeline.vae, vae.pixels_of(seen)) * pipeline.vae.config.scaling_factor
    assert 0.8 < spread < 1.2


def test_the_tokenizer_keeps_clips_conventions() -> None:
    """Text comes back in lower case; it is padded with the end token; unseen letters are spelled in bytes."""
    tokenizer = CLIPTokenizer.from_pretrained(starter.STARTER / "tokenizer")
    ids = fit.token_ids(tokenizer, ["Make the skin tone dark", "zebra é 漢"])
    assert ids.shape == (2, text.LENGTH)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "make the skin tone dark"
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "zebra é 漢"
    start, end = tokenizer.convert_tokens_to_ids([text.BOS, text.EOS])
    assert ids[0].tolist() == [start, *tokenizer("make the skin tone dark").input_ids[1:-1], *[end] * (text.LENGTH - 6)]
    assert len(tokenizer) == end + 1 == start + 2


def test_the_text_encoder_pools_the_end_token() -> None:
    """The pooled output is the hidden state of the first end token: the configuration names the right one."""
    tokenizer = CLIPTokenizer.from_pretrained(starter.STARTER / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(starter.STARTER / "text_encoder")
    ids = fit.token_ids(tokenizer, ["make it face left"])
    output: Any = encoder(ids)
    last = len(tokenizer("make it face left").input_ids) - 1
    torch.testing.assert_close(output.pooler_output[0], output.last_hidden_state[0, last])


@pytest.mark.slow  # three trainings
def test_training_the_parts_saves_and_improves_them(tmp_path: Path) -> None:
    """A few steps of each training run on real pictures, save what they made, and lower the loss."""
    named = {key: words for key, words in captions.captions().items() if openmoji.parse(key).stem in {"1F44B", "1F44D"}}
    pixels = vae.pixels_of(list(named))
    short, long = (vae.train_vae(pixels, pixels, steps, 4, 0, tmp_path / "vae") for steps in (2, 15))
    assert long["loss"] < short["loss"]
    tokenizer = text.new_tokenizer(itertools.chain(*named.values()))
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "vae")
    shaken = [(key, key, ["make it a hand"]) for key in named]
    data = fit.Data(autoencoder, tokenizer, named, {"none": shaken})
    saved: list[tuple[Any, dict]] = []

    def save(trained: Any, run: dict) -> None:
        saved.append((trained, run))

    recipe = fit.Recipe(steps=2, batch_size=12, learning_rate=1e-3, seed=0)
    encoders: list[Any] = []
    for steps in 2, 60:
        torch.manual_seed(0)
        encoders.append(text.new_text_encoder(tokenizer))
        contrast.train_text_encoder(encoders[-1], data, recipe._replace(steps=steps), save)
    assert saved[-1][1]["loss"] < 0.8 * saved[-2][1]["loss"]
    assert not torch.equal(*(trained.get_input_embeddings().weight for trained, _ in saved))
    for steps in 2, 12:
        unet, scheduler = text_to_image.new_unet(), text_to_image.new_scheduler()
        text_to_image.train_unet(unet, encoders[-1], scheduler, data, recipe._replace(steps=steps), save)
    assert [run["steps"] for _, run in saved] == [2, 60, 2, 12]
    assert saved[-1][1]["loss"] < saved[-2][1]["loss"]


def test_variants_of_a_character_are_drawn_together() -> None:
    """What is to be told apart is in one batch: several pictures of each character, none of them twice in a draw."""
    named = {key: words for key, words in captions.captions().items() if openmoji.parse(key).stem in {"1F44B", "1F44D"}}
    autoencoder = AutoencoderKL.from_pretrained(starter.STARTER / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(starter.STARTER / "tokenizer")
    data = fit.Data(autoencoder, tokenizer, named)
    bases = [openmoji.base_of(key) for key in named]
    drawn = data.alike(2 * fit.ALIKE, random.Random(0))
    for some in drawn[: fit.ALIKE], drawn[fit.ALIKE :]:
        assert len(set(some)) == fit.ALIKE
        assert len({bases[picture] for picture in some}) == 1


@pytest.mark.slow  # a training of its own
def test_the_unet_is_trained_anew_where_its_text_encoder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet learned beside another text encoder is not kept, whatever the record says of it."""
    shutil.copytree(starter.STARTER, tmp_path / "starter")
    log = tmp_path / "starter" / "training.json"
    record = json.loads(log.read_text())
    del record["text"]
    log.write_text(json.dumps(record))
    short = dict(list(captions.captions().items())[:8])
    monkeypatch.setattr(starter, "captions", lambda: short)
    monkeypatch.setattr(starter, "edits", dict)
    made = starter.build(tmp_path / "starter", vae_steps=1, text_steps=1, unet_steps=1, seed=0)
    assert made["vae"] == record["vae"]
    assert (made["text"]["steps"], made["unet"]["steps"]) == (1, 1)


@pytest.mark.slow  # a training of its own
def test_a_unet_is_trained_further_from_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more steps move the kept weights little, leave the tokenizer as it is, and the card tells of both runs."""
    shutil.copytree(starter.STARTER, tmp_path / "starter")
    before = json.loads((tmp_path / "starter" / "training.json").read_text())
    short = dict(list(captions.captions().items())[:8])
    monkeypatch.setattr(starter, "captions", lambda: short)
    monkeypatch.setattr(starter, "edits", dict)
    steps = {"vae_steps": 1, "text_steps": 1, "unet_steps": 1}
    made = starter.build(tmp_path / "starter", **steps, seed=0, more_unet_steps=2)
    assert {part: made[part] for part in ("vae", "text")} == {part: before[part] for part in ("vae", "text")}
    assert made["unet"]["how"].startswith(starter.told(before["unet"]) + "; 2 steps of 16")
    assert made["unet"]["how"] in (tmp_path / "starter" / "README.md").read_text()
    tokenizers = [folder / "tokenizer" / "tokenizer.json" for folder in (starter.STARTER, tmp_path / "starter")]
    assert len({file.read_text() for file in tokenizers}) == 1
    old, new = (
        UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
        for folder in (starter.STARTER, tmp_path / "starter")
    )
    moved = max(float((old[name] - new[name]).abs().max()) for name in old)
    assert 0 < moved < 0.01
    assert old.keys() == new.keys()


def test_matching_texts_with_pictures_shares_what_is_true_of_several() -> None:
    """The loss is least where a text scores highest at all its pictures alike, and high where scores are swapped."""
    matches = torch.tensor([[True, True, True], [False, True, False], [False, False, True]])
    best, swapped = 20.0 * matches, 20.0 * ~matches
    entropy = (np.log(3) / 3 + 2 * np.log(2) / 3) / 2  # of the wanted probabilities, by text and by picture
    assert contrast.contrastive_loss(best, matches).item() == pytest.approx(entropy, abs=1e-6)
    assert contrast.contrastive_loss(swapped, matches).item() > 10
