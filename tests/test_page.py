"""The page of `ip2p-infer --ui`: a real process, driven in a real browser."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import tiny
from ip2p.infer import Editor
from ip2p.infer.__main__ import main
from test_infer import apart, picture
from visit import MODELS, Visit, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)

REQUIRED = os.environ.get("IP2P_BROWSER") == "required"  # as CI says: then nothing here is skipped
with_gradio = pytest.mark.skipif(
    not REQUIRED and not importlib.util.find_spec("gradio"), reason="gradio is not installed"
)
with_browser = pytest.mark.skipif(
    not REQUIRED and not (CHROMIUM and importlib.util.find_spec("playwright")),
    reason="no browser to drive: apt-get install chromium, pip install playwright",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, `one` and `two`, a folder of pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("page")
    pipeline: Any = DiffusionPipeline.from_pretrained(tiny.pipeline(folder / "sd"))
    pipeline.save_pretrained(folder / "one")
    pipeline.unet.conv_out.bias.data += 0.5
    pipeline.save_pretrained(folder / "two")
    (folder / "pictures").mkdir()
    for number in range(2):
        picture(number, (16, 12)).save(folder / "pictures" / f"{number}.png")
    picture(2, (12, 16)).save(folder / "picture.tif")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def ear() -> Iterator[socket.socket]:
    """A proxy that all ways out of this machine lead through, and that nobody should call."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        yield listener


