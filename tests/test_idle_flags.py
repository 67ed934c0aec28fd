"""Flags that cannot act as they are given: each is refused with what to do, before any work."""

from pathlib import Path

import pytest

from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import parse
from ip2p.encode.config import EncodeConfig
from ip2p.encode.keeper.__main__ import main as keep
from ip2p.infer.config import EvaluateConfig, InferConfig

COMMANDS = {
    "ip2p-encode": (EncodeConfig, "--pretrained_model_name_or_path {here} --dataset_name {here} --cache cache"),
    "ip2p-encode --dataset": (
        EncodeConfig,
        "--pretrained_model_name_or_path {here} --dataset_name {here}/table.csv --cache cache",
    ),
    "ip2p-infer --table": (InferConfig, "--model {here} --table {here}/table.csv --output out"),
    "ip2p-infer": (InferConfig, "--model {here} --image a.png --prompt red --output out"),
    "ip2p-infer --ui": (InferConfig, "--model {here} --ui"),
    "ip2p-infer evaluate": (EvaluateConfig, "--model {here} --dataset data --output out"),
}


def read(command: str, flags: str, here: Path) -> None:
    config, required = COMMANDS[command]
    (here / "table.csv").touch()
    parse(config, f"{required} {flags}".format(here=here).split(), command)


@pytest.mark.parametrize(
    ("command", "idle", "mend"),
    [
        ("ip2p-encode", "--revision v2", "leave it out"),
        ("ip2p-encode", "--single_file_config x", "leave it out"),
        ("ip2p-encode", "--dataset_revision v2", "datasets on the Hub"),
        ("ip2p-encode --dataset", "--dataset_config_name all", "leave it out"),
        ("ip2p-encode", "--crops 8", "--resize_mode random_crop"),
        ("ip2p-encode", "--no_flip_regex east", "--random_flip"),
        ("ip2p-infer", "--revision v2", "leave it out"),
        ("ip2p-infer", "--host 0.0.0.0", "--ui"),
        ("ip2p-infer", "--port 0", "--ui"),
        ("ip2p-infer", "--sweep_guidance_scale 3 5", "--sweep"),
        ("ip2p-infer", "--sweep_image_guidance_scale 1", "--sweep"),
        ("ip2p-infer", "--guidance_scale 3 --sweep", "--sweep_"),
        ("ip2p-infer", "--image_guidance_scale 3 --sweep", "--sweep_"),
        ("ip2p-infer", "--split test", "--table"),
        ("ip2p-infer --table", "--dataset_revision v2", "leave it out"),
        ("ip2p-infer --table", "--dataset_config_name all", "leave it out"),
        ("ip2p-infer", "--edit_prompt_column words", "--table"),
        ("ip2p-infer", "--negative_prompt night --guidance_scale 1 --image_guidance_scale 1", "raise --guidance_scale"),
        ("ip2p-infer", "--guidance_rescale 0.7 --guidance_scale 1 --image_guidance_scale 1", "raise --guidance_scale"),
        ("ip2p-infer --ui", "--num_images 2", "leave it out"),
        ("ip2p-infer --ui", "--batch_size 2", "leave it out"),
        ("ip2p-infer --ui", "--keep_blacked_out", "leave it out"),
        ("ip2p-infer --ui", "--split test", "--table"),
        ("ip2p-infer evaluate", "--revision v2", "leave it out"),
        ("ip2p-infer evaluate", "--image_guidance_scale 2 --curve", "scales are fixed"),
        ("ip2p-infer evaluate", "--negative_prompt night --guidance_scale 1 --image_guidance_scale 1", "guidance"),
    ],
)
def test_a_flag_that_cannot_act_is_refused(command: str, idle: str, mend: str, tmp_path: Path) -> None:
    """The answer names the flag, and what it belongs to or that it goes."""
    with pytest.raises(SettingsError) as answer:
        read(command, idle, tmp_path)
    assert str(answer.value).startswith(idle.split()[0])
    assert mend in str(answer.value)
    assert "\n" not in str(answer.value)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("ip2p-encode", "--crops 8 --resize_mode random_crop"),
        ("ip2p-encode", "--no_flip_regex east --random_flip"),
        ("ip2p-infer", "--sweep --sweep_guidance_scale 3 --negative_prompt night"),
        ("ip2p-infer", "--guidance_scale 1 --negative_prompt night"),
        ("ip2p-infer", "--guidance_scale 10.0 --sweep --no_sweep"),
        ("ip2p-infer --ui", "--port 0 --guidance_scale 1 --image_guidance_scale 1 --negative_prompt night"),
        ("ip2p-infer --ui", "--table data --split test"),
        ("ip2p-infer evaluate", "--curve --split test"),
    ],
)
def test_a_flag_that_acts_is_taken(command: str, flags: str, tmp_path: Path) -> None:
    """Where what it belongs to is given, too, or it says what holds anyway."""
    read(command, flags, tmp_path)


def test_a_revision_is_taken_for_what_is_not_here(tmp_path: Path) -> None:
    """Models that are compared may be on the Hub in part."""
    parse(EvaluateConfig, f"--model {tmp_path} a/b --dataset d --output o --revision v2".split(), "ip2p-infer evaluate")


def test_where_a_model_is_now_belongs_to_encoding_afresh(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ip2p-cache verify` alone reads no model."""
    with pytest.raises(SystemExit, match="2"):
        keep(["verify", str(cache), "--dataset_name", "elsewhere"])
    assert "--dataset_name elsewhere belongs to --reencode: add that, or leave it out" in capsys.readouterr().err
