"""Files of flags, other names of flags, and presets stand for the flags that they say, on every command line."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from ip2p.encode.base.arguments import other_names
from ip2p.encode.base.errors import SettingsError
from ip2p.encode.base.flags import dump, flags_of, parse
from ip2p.encode.base.verbs import run_verb
from ip2p.encode.config import EncodeConfig
from ip2p.infer.__main__ import main
from ip2p.infer.config import EvaluateConfig, InferConfig
from ip2p.infer.export import ExportConfig
from ip2p.train.config import TrainConfig

CONFIGS = {
    EncodeConfig: "--pretrained_model_name_or_path m --dataset_name d --cache c",
    TrainConfig: "--pretrained_model_name_or_path m --cache c --output_dir o",
    InferConfig: "--model m --image a.png --prompt p --output o",
    EvaluateConfig: "--model m --dataset d --output o",
    ExportConfig: "--model m --output o.safetensors",
}
INFER = [InferConfig, EvaluateConfig, ExportConfig]


def read(config: Any, line: str) -> dict[str, Any]:
    """What a command line says, by flag."""
    return dump(parse(config, line.split(), "ip2p-x"))


@pytest.mark.parametrize(
    ("config", "switch"),
    [(config, name) for config in CONFIGS for name, hint in flags_of(config).items() if hint is bool],
)
def test_every_switch_of_a_file_is_taken_back_by_a_later_flag(config: Any, switch: str, tmp_path: Path) -> None:
    """Of every command, whatever its default is; as YAML and as Python write it."""
    for value, more in (("true", f" --no_{switch}"), ("True", f" --no-{switch}"), ("False", "")):
        (tmp_path / "run.yaml").write_text(f"{switch}: {value}\n")
        assert read(config, f"{CONFIGS[config]} --config {tmp_path}/run.yaml{more}")[switch] is False


@pytest.mark.parametrize(
    ("config", "named", "ours"),
    [
        (
            InferConfig,
            "--pretrained_model_name_or_path m --dataset_name d --output_dir o",
            "--model m --table d --output o",
        ),
        (InferConfig, "--model m --train_data_dir d --output_dir=o", "--model m --table d --output o"),
        (
            InferConfig,
            "--model m --dataset d --output o --dtype float16",
            "--model m --table d --output o --dtype float16",
        ),
        (
            EvaluateConfig,
            "--pretrained-model-name-or-path a b --table d --output_dir o",
            "--model a b --dataset d --output o",
        ),
        (EvaluateConfig, "--model m --train_data_dir d --output o", "--model m --dataset d --output o"),
        (ExportConfig, "--pretrained_model_name_or_path m --output o.safetensors", "--model m --output o.safetensors"),
    ],
)
def test_the_names_of_the_other_commands_are_taken(config: Any, named: str, ours: str) -> None:
    """In each spelling that a flag has."""
    assert read(config, named) == read(config, ours)


@pytest.mark.parametrize("config", INFER)
@pytest.mark.parametrize(("value", "dtype"), [("no", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_precision_is_named_as_in_training(config: Any, value: str, dtype: str) -> None:
    """By its flag and its words; a word that is none is answered with those that there are."""
    for flag in (f"--mixed_precision {value}", f"--mixed_precision={value}"):
        assert read(config, f"{CONFIGS[config]} {flag}")["dtype"] == dtype
    with pytest.raises(SettingsError, match=r"--dtype fp17: expected one of "):
        read(config, f"{CONFIGS[config]} --mixed_precision fp17")


@pytest.mark.parametrize(
    ("verb", "config"), [([], InferConfig), (["evaluate"], EvaluateConfig), (["export"], ExportConfig)]
)
def test_each_other_name_is_shown_once(verb: list[str], config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the flag that it means, and with no line of its own; names of each other's flags need not be."""
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    shown = capsys.readouterr().out
    for name in other_names(config):
        assert name not in flags_of(config)
        assert shown.split().count(f"--{name}") <= 1
        assert name in ("dataset", "table") or f"--{name}" in shown


@pytest.mark.parametrize("config", CONFIGS)
def test_help_is_wrapped_to_its_own_width(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where the source breaks its lines: no line of a flag has room for the first word of the next."""
    with pytest.raises(SystemExit):
        parse(config, ["--help"], "ip2p-x")
    lines = [line.removeprefix("│").removesuffix("│").rstrip() for line in capsys.readouterr().out.splitlines()]
    texts = [(len(line) - len(line.lstrip()), line) for line in lines]
    broken = [
        (line, after)
        for (indent, line), (same, after) in itertools.pairwise(texts)
        if same == indent > 1 and not after.lstrip().startswith("-") and len(line) + 1 + len(after.split()[0]) < 78
    ]
    assert len(texts) > 10
    assert broken == []


def test_a_name_that_is_nearly_one_of_them_is_answered_with_it() -> None:
    """As any flag."""
    with pytest.raises(SettingsError, match=r"did you mean --dataset_name\?"):
        read(InferConfig, "--model m --datset_name d --output o")


def scales(flags: dict[str, Any]) -> tuple[Any, ...]:
    return flags["num_inference_steps"], flags["image_guidance_scale"], flags["guidance_scale"]


@pytest.mark.parametrize("config", [InferConfig, EvaluateConfig])
def test_one_preset_serves_edits_and_scores(config: Any, tmp_path: Path) -> None:
    """By its name both take the same steps and scales; flags of their own win, wherever they stand."""
    line = CONFIGS[config]
    for name, expected in (("guide", (20, 1.5, 10)), ("paper", (100, 1.5, 7.5))):
        assert scales(read(config, f"{line} --preset {name}")) == expected
        assert scales(read(config, f"{line} --num_inference_steps 7 --preset={name}"))[0] == 7
        (tmp_path / "run.yaml").write_text(f"guidance_scale: 3\npreset: {name}\n")
        assert scales(read(config, f"--config {tmp_path}/run.yaml {line}")) == (*expected[:2], 3)
        default = read(config, line)
        if default["preset"] == name:
            assert scales(default) == expected
    with pytest.raises(SettingsError, match="--preset papre: expected one of guide, paper; did you mean paper"):
        read(config, f"{line} --preset papre")


def test_a_preset_gives_a_sweep_its_steps_alone() -> None:
    """Whose scales are flags of their own, so that only one that was named is refused."""
    assert scales(read(InferConfig, f"{CONFIGS[InferConfig]} --sweep --preset paper"))[0] == 100
    with pytest.raises(SettingsError, match=r"--guidance_scale 3\.0 cannot act with --sweep"):
        read(InferConfig, f"{CONFIGS[InferConfig]} --sweep --preset paper --guidance_scale 3")


def test_a_switch_of_a_verb_is_taken_back_as_well(tmp_path: Path) -> None:
    """`ip2p-cache` reads its flags by the same rules."""
    said: list[bool] = []

    def look(*, quarantined: bool = False) -> int:
        """Look."""
        said.append(quarantined)
        return 0

    (tmp_path / "on.yaml").write_text("quarantined: true\n")
    for more in ((), ("--no_quarantined",)):
        run_verb({"look": look}, ["look", "--config", str(tmp_path / "on.yaml"), *more], "ip2p-x")
    assert said == [True, False]
