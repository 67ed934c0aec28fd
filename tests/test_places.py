"""Places that cannot be written: found out before any work, and said in a line."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
from ip2p.encode.base.errors import EditError, SettingsError, user_errors
from ip2p.encode.base.files import check_file, check_folder, whole
from ip2p.encode.keeper.__main__ import main as keep
from ip2p.infer.__main__ import main as infer
from ip2p.infer.outputs import output_place
from ip2p.train.__main__ import main as train


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A file, a folder, a link to nowhere and one to itself."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize("name", ["file", "file/new", "nowhere", "nowhere/new", "loop", "loop/new", "x" * 300, "a\0b"])
def test_what_can_be_no_folder_is_refused(odd: Path, name: str) -> None:
    """With the flag that named it, and nothing made."""
    before = set(odd.rglob("*"))
    with pytest.raises(SettingsError, match=r"^--output .* cannot be written: ") as answer:
        check_folder(odd / name, "--output")
    assert "\n" not in str(answer.value)
    assert set(odd.rglob("*")) == before


def test_what_can_be_a_folder_is_taken(odd: Path) -> None:
    """One that is there, and any below one."""
    for name in ("folder.png", "folder.png/new/below", "new"):
        check_folder(odd / name, "--output")
    check_file(odd / "new.png", "--sheet")
    check_file(odd / "file", "--sheet")


def test_a_folder_that_may_not_be_written_in_is_refused(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operating system says; root, which tests may be, may write anywhere."""

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SettingsError, match=r"--output .*/new cannot be written: Permission denied"):
        check_folder(odd / "new", "--output")


def test_a_file_system_that_takes_no_files_is_refused() -> None:
    """Even root, who may write anywhere, makes nothing in /proc."""
    with pytest.raises(SettingsError, match="--output /proc/new cannot be written: "):
        check_folder(Path("/proc/new"), "--output")


@pytest.mark.parametrize("url", ["s3://shelf/c", "simplecache::gs://shelf/c"])
def test_a_url_is_no_folder(
    url: str,
    tmp_path: Path,
    encode: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Results that are files go to a folder, which is said before a model is looked for; nothing is made.

    A cache has another way there.
    """
    monkeypatch.chdir(tmp_path)
    model, expected = ["--pretrained_model_name_or_path", "m"], f"{url} is a url, expected a folder of this machine"
    runs: dict[str, Callable[[], object]] = {
        f"--cache {expected}: encode into one, then `ip2p-cache push`": lambda: encode(Path("m"), Path("d"), Path(url)),
        f"--output_dir {expected}": lambda: train([*model, "--cache", "c", "--output_dir", url]),
        f"--output {expected}": lambda: infer(["--model", "m", "--image", "i", "--prompt", "x", "--output", url]),
        f"--output {url}/new is a url": lambda: keep(["preview", "no/cache", "--output", f"{url}/new/s.png"]),
    }
    for answer, run in runs.items():
        with pytest.raises(SystemExit, match="2"):
            run()
        assert answer in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "folder", "stem"),
    [
        ("out", "out", None),
        ("runs/sd1.5", "runs/sd1.5", None),
        ("runs/sd1.5/", "runs/sd1.5", None),
        ("red.png/", "red.png", None),
        ("folder.png", "folder.png", None),
        ("red.png", ".", "red"),
        ("new/red.PNG", "new", "red"),
    ],
)
def test_an_output_is_a_file_if_it_ends_as_pictures_do(
    odd: Path, monkeypatch: pytest.MonkeyPatch, output: str, folder: str, stem: str | None
) -> None:
    """Any other ending is a part of a folder's name, and so is all that a slash follows or that is one."""
    monkeypatch.chdir(odd)
    assert output_place(output) == (Path(folder), stem)
    for wrong in ("red.jpg", "red.webp"):
        with pytest.raises(EditError, match=r"a name that ends in \.png; a folder ends in a slash"):
            output_place(wrong)


@pytest.mark.parametrize("flags", ["--output {file}", "--output {file}/a.png", "--output o --sheet {file}/s.png"])
def test_infer_looks_at_its_places_first(odd: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it asks for a picture or a model, of which there is none."""
    arguments = ["--model", "no/model", "--table", "no/table"]
    with pytest.raises(SystemExit, match="2"):
        infer([*arguments, *flags.format(file=odd / "file").split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line


def test_a_folder_where_a_picture_belongs_is_found_before_any_edit(
    photos: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inputs that are named like it have no other place for their edits."""
    (odd / "out" / "a.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        infer(["--model", "no/model", "--image", str(photos), "--prompt", "red", "--output", str(odd / "out")])
    assert "a.png is a folder where an edited picture belongs" in capsys.readouterr().err


def test_evaluate_looks_at_its_place_first(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before models are looked for."""
    with pytest.raises(SystemExit, match="2"):
        infer(["evaluate", "--model", "no/model", "--dataset", "no/data", "--output", str(odd / "file")])
    assert "--output" in capsys.readouterr().err


def test_encode_looks_at_its_place_first(
    odd: Path, encode: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before gigabytes of a model are fetched."""
    with pytest.raises(SystemExit, match="2"):
        encode(Path("no/model"), Path("no/data"), odd / "file")
    assert "file cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("file/s.png", "no folder"), ("folder.png", "it is a folder"), ("s.what", "the ending of a picture")],
)
def test_preview_looks_at_its_place_first(
    odd: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a cache is opened."""
    with pytest.raises(SystemExit, match="2"):
        keep(["preview", "no/cache", "--output", str(odd / name)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_disk_refuses_is_a_line(tmp_path: Path, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes, wherever: the file's own name, the system's reason, status 2; and no half of a file."""
    with pytest.raises(SystemExit, match="2"), user_errors("ip2p-infer"), whole(tmp_path / "a.png"):
        raise OSError(code, os.strerror(code))
    line = f"ip2p-infer: {tmp_path / 'a.png'}: {os.strerror(code)}; what is finished is kept\n"
    assert capsys.readouterr().err == line
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_stay_bugs() -> None:
    """A file that our own code looks for in vain is no fault of the user's."""
    with pytest.raises(FileNotFoundError), user_errors("ip2p-infer"):
        Path("/nowhere/at/all").read_bytes()


def test_a_disk_that_fills_up_ends_an_edit_in_a_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was edited before is there, and the same command goes on."""
    tiny.dataset(tmp_path / "pairs", tiny.pairs(3))
    arguments = ["--model", model, "--table", str(tmp_path / "pairs"), "--output", str(tmp_path / "out")]
    arguments += ["--num_inference_steps", "1", "--batch_size", "1"]
    write = Image.Image.save

    def full(picture: Image.Image, path: Path, **options: Any) -> None:
        if "00001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(picture, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(SystemExit, match="2"):
            infer(arguments)
    assert f"{tmp_path / 'out' / '00001.png'}: No space left on device" in capsys.readouterr().err
    assert infer(arguments) == 0
    assert "2 edited, 1 already there" in capsys.readouterr().out


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    """While a file is unfinished its name is longer, but not too long."""
    path = tmp_path / ("é" * 125 + ".png")
    with whole(path) as unfinished:
        unfinished.touch()
    assert path.is_file()
