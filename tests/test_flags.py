"""Every flag of diffusers' two training scripts is taken by the right command, or refused with the right pointer."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml

from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import build, dump, flags_of, parse
from ip2p.encode.base.refused import REFUSED, TRAIN_ONLY
from ip2p.encode.config import EncodeConfig
from ip2p.infer.config import EvaluateConfig, InferConfig
from ip2p.train.command import read as both
from ip2p.train.config import TrainConfig, refused

BOTH, ENCODE, TRAIN = ("encode", "train"), ("encode",), ("train",)
FLAGS = {
    "pretrained_model_name_or_path": ("m", BOTH),
    "pretrained_vae_model_name_or_path": ("v", BOTH),
    "vae_precision": ("fp32", ENCODE),
    "revision": ("main", BOTH),
    "variant": ("fp16", BOTH),
    "dataset_name": ("d", ENCODE),
    "dataset_config_name": ("c", ENCODE),
    "train_data_dir": ("folder", ENCODE),
    "original_image_column": ("a", ENCODE),
    "edited_image_column": ("b", ENCODE),
    "edit_prompt_column": ("c", ENCODE),
    "val_image_url": ("x.png", TRAIN),
    "val_image_url_or_path": ("x.png", TRAIN),
    "validation_prompt": ("make it snowy", TRAIN),
    "num_validation_images": ("2", TRAIN),
    "validation_epochs": ("1", TRAIN),
    "validation_steps": ("100", TRAIN),
    "max_train_samples": ("5", BOTH),
    "output_dir": ("out", TRAIN),
    "cache_dir": ("hub", BOTH),
    "seed": ("1", TRAIN),
    "resolution": ("512", ENCODE),
    "center_crop": (None, ENCODE),
    "random_flip": (None, ENCODE),
    "train_batch_size": ("4", TRAIN),
    "num_train_epochs": ("3", TRAIN),
    "max_train_steps": ("10", TRAIN),
    "gradient_accumulation_steps": ("2", TRAIN),
    "gradient_checkpointing": (None, TRAIN),
    "learning_rate": ("5e-05", TRAIN),
    "scale_lr": (None, TRAIN),
    "lr_scheduler": ("cosine", TRAIN),
    "lr_warmup_steps": ("0", TRAIN),
    "conditioning_dropout_prob": ("0.05", TRAIN),
    "use_8bit_adam": (None, TRAIN),
    "allow_tf32": (None, TRAIN),
    "use_ema": (None, TRAIN),
    "non_ema_revision": ("main", TRAIN),
    "dataloader_num_workers": ("2", ENCODE),
    "adam_beta1": ("0.9", TRAIN),
    "adam_beta2": ("0.999", TRAIN),
    "adam_weight_decay": ("0.01", TRAIN),
    "adam_epsilon": ("1e-08", TRAIN),
    "max_grad_norm": ("1", TRAIN),
    "push_to_hub": (None, TRAIN),
    "hub_token": ("hf_x", TRAIN),
    "hub_model_id": ("a/b", TRAIN),
    "logging_dir": ("logs", TRAIN),
    "mixed_precision": ("fp16", BOTH),
    "report_to": ("wandb", TRAIN),
    "checkpointing_steps": ("500", TRAIN),
    "checkpoints_total_limit": ("1", TRAIN),
    "resume_from_checkpoint": ("latest", TRAIN),
    "enable_xformers_memory_efficient_attention": (None, TRAIN),
    "local_rank": ("0", ()),
    "crops_coords_top_left_h": ("0", ()),
    "crops_coords_top_left_w": ("0", ()),
}
REQUIRED = {
    "one": {"pretrained_model_name_or_path": "m", "dataset_name": "d"},
    "encode": {"pretrained_model_name_or_path": "m", "dataset_name": "d", "cache": "c"},
    "train": {"pretrained_model_name_or_path": "m", "cache": "c", "output_dir": "o"},
}


ELSEWHERE = "belongs to ip2p-encode: give it there, or a --dataset_name here as well"
PICTURE = {"val_image_url_or_path": "x.png"}
COMPANIONS = dict.fromkeys(("num_validation_images", "validation_steps", "validation_epochs"), PICTURE) | {
    "val_image_url": {},
    "val_image_url_or_path": {},
    "validation_prompt": PICTURE,
}
"""Flags of training that act beside others alone; each of them goes with a prompt."""


def line(command: str, flag: str, value: str | None) -> list[str]:
    """The command line of one flag beside those that it needs."""
    required = dict(REQUIRED[command])
    if command != "encode" and flag in COMPANIONS:
        required |= {"validation_prompt": "make it snowy"} | COMPANIONS[flag]
    if command != "encode" and flag == "hub_token":
        required["push_to_hub"] = ""
    required.pop(flag, None)
    if flag == "train_data_dir":
        required.pop("dataset_name", None)
    arguments = [part for name, given in required.items() for part in (f"--{name}", given) if part]
    return [*arguments, f"--{flag}" if value is None else f"--{flag}={value}"]


def read(command: str, flag: str, value: str | None) -> EncodeConfig | TrainConfig:
    """The configuration of a command that is given one flag beside those that it needs."""
    if command == "encode":
        return parse(EncodeConfig, line(command, flag, value), "ip2p-encode", REFUSED)
    return parse(TrainConfig, line(command, flag, value), "ip2p-train", refused())


def holds(config: EncodeConfig | TrainConfig, flag: str, value: str | None) -> bool:
    """Whether a configuration has taken a flag by its value."""
    (group,) = (group for group in (config, *vars(config).values()) if hasattr(group, flag))
    found = getattr(group, flag)
    found = found[0] if isinstance(found, tuple) else found
    return found == (True if value is None else type(found)(value))


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("command", ["encode", "train"])
def test_each_flag_is_taken_or_refused_with_a_pointer(command: str, flag: str) -> None:
    """A flag that is taken has the value given; one of the other stage names the command that takes it."""
    value, takers = FLAGS[flag]
    if command in takers:
        assert holds(read(command, flag, value), flag, value)
    else:
        with pytest.raises(SettingsError) as answer:
            read(command, flag, value)
        for taker in takers:
            assert f"--{flag} belongs to ip2p-{taker}" in str(answer.value)


@pytest.mark.parametrize("flag", FLAGS)
def test_one_command_hands_each_flag_to_the_stages_that_take_it(flag: str) -> None:
    """A command for diffusers' scripts, which know neither a cache nor stages; two constants of theirs are answered."""
    value, takers = FLAGS[flag]
    if not takers:
        with pytest.raises(SettingsError, match=f"^--{flag} is not needed: "):
            both(line("one", flag, value))
        return
    stages = dict(zip(("encode", "train"), both(line("one", flag, value)), strict=True))
    for stage in takers:
        config = stages[stage]
        assert config
        assert holds(config, flag, value)


