"""Tests of encode/base/console.py and begin.py: messages are logged, commands print them, and `--quiet` is heard."""

import logging
from pathlib import Path

import pytest

import tiny
from ip2p.encode.__main__ import main
from ip2p.encode.base.begin import begin
from ip2p.encode.base.console import LOGGER, bar, is_quiet, say, warn
from ip2p.encode.keeper.__main__ import main as keep


def flags(sd: Path, data: Path, cache: Path, *more: str) -> list[str]:
    """The command line of an encode."""
    paths = {"pretrained_model_name_or_path": sd, "dataset_name": data, "cache": cache}
    return [*tiny.arguments(paths | {"resolution": 8, "dataloader_num_workers": 0, "max_train_samples": 2}), *more]


@pytest.fixture
def as_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logger as it is where no command has begun."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "propagate", True)
    LOGGER.setLevel(logging.NOTSET)


def test_a_quiet_command_prints_errors_alone(
    sd: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither messages nor bars; the cache is the same, and without the flag it is told of."""
    for library in ("HF_HUB", "HF_DATASETS"):
        monkeypatch.setenv(f"{library}_DISABLE_PROGRESS_BARS", "0")  # which is left as it is, so that nothing remains
    main(flags(sd, data, tmp_path / "cache", "--quiet"))
    assert capfd.readouterr() == ("", "")
    main(flags(sd, data, tmp_path / "cache"))
    assert "nothing to encode" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(flags(sd, data, tmp_path / "cache", "--quiet", "--resolution", "7"))
    assert "--resolution 7" in capfd.readouterr().err


def test_a_file_can_ask_for_quiet_and_a_later_flag_takes_it_back(tmp_path: Path) -> None:
    """It is no flag of a run: nothing of it is left."""
    (tmp_path / "run.yaml").write_text("quiet: true\nseed: 3\n")
    assert begin(["--config", str(tmp_path / "run.yaml"), "--use_ema"]) == ["--seed", "3", "--use_ema"]
    assert is_quiet()
    assert begin([f"--config={tmp_path / 'run.yaml'}", "--no_quiet"]) == ["--seed", "3"]
    assert not is_quiet()


def test_what_was_asked_for_is_printed_all_the_same(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ip2p-cache info` has nothing else to do."""
    keep(["info", str(cache), "--quiet"])
    assert "10 ok; views: plain, flip" in capsys.readouterr().out


def test_warnings_go_to_stderr_and_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages go to stdout; a percent sign is one."""
    say("100% of it", "and more")
    warn("less")
    assert capsys.readouterr() == ("100% of it\nand more\n", "less\n")
    begin(["--quiet"])
    say("100% of it")
    warn("less")
    assert capsys.readouterr() == ("", "less\n")


@pytest.mark.usefixtures("as_in_python")
def test_python_hears_what_logging_lets_through(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed by itself; bars come with messages."""
    say("a message")
    warn("a warning")
    assert bar(None, "work", "step").disable
    assert [record.message for record in caplog.records] == ["a warning"]
    with caplog.at_level(logging.INFO, "ip2p"):
        say("a message")
        assert not bar(None, "work", "step").disable
    assert caplog.record_tuples[-1] == ("ip2p", logging.INFO, "a message")
    assert "message" not in capsys.readouterr().out


@pytest.mark.usefixtures("as_in_python")
def test_only_the_main_process_speaks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Of those that a launcher started."""
    monkeypatch.setenv("RANK", "1")
    warn("twice")
    assert caplog.records == []