@pytest.fixture(scope="module")
def server(folder: Path, ear: socket.socket) -> Iterator[str]:
    """The address of a page for two models that are there and one that is not."""
    flags = ("--compare", *MODELS[1:], "--image", "pictures", "--prompt", "make it red")
    with running(folder, ear, "--model", MODELS[0], *flags) as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)  # milliseconds: other tests run beside these
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(server: str, browser: "Browser", tmp_path: Path) -> Iterator[Visit]:
    """A fresh session, which ends with a screenshot."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visit = Visit(context.new_page(), server)
    yield visit
    visit.page.screenshot(path=tmp_path / "screenshot.png", full_page=True)
    context.close()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[..., Image.Image]:
    """What `Editor` makes of the first picture."""
    editors = {name: Editor(folder / name) for name in ("one", "two")}

    def edit(model: str = "one", **settings: Any) -> Image.Image:
        editors[model].pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 2} | settings
        return editors[model].edit(folder / "pictures" / "0.png", "make it blue", **settings)[0]

    return edit


@pytest.fixture
def ready(visit: Visit, folder: Path) -> Visit:
    """A session with the first picture and an instruction."""
    visit.prepare(folder / "pictures" / "0.png", "make it blue")
    return visit


@with_gradio
@with_browser
def test_the_page_gives_the_picture_that_editor_gives(
    ready: Visit, folder: Path, expected: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """Upload, instruction, button: the result stands beside its original, to the bit, its settings inside."""
    (edited,) = ready.edit()
    assert apart(edited, expected()) == 0
    settings = json.loads(edited.info["ip2p"])
    assert (settings["prompt"], settings["seed"], settings["num_inference_steps"]) == ("make it blue", 0, 2)
    left, right = ready.sides()
    assert apart(left, Image.open(folder / "pictures" / "0.png")) == 0
    assert apart(right, edited) == 0
    assert "make it blue · seed 0 · 2 steps" in ready.page.locator("#caption").inner_text()
    ready.page.set_viewport_size({"width": 390, "height": 844})
    ready.page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    assert ready.page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"


@with_gradio
@with_browser
def test_a_mask_says_where_a_picture_may_change(
    ready: Visit, folder: Path, expected: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """It is a second picture; the edit is the one that `Editor` gives."""
    mask = Image.new("L", (16, 12))
    mask.paste(255, (8, 0, 16, 12))
    mask.save(tmp_path / "mask.png")
    ready.cover(tmp_path / "mask.png")
    (edited,) = ready.edit()
    assert apart(edited, expected(masks=mask)) == 0
    assert apart(edited, expected()) > 0


@with_gradio
@with_browser
def test_every_control_reaches_the_model(ready: Visit, expected: Callable[..., Image.Image]) -> None:
    """Steps, both scales and the seed give the picture of the `Editor` arguments of those names."""
    for name, value in {"steps": "3", "keep": "1", "follow": "4", "seed": "7"}.items():
        ready.number(name).fill(value)
        ready.number(name).press("Tab")
    settings = {"num_inference_steps": 3, "image_guidance_scale": 1.0, "guidance_scale": 4.0, "seed": 7}
    assert apart(ready.edit()[0], expected(**settings)) == 0


@with_gradio
@with_browser
def test_the_seed_decides_and_may_be_drawn_anew(ready: Visit, expected: Callable[..., Image.Image]) -> None:
    """Another seed gives another picture, the same seed the same, and a drawn one is shown to be used again."""
    ready.edit()
    ready.number("seed").fill("1")
    ready.edit()
    ready.number("seed").fill("0")
    again, other, first = ready.edit()
    assert apart(first, other) > 0
    assert apart(first, again) == 0
    ready.page.locator("#fresh input").check()
    drawn = ready.edit()[0]
    assert apart(drawn, expected(seed=int(ready.number("seed").input_value()))) == 0
    assert apart(drawn, first) > 0


@with_gradio
@with_browser
def test_the_history_brings_an_edit_back_with_its_settings(ready: Visit) -> None:
    """A click on an earlier picture shows it beside its original, and sets the controls as they were."""
    from playwright.sync_api import expect

    (first,) = ready.edit()
    ready.number("seed").fill("5")
    ready.number("steps").fill("3")
    ready.instruction.fill("make it red")
    ready.edit()
    ready.shelf.nth(1).click()
    expect(ready.instruction).to_have_value("make it blue")
    expect(ready.number("seed")).to_have_value("0")
    expect(ready.number("steps")).to_have_value("2")
    expect(ready.page.locator("#caption")).to_contain_text("make it blue · seed 0")
    assert apart(ready.sides()[1], first) == 0


@with_gradio
@with_browser
def test_reset_puts_everything_back_but_the_history(ready: Visit) -> None:
    """Picture, instruction, settings and result go; what was made stays on the shelf."""
    from playwright.sync_api import expect

    ready.number("seed").fill("5")
    ready.edit()
    ready.button("Reset")
    expect(ready.instruction).to_have_value("")
    expect(ready.number("seed")).to_have_value("0")
    expect(ready.page.locator("#picture img, #result img")).to_have_count(0)
    expect(ready.shelf).to_have_count(1)


@with_gradio
@with_browser
def test_what_is_wrong_is_said_in_one_line(visit: Visit, folder: Path) -> None:
    """A broken file, no picture, no instruction, no model: each is a sentence on the page, and no traceback."""
    from playwright.sync_api import expect

    visit.upload(folder / "broken.png")
    expect(visit.note).to_contain_text("the image cannot be decoded")
    expect(visit.page.locator("#picture img")).to_have_count(0)
    visit.instruction.fill("make it blue")
    visit.button("Edit")
    expect(visit.note).to_have_text("choose a picture")
    visit.upload(folder / "pictures" / "0.png")
    expect(visit.note).to_have_count(0)
    visit.instruction.fill(" ")
    visit.button("Edit")
    expect(visit.note).to_have_text('say what to change, such as "make it snowy"')
    visit.instruction.fill("make it blue")
    for seed, said in {"-1": "seed is -1,", "1e30": "seed is 1000000000000000"}.items():
        visit.number("seed").fill(seed)
        visit.button("Edit")
        expect(visit.note).to_contain_text(said)
    visit.choose()
    visit.button("Edit")
    expect(visit.note).to_have_text("choose a model")
    assert "Traceback" not in (folder / "log").read_text()


@with_gradio
@with_browser
def test_models_are_compared_and_one_that_is_missing_stops_no_other(
    ready: Visit, expected: Callable[..., Image.Image]
) -> None:
    """Each model's picture can stand beside the original or another's; the unknown model is named."""
    from playwright.sync_api import expect

    ready.choose(*MODELS)
    one, two = ready.edit(2)
    assert apart(one, expected("one")) == apart(two, expected("two")) == 0
    assert apart(one, two) > 0
    expect(ready.note).to_contain_text("not/there/yet is no model")
    assert apart(ready.sides()[1], one) == 0
    for place, (side, model) in enumerate([("left", "one"), ("right", "two")]):
        shown = ready.page.locator("#result img").nth(place)
        before = shown.get_attribute("src") or ""
        ready.page.locator(f"#{side} input").fill(model)
        ready.page.locator(f"#{side} input").press("Enter")
        expect(shown).not_to_have_attribute("src", before)
    assert [apart(*pair) for pair in zip(ready.sides(), (one, two), strict=True)] == [0, 0]


@with_gradio
@with_browser
def test_examples_and_pictures_that_browsers_cannot_show(visit: Visit, folder: Path) -> None:
    """The pictures of --image are there to try with --prompt; a TIFF is shown as what it is."""
    from playwright.sync_api import expect

    visit.page.locator("#examples tbody tr").nth(1).click()
    expect(visit.instruction).to_have_value("make it red")
    shown = visit.page.locator("#picture img")
    shown.wait_for()
    assert apart(visit.fetch(shown), Image.open(folder / "pictures" / "1.png")) == 0
    visit.button("Reset")
    expect(shown).to_have_count(0)
    visit.upload(folder / "picture.tif")
    expect(shown).to_have_attribute("src", re.compile(r"\.png$"))
    assert apart(visit.fetch(shown), Image.open(folder / "picture.tif")) == 0


@with_gradio
@with_browser
def test_two_sessions_take_turns(
    ready: Visit, browser: "Browser", server: str, folder: Path, expected: Callable[..., Image.Image]
) -> None:
    """Two people who press the button at once each get their own picture, and neither sees the other's."""
    with browser.new_context() as context:
        other = Visit(context.new_page(), server)
        other.prepare(folder / "pictures" / "0.png", "make it blue")
        for steps, session in {100: ready, 60: other}.items():
            session.number("steps").fill(str(steps))
            session.number("steps").press("Tab")
        ready.button("Edit")
        (theirs,), (mine,) = other.edit(), ready.made(1)
        assert apart(mine, expected(num_inference_steps=100)) == 0
        assert apart(theirs, expected(num_inference_steps=60)) == 0


