"""Tests of what users read when something is wrong: one or two lines, no traceback, and what mends it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from ip2p.encode.__main__ import main as encode
from ip2p.train.__main__ import main as train


def answer(command: str, flags: dict[str, object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command answers on standard error; it must exit with status 2."""
    with pytest.raises(SystemExit) as stopped:
        (encode if command == "ip2p-encode" else train)(tiny.arguments(flags))
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if command in line or line.startswith("  ")]
    assert "Traceback" not in text
    assert 1 <= len(lines) <= 4
    return "\n".join(lines)


@pytest.fixture
def encoding(sd: Path, data: Path, tmp_path: Path) -> dict[str, object]:
    """Flags of an encode that would succeed."""
    paths: dict[str, object] = {"pretrained_model_name_or_path": sd, "dataset_name": data, "cache": tmp_path / "cache"}
    return paths | {"resolution": 16, "dataloader_num_workers": 0}


@pytest.fixture
def training(sd: Path, cache: Path, tmp_path: Path) -> dict[str, object]:
    """Flags of a training that would succeed."""
    paths: dict[str, object] = {"pretrained_model_name_or_path": sd, "cache": cache, "output_dir": tmp_path / "out"}
    return paths | {"max_train_steps": 1, "report_to": "none"}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"dataset_name": "no/such/folder"},
            ["dataset no/such/folder cannot be opened", "expected a Hub id, a folder or a file"],
        ),
        ({"split": "test"}, ["cannot be opened", "--split"]),
        ({"dataset_name": None}, ["--dataset_name or --train_data_dir"]),
        (
            {"original_image_column": "input_imag"},
            ["no column input_imag;", "edit_prompt", "did you mean input_image?"],
        ),
        ({"edited_image_column": "edit_prompt"}, ["holds string, expected images", "input_image, edited_image"]),
        ({"resolution": 17}, ["--resolution 17", "multiple of 2", "16 or 18"]),
        ({"resolution": 0}, ["--resolution 0: expected 1 or more"]),
        ({"resolutoin": 16}, ["unknown flag --resolutoin; did you mean --resolution?"]),
        ({"learning_rate": 1e-4}, ["--learning_rate belongs to ip2p-train"]),
        ({"mixed_precision": "fp61"}, ["expected one of no, fp16, bf16; did you mean fp16?"]),
        ({"config": "missing.yaml"}, ["--config missing.yaml cannot be read"]),
    ],
)
def test_wrong_encode_flags_are_answered_in_a_line(
    change: dict[str, object], parts: list[str], encoding: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer names what was found and what mends it."""
    text = answer("ip2p-encode", encoding | change, capsys)
    for part in parts:
        assert part in text


def test_a_folder_that_is_not_a_checkpoint_is_named(
    encoding: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty folder has no model_index.json."""
    flags = encoding | {"pretrained_model_name_or_path": tmp_path}
    assert "not a checkpoint in diffusers' layout: it has no model_index.json" in answer("ip2p-encode", flags, capsys)


def test_a_model_that_is_nowhere_is_named(encoding: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a folder nor a model on the Hub (which tests cannot reach)."""
    flags = encoding | {"pretrained_model_name_or_path": "nobody/no-model"}
    text = answer("ip2p-encode", flags, capsys)
    assert "nobody/no-model is neither a folder nor a .safetensors file here, nor a model that the Hub" in text
    assert "offline mode is enabled" in text
    assert "stacktrace" not in text


def test_a_folder_with_other_files_is_not_made_a_cache(
    encoding: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped --cache does not mix a cache into somebody's pictures."""
    (tmp_path / "holiday.jpg").touch()
    text = answer("ip2p-encode", encoding | {"cache": tmp_path}, capsys)
    assert "holds other files" in text
    assert "holiday.jpg" in text


def test_a_cache_of_another_vae_is_refused_field_by_field(
    training: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The differing field, both values, and the command that mends it are shown."""
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    text = answer("ip2p-train", training | {"pretrained_model_name_or_path": other}, capsys)
    assert "was not encoded with" in text
    assert "run ip2p-encode" in text
    assert "\n  vae: " in text
    assert "\n  text_encoder: " in text
    assert "tokenizer" not in text  # the same vocabulary


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"cache": "nowhere"}, ["nowhere is not a cache", "ip2p-encode"]),
        ({"resolution": 256}, ["--resolution belongs to ip2p-encode"]),
        ({"learning_rat": 1}, ["did you mean --learning_rate?"]),
        ({"conditioning_dropout_prob": 0.5}, ["--conditioning_dropout_prob 0.5", "from 0 to 1/3"]),
        ({"train_batch_size": 0}, ["--train_batch_size 0: expected 1 or more"]),
        ({"lr_scheduler": "cosin"}, ["did you mean cosine?"]),
        ({"resume_from_checkpoint": "latest"}, ["holds no checkpoint"]),
        ({"enable_xformers_memory_efficient_attention": True}, ["xformers", "leave the flag out"]),
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, ["--optimizer adamw8bit", "leave one of them out"]),
        ({"fused_backward": True}, ["--max_grad_norm 1.0", "give inf"]),
        ({"report_to": "abacus"}, ["abacus", "--report_to"]),
    ],
)
def test_wrong_train_flags_are_answered_in_a_line(
    change: dict[str, object], parts: list[str], training: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer names what was found and what mends it."""
    text = answer("ip2p-train", training | change, capsys)
    for part in parts:
        assert part in text


def test_a_damaged_small_file_is_refused_with_the_mend(
    training: dict[str, object], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit in a table or in the manifest stops training before it begins."""
    for name in ("samples.parquet", "units.parquet", "manifest.json"):
        folder = shutil.copytree(cache, tmp_path / name.replace("/", "-"))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        text = answer("ip2p-train", training | {"cache": folder}, capsys)
        assert name in text
        assert "damaged" in text


def test_a_missing_commit_record_stops_training_before_its_rows_are_touched(
    training: dict[str, object], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard without a record does not exist for training, though its file is there."""
    for name in ("images-v1-000000", "text-000000"):
        folder = shutil.copytree(cache, tmp_path / name)
        (folder / "commits" / f"{name}.json").unlink()
        assert f"{name}.json is missing" in answer("ip2p-train", training | {"cache": folder}, capsys)


def test_a_flipped_bit_in_a_shard_is_found_by_verify_cache(
    training: dict[str, object], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opening checks sizes and records; `--verify_cache` reads every byte."""
    folder = shutil.copytree(cache, tmp_path / "damaged")
    shard = folder / "data.zarr" / "edited" / "c" / "0" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 16
    shard.write_bytes(content)
    text = answer("ip2p-train", training | {"cache": folder, "verify_cache": True}, capsys)
    assert "data.zarr/edited/c/0/0/0/0/0" in text
    assert "--repair" in text


def test_a_cache_of_a_newer_format_is_refused(
    training: dict[str, object], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An old ip2p does not guess at what a newer one wrote."""
    from ip2p.encode.base.files import read_record, write_record

    folder = shutil.copytree(cache, tmp_path / "newer")
    write_record(folder / "manifest.json", read_record(folder / "manifest.json") | {"format": 3})
    said = answer("ip2p-train", training | {"cache": folder}, capsys)
    assert "cache format 3, this version of ip2p reads 1 and 2" in said


def test_a_checkpoint_of_another_cache_is_not_continued(
    training: dict[str, object], sd: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run resumed on a cache of another resolution is refused, field by field."""
    train(tiny.arguments(training))
    paths: dict[str, object] = {"pretrained_model_name_or_path": sd, "dataset_name": data, "cache": tmp_path / "c32"}
    encode(tiny.arguments(paths | {"resolution": 32}))
    flags = training | {"cache": tmp_path / "c32", "resume_from_checkpoint": "latest", "max_train_steps": 2}
    text = answer("ip2p-train", flags, capsys)
    assert "trained on another cache" in text
    assert "resolution: 16 in the checkpoint, 32 in --cache" in text


@pytest.mark.parametrize("module", ["ip2p.encode", "ip2p.train"])
def test_help_comes_without_importing_torch(module: str) -> None:
    """`--help` answers in about a second because nothing heavy is imported for it."""
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import json\n"
        "print(json.dumps([m for m in ('torch', 'diffusers', 'transformers', 'zarr') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--pretrained_model_name_or_path" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []
