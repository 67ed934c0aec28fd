"""Somebody who uses the page of `ip2p-infer --ui`: the server in a process, a session in a browser."""

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

MODELS = ("one", "two", "not/there/yet")


@contextlib.contextmanager
def running(folder: Path, ear: socket.socket, *flags: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server of the page in a process of its own, with its address; it leaves `log` and `temporary` in `folder`."""
    (folder / "temporary").mkdir()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), f"http://127.0.0.1:{ear.getsockname()[1]}")
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= proxies | {"TMPDIR": str(folder / "temporary")}
    del environment["HF_HUB_OFFLINE"]  # which would hide an attempt to reach out
    command = [sys.executable, "-m", "ip2p.infer", "--ui", "--port", "0", "--num_inference_steps", "2", *flags]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert address, said + (folder / "log").read_text()
            yield process, address[0]
        finally:
            process.kill()


class Visit:
    """A session in the browser, of somebody who works with the model `one`."""

    def __init__(self, page: "Page", server: str) -> None:
        self.page = page
        self.requests: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(server)
        self.choose("one")

    def choose(self, *models: str) -> None:
        for name in MODELS:
            self.page.locator("#models").get_by_label(name, exact=True).set_checked(name in models)

    def upload(self, file: Path) -> None:
        self.page.locator("#picture input[type=file]").set_input_files(file)

    def cover(self, mask: Path) -> None:
        self.page.locator("#mask input[type=file]").set_input_files(mask)
        self.page.locator("#mask img").wait_for()

    def prepare(self, file: Path, instruction: str) -> None:
        self.upload(file)
        self.page.locator("#picture img").wait_for()
        self.instruction.fill(instruction)

    def number(self, name: str) -> "Locator":
        return self.page.locator(f"#{name} input[type=number]")

    def button(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    @property
    def instruction(self) -> "Locator":
        return self.page.locator("#instruction textarea")

    @property
    def note(self) -> "Locator":
        return self.page.locator("#note [role=alert]")

    @property
    def shelf(self) -> "Locator":
        return self.page.locator("#history button img")

    def edit(self, pictures: int = 1) -> list[Image.Image]:
        """Press the button, wait for so many more pictures, and give all of the history, the newest first."""
        before = self.shelf.count()
        self.button("Edit")
        return self.made(before + pictures)

    def made(self, count: int) -> list[Image.Image]:
        """The history, once it holds `count` pictures."""
        from playwright.sync_api import expect

        expect(self.shelf).to_have_count(count)
        return [self.fetch(image) for image in self.shelf.all()]

    def fetch(self, image: "Locator") -> Image.Image:
        address = image.get_attribute("src")
        assert address
        return Image.open(io.BytesIO(self.page.request.get(address).body()))

    def sides(self) -> list[Image.Image]:
        """What the slider shows, left and right."""
        from playwright.sync_api import expect

        images = self.page.locator("#result img")
        expect(images).to_have_count(2)
        return [self.fetch(image) for image in images.all()]
