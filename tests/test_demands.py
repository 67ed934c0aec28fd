"""Tests of train/demands.py: each flag acts, or is refused with what to do, before anything is loaded."""

from pathlib import Path

import pytest
import yaml

import tiny
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import dump, parse
from ip2p.train.config import TrainConfig, refused

REQUIRED = {"pretrained_model_name_or_path": "someone/model", "cache": "c", "output_dir": "o"}
EDITED = {"val_image_url_or_path": "x.png", "validation_prompt": "make it red"}


def read(**flags: object) -> TrainConfig:
    """A configuration of these flags."""
    return parse(TrainConfig, tiny.arguments(REQUIRED | flags), "ip2p-train", refused())


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ({"ema_decay": 0.9}, "--ema_decay 0.9 does nothing without --use_ema: add that, or leave it out"),
        ({"ema_steps": 2}, "--ema_steps 2 does nothing without --use_ema: add that, or leave it out"),
        ({"ema_length": 0.1}, "--ema_length 0.1 does nothing without --ema_power: add that, or leave it out"),
        ({"ema_power": True, "ema_length": 0.5}, "--ema_length 0.5: expected a number from 0.03 to 0.2"),
        ({"ema_power": True, "ema_decay": 0.9}, "--ema_decay 0.9 does nothing without --use_ema"),
        ({"lr_warmup_steps": 9}, "--lr_warmup_steps 9 does nothing with --lr_scheduler constant: take constant_with_"),
        (
            {"validation_prompt": "x"},
            "--validation_prompt x does nothing without a picture to edit: add --val_image_url",
        ),
        (
            {"validation_steps": 5},
            "--validation_steps 5 does nothing without anything to look at: add --num_validation_s",
        ),
        ({"validation_epochs": 5}, "--validation_epochs 5 does nothing without anything to look at"),
        ({"num_validation_images": 1}, "--num_validation_images 1 does nothing without anything to look at"),
        (
            EDITED | {"validation_steps": 5, "validation_epochs": 1},
            "--validation_steps 5 does nothing beside --validation",
        ),
        (EDITED | {"val_image_url": "y.png"}, "--val_image_url y.png does nothing beside --val_image_url_or_path"),
        ({"val_image_url": "y.png"}, "--val_image_url_or_path y.png needs a --validation_prompt"),
        (
            {"report_to": "none", "logging_dir": "elsewhere"},
            "--logging_dir elsewhere does nothing with --report_to none",
        ),
        (
            {"hub_private_repo": True},
            "--hub_private_repo does nothing without --push_to_hub: add that, or leave it out",
        ),
        ({"hub_token": "hf_secret"}, "--hub_token does nothing without --push_to_hub: add that, or leave it out"),
        (
            {"pretrained_model_name_or_path": "tests", "revision": "main"},
            "--revision main is for models on the Hub, tests is one here: leave it out",
        ),
        (
            {"pretrained_model_name_or_path": "tests", "non_ema_revision": "a"},
            "--non_ema_revision a is for models on the Hub, tests is one here: leave it out",
        ),
        ({"max_grad_norm": 0}, "--max_grad_norm 0 leaves nothing of any gradient: expected a number above 0, or inf"),
        ({"snr_gamma": 0}, "--snr_gamma 0 leaves nothing of the loss: expected a number above 0"),
        (
            {"num_validation_samples": 4, "score_samples": 5},
            "--score_samples 5 are chosen among those that are held out: give --num_validation_samples 5 or more",
        ),
        (
            {"clip_model": "x"},
            "--clip_model x does nothing without edits to score: add --score_samples, or leave it out",
        ),
        ({"keep_best": "loss"}, "--keep_best loss needs --num_validation_samples"),
        ({"num_validation_samples": 4, "keep_best": "psnr"}, "--keep_best psnr needs --score_samples"),
        (
            {"num_validation_samples": 4, "score_samples": 4, "keep_best": "clip_i"},
            "--keep_best clip_i needs --clip_model",
        ),
        (
            {"keep_best": "clip_image"},
            "--keep_best clip_image: expected one of loss, l1, l2, psnr, clip_i, clip_t, clip_d",
        ),
        ({"use_ema": True, "ema_decay": 1.5}, "--ema_decay 1.5: expected a number from 0 to 1"),
    ],
)
def test_a_flag_that_cannot_act_is_refused(
    flags: dict[str, object], answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line that says beside which other flag it would."""
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SettingsError) as refusal:
        read(**flags)
    assert str(refusal.value).startswith(answer)
    assert "hf_secret" not in str(refusal.value)


def test_flags_that_act_are_taken_and_read_again(tmp_path: Path) -> None:
    """What goes together, and the defaults, whether they are given or not, as train.yaml writes them."""
    for flags in (
        {},
        {"use_ema": True, "ema_decay": 0.5, "ema_steps": 3},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 9},
        {"lr_warmup_steps": 0, "max_grad_norm": "inf"},
        EDITED | {"validation_epochs": 2, "num_validation_images": 1},
        {"num_validation_samples": 4, "validation_steps": 2, "num_validation_images": 1, "keep_best": "loss"},
        {"num_validation_samples": 4, "score_samples": 4, "clip_model": "x", "keep_best": "clip_t"},
        {"push_to_hub": True, "hub_token": "hf_secret", "hub_private_repo": True, "hub_license": "mit"},
        {"revision": "main", "non_ema_revision": "other", "max_train_steps": 3, "num_train_epochs": 2},
    ):
        config = read(**flags)
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(dump(config)))
        again = parse(TrainConfig, ["--config", str(tmp_path / "train.yaml")], "ip2p-train", refused())
        assert dump(again) == dump(config)