def test_one_command_takes_all_flags_at_once() -> None:
    """But those that exclude each other, and the two kinds of names that the scripts have for one thing."""
    without = {"train_data_dir", "val_image_url", "validation_steps"}
    flags = {name: (value, takers) for name, (value, takers) in FLAGS.items() if takers and name not in without}
    given = [f"--{name}" if value is None else f"--{name}={value}" for name, (value, _) in flags.items()]
    stages = dict(zip(("encode", "train"), both(given), strict=True))
    for name, (value, takers) in flags.items():
        for stage in takers:
            config = stages[stage]
            assert config
            assert holds(config, name, value), name


def test_crop_coordinates_are_refused_with_the_reason() -> None:
    """SDXL's crop flags are no constants here: every sample has its own, and the answer says so."""
    for command in ("encode", "train"):
        with pytest.raises(SettingsError, match="each sample's own crop"):
            read(command, "crops_coords_top_left_h", "0")


def test_the_names_that_encode_refuses_are_flags_that_train_takes() -> None:
    """All of them: encode cannot import train, so its list of names is held against train's flags here."""
    assert sorted(TRAIN_ONLY) == sorted(set(flags_of(TrainConfig)) - set(flags_of(EncodeConfig)))


def test_a_configuration_file_stands_for_its_flags_and_later_flags_win(tmp_path: Path) -> None:
    """Booleans, lists and numbers as text mean what they say."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "pretrained_model_name_or_path: m\ncache: c\noutput_dir: o\nuse_ema: true\nscale_lr: false\n"
        "learning_rate: 1e-5\nmixed_precision: no\nconditioning_dropout_prob: [0.1, 0.2, 0.3]\nseed: null\n"
    )
    config = parse(TrainConfig, ["--config", str(path), "--learning_rate", "2e-5"], "ip2p-train", {})
    assert (config.optimizer.use_ema, config.optimizer.scale_lr, config.optimizer.learning_rate) == (True, False, 2e-5)
    assert (config.machine.mixed_precision, config.steps.seed) == ("no", None)
    assert config.objective.conditioning_dropout_prob == (0.1, 0.2, 0.3)


@dataclasses.dataclass(frozen=True)
class Switches:
    """A switch that is off by default and one that is on."""

    off: bool = False
    on: bool = True


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("", "", Switches()),
        ("", "--off --no_on", Switches(True, False)),
        ("", "--no-on --off --on --no-off", Switches()),
        ("off: true\non: true\n", "", Switches(True, True)),
        ("off: false\non: false\n", "", Switches(False, False)),
        ("off: true\non: false\n", "--no_off --on", Switches()),
    ],
)
def test_a_switch_is_set_both_ways_and_the_last_one_wins(
    file: str, flags: str, expected: Switches, tmp_path: Path
) -> None:
    """`--x` and `--no_x` are there for each of them, whatever its default, and so are true and false in a file."""
    (tmp_path / "run.yaml").write_text(file)
    config = ["--config", str(tmp_path / "run.yaml")] if file else []
    assert parse(Switches, [*config, *flags.split()], "ip2p-x", {}) == expected


def test_what_a_run_has_kept_of_its_switches_is_read_again(tmp_path: Path) -> None:
    """The train.yaml of any run, with every switch on or off, gives the same configuration."""
    switches = {name for name, hint in flags_of(TrainConfig).items() if hint is bool}
    for value in (True, False):
        needed = {"max_grad_norm": math.inf}  # by one of them
        config = build(TrainConfig, dict(REQUIRED["train"]) | needed | dict.fromkeys(switches, value))
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(dump(config)))
        assert parse(TrainConfig, ["--config", str(tmp_path / "train.yaml")], "ip2p-train", refused()) == config


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--no_use_eam", "unknown flag --no_use_eam; did you mean --no_use_ema?"),
        ("--no_seed", "unknown flag --no_seed; did you mean --seed?"),
        ("--no_random_flip", f"--no_random_flip {ELSEWHERE}"),
        ("--no_flip_regex", f"--no_flip_regex {ELSEWHERE}"),
    ],
)
def test_a_wrong_switch_is_answered_as_any_other_flag(flag: str, answer: str) -> None:
    """With the right one, or with the command that takes it; what is no switch cannot be switched off."""
    with pytest.raises(SettingsError, match=f"^{re.escape(answer)}$"):
        read("train", flag.strip("-"), None)


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (config, flag)
        for config in (EncodeConfig, InferConfig, EvaluateConfig)
        for flag in flags_of(config)
        if flag.endswith(("_column", "_columns"))
    ],
)
def test_a_column_without_a_name_is_refused(config: type, flag: str) -> None:
    """As an unset variable of a shell gives it; among others, too."""
    values = ["a", ""] if flag.endswith("s") else [""]
    with pytest.raises(SettingsError, match=f"^--{flag} '': expected a name"):
        parse(config, [f"--{flag}", *values], "ip2p-x")
    with pytest.raises(SettingsError, match=r"^give "):  # what is missing beside it
        parse(config, [f"--{flag}", "a"], "ip2p-x")
