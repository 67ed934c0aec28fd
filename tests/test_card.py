"""Tests of train/save/card.py and pipeline.py: the model card, and the upload to a stand-in for the Hub."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState

from hub import Handler, Hub, serve
from ip2p.train.__main__ import main
from test_train import flags


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on the loopback interface."""
    with serve(tmp_path / "hub") as standin:
        for name in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
            monkeypatch.setattr(f"{name}.ENDPOINT", standin.url, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield standin


def test_a_finished_run_is_uploaded_with_its_card_and_without_its_checkpoints(
    sd: Path, cache: Path, tmp_path: Path, hub: Hub
) -> None:
    """`--push_to_hub` sends the pipeline, the card and the validation pictures; no file or tracker sees the token."""
    looked_at = {"num_validation_samples": 2, "num_validation_images": 1, "max_train_steps": 2}
    upload = {
        "report_to": "tensorboard",
        "push_to_hub": True,
        "hub_token": "hf_secret",
        "hub_model_id": "someone/editor",
    }
    main(flags(sd, cache, tmp_path / "out", max_train_steps=1))
    (left := tmp_path / "out" / "abandoned-checkpoint-9").mkdir()
    (left / "metrics.jsonl").touch()
    AcceleratorState._reset_state(reset_partial_state=True)
    main(flags(sd, cache, tmp_path / "out", **looked_at, **upload, resume_from_checkpoint="latest"))
    assert {"model_index.json", "README.md", "train.yaml", "validation/step-000002.png"} <= hub.uploaded.keys()
    assert "unet/diffusion_pytorch_model.safetensors" in hub.uploaded
    assert not [name for name in hub.uploaded if "checkpoint" in name or name.startswith("logs")]
    assert list((tmp_path / "out" / "logs").rglob("events*"))
    assert "Bearer hf_secret" in hub.tokens
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert b"hf_secret" not in path.read_bytes(), path


def test_the_card_names_data_cache_settings_losses_and_pictures(sd: Path, cache: Path, tmp_path: Path) -> None:
    """What a reader needs to judge and to repeat the run; no place on this machine, which the Hub would refuse."""
    looked_at = {"num_validation_samples": 2, "num_validation_images": 1, "max_train_steps": 2}
    main(flags(sd, cache, tmp_path / "out", **looked_at, cache_dir=tmp_path))
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in header
    assert "10 samples of pairs at" in card
    assert "| pretrained_model_name_or_path | sd |" in card
    assert str(tmp_path.parent) not in card
    assert str(sd.parent) not in card
    assert "instruct-pix2pix" in header["tags"]
    manifest = json.loads((cache / "manifest.json").read_text())
    for part in (manifest["identity"]["vae"], "10 samples", "| validation_loss |", "| train_batch_size | 2 |"):
        assert part in card
    assert "![Validation pictures](validation/step-000002.png)" in card


def test_an_upload_that_fails_leaves_the_pipeline_and_says_so(
    sd: Path, cache: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends with the Hub's whole reason after everything was saved, and the upload alone is repeated."""

    def refuse(self: Handler) -> None:
        self.body()
        body = json.dumps({"error": 'Invalid metadata in README.md.\n- "base_model" is not valid.'}).encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    arguments = flags(
        sd,
        cache,
        tmp_path / "out",
        max_train_steps=1,
        push_to_hub=True,
        hub_model_id="someone/editor",
        hub_token="hf_x",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "do_POST", refuse)
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    first, last = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("ip2p-train: --push_to_hub someone/editor: ")
    assert 'Invalid metadata in README.md. - "base_model" is not valid.' in first
    assert f"The pipeline is in {tmp_path / 'out'}" in last
    assert (tmp_path / "out" / "model_index.json").is_file()
    hub.uploaded.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert {"model_index.json", "README.md"} <= hub.uploaded.keys()