@with_gradio
@with_browser
def test_nothing_leaves_this_machine(ready: Visit, server: str, ear: socket.socket) -> None:
    """Neither the browser nor the server asks anybody else for anything: no fonts, no counters, no versions."""
    ready.edit()
    assert any(request.endswith(".woff2") for request in ready.requests)
    assert not [request for request in ready.requests if not request.startswith((server, "data:", "blob:"))]
    with pytest.raises(BlockingIOError):
        ear.accept()


@with_gradio
def test_a_picture_that_nobody_uploaded_is_not_read(server: str, folder: Path) -> None:
    """The page's interface for programs takes no path of the server's own disk."""

    def ask(path: Path) -> str:
        value = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        head = {"Content-Type": "application/json"}
        address = f"{server}/gradio_api/call/check"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(address, json.dumps({"data": [value]}).encode(), head)
        event = json.load(direct.open(request))["event_id"]
        return direct.open(f"{address}/{event}").read().decode()

    (uploaded, *_) = (folder / "temporary").glob("ip2p-*/**/*.png")
    assert "event: complete" in ask(uploaded)
    assert "event: error" in ask(folder / "pictures" / "0.png")


@with_gradio
def test_the_end_removes_the_pictures(folder: Path, ear: socket.socket, tmp_path: Path) -> None:
    """A page that is told to stop exits well, and leaves nothing of the session behind."""
    with running(tmp_path, ear, "--model", str(folder / "one")) as (process, _):
        assert list((tmp_path / "temporary").glob("ip2p-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not list((tmp_path / "temporary").glob("ip2p-*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ui --model nope/nope/nope", "nope/nope/nope is no model"),
        ("--ui --model {folder}/one --port {taken}", "--port 0 takes any free port"),
        ("--ui --model {folder}/one --output out", "leave out --output"),
        ("--ui", "give --model"),
        ("--model {folder}/one --compare {folder}/two", "--compare is for --ui"),
    ],
)
@with_gradio
def test_what_keeps_the_page_from_opening_is_said_in_one_line(
    flags: str, said: str, folder: Path, ear: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown model, a port that is taken, flags that do not go together: one line, and status 2."""
    arguments = flags.format(folder=folder, taken=ear.getsockname()[1]).split()
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.slow
@with_gradio
def test_where_a_browser_is_required_its_absence_is_no_skip(tmp_path: Path) -> None:
    """CI says IP2P_BROWSER=required: without one the page's tests fail."""
    one = f"{__file__}::test_every_control_reaches_the_model"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}", one]
    environment = os.environ | {"PATH": "", "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path)}
    for required, expected in {"": "1 skipped", "required": "1 error"}.items():
        environment["IP2P_BROWSER"] = required
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert expected in process.stdout.splitlines()[-1]
        assert bool(process.returncode) == bool(required)


def test_without_gradio_the_page_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page is an extra: the command works without it, and names it where it is asked for."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--ui", "--model", "out"])
    assert capsys.readouterr().err == "ip2p-infer: --ui needs gradio: pip install gradio\n"
