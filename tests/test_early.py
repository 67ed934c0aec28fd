"""Mistakes that need no torch are answered before it is imported, which takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = """
ip2p.train: --cache {folder} --output_dir {folder}/out
ip2p.train: --cache {folder}/none --output_dir {folder}/out --pretrained_model_name_or_path m
ip2p.train: --cache c --output_dir {folder}/file
ip2p.train: --cache c --output_dir {folder}/out --use_emaa
ip2p.train: --cache c --output_dir {folder}/out --ema_decay 0.5
ip2p.train: --dataset_name {folder}/none.jsonl --pretrained_model_name_or_path m --output_dir {folder}/out
ip2p.encode: --pretrained_model_name_or_path {folder}/none --dataset_name d --cache {folder}/cache
ip2p.encode: --pretrained_model_name_or_path m --pretrained_vae_model_name_or_path ./v --dataset_name d --cache /tmp/c
ip2p.encode: --pretrained_model_name_or_path m --dataset_name {folder}/none.jsonl --cache {folder}/cache
ip2p.encode: --pretrained_model_name_or_path m --train_data_dir {folder}/none --cache {folder}/cache
ip2p.encode: --pretrained_model_name_or_path m --dataset_name d --cache s3://bucket
ip2p.infer: --model {folder} --image {folder}/file --prompt p --output {folder}/o.png
ip2p.infer: --model {folder}/none --image {folder}/file --prompt p --output {folder}/o.png
ip2p.infer: --model m --image {folder}/none.png --prompt p --output {folder}/o.png
ip2p.infer: --model m --table {folder}/none.csv --output {folder}/o
ip2p.infer: evaluate --model {folder}/none --dataset d --output {folder}/o
ip2p.infer: evaluate --model m --dataset {folder}/none.csv --output {folder}/o
ip2p.infer: export --model {folder}/none --output {folder}/o.safetensors
ip2p.encode.keeper: info {folder}
ip2p.encode.keeper: verify {folder}
"""
SCRIPT = """
import importlib, shlex, sys
for line in sys.stdin.read().split("\\n"):
    if line:
        module, _, arguments = line.partition(": ")
        try:
            importlib.import_module(f"{module}.__main__").main(shlex.split(arguments))
        except SystemExit as ended:
            print(line, ended.code, "torch" in sys.modules, "diffusers" in sys.modules)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str], Path]:
    """What a process says that runs all commands, one after the other: on standard output and on standard error."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "file").write_text("")
    (folder / "cache" / "manifest.json").parent.mkdir()
    lines = COMMANDS.strip().format(folder=folder).replace(" c ", f" {folder}/cache ")
    (folder / "cache" / "manifest.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=lines, capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr.splitlines(), folder


def test_each_mistake_is_answered_in_a_line_before_torch_is_imported(
    answers: tuple[list[str], list[str], Path],
) -> None:
    """By status 2; none of them in the process of all of them had imported it."""
    ends, said, folder = answers
    lines = COMMANDS.strip().format(folder=folder).replace(" c ", f" {folder}/cache ").splitlines()
    assert ends == [f"{line} 2 False False" for line in lines]
    assert len(said) == len(lines), said


@pytest.mark.parametrize(
    "answer",
    [
        "ip2p-train: {folder} is not a cache: it has no manifest.json",
        "ip2p-train: {folder}/none is not a cache",
        "ip2p-train: --output_dir {folder}/file cannot be written: {folder}/file is no folder",
        "ip2p-train: unknown flag --use_emaa; did you mean --use_ema?",
        "ip2p-train: dataset {folder}/none.jsonl cannot be opened: nothing is there",
        "ip2p-encode: {folder}/none is not there: expected a folder or a .safetensors file here, or an id on the Hub",
        "ip2p-encode: the VAE ./v is not there",
        "ip2p-encode: --train_data_dir {folder}/none is not a folder",
        "ip2p-infer: {folder} is not a checkpoint in diffusers' layout",
        "ip2p-infer: --image {folder}/none.png: no picture is there",
        "ip2p-infer: dataset {folder}/none.csv cannot be opened: nothing is there",
        "ip2p-infer: {folder}/none is no model",
    ],
)
def test_the_answer_names_what_is_wrong(answers: tuple[list[str], list[str], Path], answer: str) -> None:
    """And what was expected, or the flag."""
    _, said, folder = answers
    assert any(line.startswith(answer.format(folder=folder)) for line in said), said
