"""A source and encoders that cost next to nothing, so that hundreds of encodes run in seconds."""

import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tiny
from configs import encode_config
from ip2p.encode import run
from ip2p.encode.cache import format as cache
from ip2p.encode.cache.format import View
from ip2p.encode.data.pairs import Pair
from ip2p.encode.geometry import Geometry
from ip2p.encode.models import encoders as models

RESOLUTION = 8
SQUARES = Geometry(RESOLUTION, "squash", "white")


@functools.cache
def png(number: int) -> bytes:
    """The file of a picture of 12 by 8 pixels."""
    file = io.BytesIO()
    tiny.picture(number, (12, 8)).save(file, "PNG")
    return file.getvalue()


class Pairs(list[Pair]):
    """A dataset in memory."""

    name, columns, masks = "fake", ("input_image", "edited_image", "edit_prompt"), False

    def group(self, _: int) -> None:
        """Every instruction is a prompt of its own."""

    def fingerprint(self) -> str:
        """Identity of all that it holds."""
        return hashlib.blake2b(repr(list(self)).encode()).hexdigest()


class Checkpoint:
    """A checkpoint of no weights, whose VAE halves the side."""

    vae_scale_factor, latent_channels, tokenizers, is_sdxl = 2, 4, (), False

    def identity(self) -> dict[str, Any]:
        """What the manifest records."""
        return {"vae": "fake"}

    def vae_precision(self, asked: str | None, mixed: str) -> str:
        """The precision of the VAE."""
        return asked or mixed

    def prediction_type(self) -> str:
        """What the UNet predicts."""
        return "epsilon"

    def text_shape(self) -> tuple[int, int, int | None]:
        """Length and width of an encoded instruction, and no pooled one."""
        return 2, 8, None


class Encoders:
    """Means of 2 by 2 pixels for latents, a hash for text.

    Attributes:
        log: what was encoded, in order: pairs as `seen` names them, and instructions.
    """

    device = torch.device("cpu")
    log: ClassVar[list[object]] = []

    def __init__(self, *_: object):
        pass

    def before(self) -> None:
        """Replaced where something shall happen before each batch."""

    def moments(self, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """(B, 3, H, W) uint8 to (B, 8, H / 2, W / 2) float16."""
        self.before()
        self.log.extend(zip(map(content, pixels[::2]), map(content, pixels[1::2]), strict=True))
        return lambda: moments(pixels)

    def embed(self, prompts: Sequence[str]) -> Callable[[], tuple[torch.Tensor, None]]:
        """Text (B, 2, 8) float16."""
        self.before()
        self.log.extend(prompts)
        return lambda: (torch.stack([text(prompt) for prompt in prompts]), None)


def moments(pixels: torch.Tensor) -> torch.Tensor:
    """What the fake VAE makes of (B, 3, H, W) pixels."""
    small = torch.nn.functional.avg_pool2d(pixels.float() / 255, 2)
    return torch.cat([small, 2 * small, small[:, :2] - 1], dim=1).half()


def text(prompt: str) -> torch.Tensor:
    """What the fake text encoder makes of an instruction."""
    return torch.tensor(list(hashlib.blake2b(prompt.encode(), digest_size=16).digest())).half().reshape(2, 8)


def content(pixels: torch.Tensor) -> bytes:
    """Identity of a resized picture."""
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=8).digest()


@functools.cache
def view(file: bytes, flip: bool) -> torch.Tensor:
    """The pixels (3, H, W) that the encoders shall see of a file."""
    pixels, _ = SQUARES.read([file, file], "", [View(None, flip)])
    return torch.from_numpy(pixels[0, 0])


def seen(pair: Pair, flip: bool) -> tuple[bytes, bytes]:
    """How the log of the encoders names a pair."""
    return content(view(pair.original or b"", flip)), content(view(pair.edited or b"", flip))


def install(monkeypatch: pytest.MonkeyPatch, source: Pairs, rows: int) -> None:
    """Let `run.encode` take `source` and the fakes, and write `rows` rows into a shard."""
    monkeypatch.setattr(run, "open_pairs", lambda *_: source)
    monkeypatch.setattr(run, "find_checkpoint", lambda *_, **__: Checkpoint())
    monkeypatch.setattr(models, "Encoders", Encoders)
    monkeypatch.setattr(cache, "SHARD_ROWS", rows)
    Encoders.log.clear()


def encode(folder: Path, **flags: Any) -> None:
    """Run the whole encode in this process."""
    options: dict[str, Any] = {"resolution": RESOLUTION, "dataloader_num_workers": 0} | flags
    run.encode(encode_config("fake", folder, dataset_name="fake", **options))
