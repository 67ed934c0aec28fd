"""Tests of what happens to samples that cannot be encoded: each stands aside with its reason, the rest goes on."""

import io
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from diffusers import AutoencoderKL
from PIL import Image

import fakes
import tiny
from ip2p.encode.cache import format as layout
from ip2p.encode.cache.format import Cache, Unit
from ip2p.encode.cache.reader import Reader
from ip2p.encode.data.pairs import Pair
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.encode.models.encoders import Encoders
from ip2p.train.data.batches import Samples

Encode = Callable[..., None]


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file in memory."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def claim(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is of any size."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BLACK = file(Image.new("RGB", (24, 20)))  # on which the VAE fails, see below
GOOD = file(tiny.picture(0))
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "truncated": ({"input_image": file(tiny.picture(1, (64, 64)), "JPEG")[:-300]}, "cannot be decoded .*truncated"),
    "zero bytes": ({"edited_image": b""}, "the image is empty"),
    "not an image": ({"input_image": b"<html>not found</html>"}, "cannot be decoded .*not an image"),
    "bomb": ({"edited_image": claim(20_000, 20_000)}, "cannot be decoded .*decompression bomb"),
    "zero-sized": ({"input_image": claim(0, 7)}, "cannot be decoded"),
    "no original": ({"input_image": None}, "the original image is missing"),
    "no edited": ({"edited_image": None}, "the edited image is missing"),
    "empty instruction": ({"edit_prompt": "  \n"}, "the instruction is empty"),
    "no instruction": ({"edit_prompt": None}, "the instruction is NoneType, expected text"),
    "not finite": ({"edited_image": BLACK}, "not finite"),
}


def write(folder: Path, samples: list[dict[str, Any]]) -> Path:
    """A dataset of samples whose images are given as file contents."""
    columns = ("input_image", "edited_image", "edit_prompt")
    wrapped = [
        {
            name: {"bytes": sample[name], "path": None} if isinstance(sample[name], bytes) else sample[name]
            for name in columns
        }
        for sample in samples
    ]
    return tiny.dataset(folder, {name: [sample[name] for sample in wrapped] for name in columns})


def good(number: int) -> dict[str, Any]:
    return {
        "input_image": file(tiny.picture(2 * number)),
        "edited_image": file(tiny.picture(2 * number + 1)),
        "edit_prompt": f"make it {tiny.WORDS[number % 17]}",
    }


def broken(kinds: list[str]) -> list[dict[str, Any]]:
    """Broken samples, each different from all others."""
    return [good(100 + n) | BROKEN[kind][0] for n, kind in enumerate(kinds)]


@pytest.fixture
def black_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that gives infinity for black pictures, in float32 too."""

    def moments(self: Encoders, pixels: torch.Tensor, original: Any = Encoders.moments) -> Callable[[], torch.Tensor]:
        black = pixels.flatten(1).amax(dim=1) == 0
        finish = original(self, pixels)
        return lambda: finish().masked_fill(black[:, None, None, None], torch.inf)

    monkeypatch.setattr(Encoders, "moments", moments)


@pytest.mark.usefixtures("black_fails")
def test_ten_kinds_of_broken_samples_stand_aside_and_all_others_are_usable(
    sd: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run succeeds, names a reason for each broken sample, and the good ones are as if alone."""
    goods, bads = [good(n) for n in range(12)], broken(list(BROKEN))
    mixed = [sample for pair in zip(goods, bads, strict=False) for sample in pair] + goods[10:]
    encode(sd, write(tmp_path / "mixed", mixed), tmp_path / "cache", random_flip=True, encode_batch_size=3)
    said = capsys.readouterr().out
    encode(sd, write(tmp_path / "goods", goods), tmp_path / "expected", random_flip=True, encode_batch_size=3)

    samples = Cache.open(tmp_path / "cache").samples().to_pylist()
    aside = [sample for sample in samples if sample["status"] == "quarantined"]
    assert [sample["position"] for sample in aside] == list(range(1, 20, 2))
    assert "encoded 12 samples" in said
    assert "10 samples stand aside" in said
    for sample, (_, reason) in zip(aside, BROKEN.values(), strict=True):
        assert re.search(reason, sample["reason"]), sample["reason"]
        assert f"x {sample['reason']}" in said

    usable, expected = (everything(tmp_path / name) for name in ("cache", "expected"))
    assert usable.keys() == expected.keys()
    assert len(usable) == 12
    for key, arrays in expected.items():
        for name, values in arrays.items():
            np.testing.assert_allclose(usable[key][name], values, rtol=2**-9, atol=1e-3)


def everything(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """All numbers of each usable sample, read as training reads them."""
    cache = Cache.open(folder)
    cache.check_files()
    reader, samples = Reader(cache), Samples.of(cache, None)
    keys = [sample["key"] for sample in cache.samples().to_pylist() if sample["status"] == "ok"]
    found: dict[str, dict[str, np.ndarray]] = {key: {} for key in keys}
    for view, name in enumerate(cache.views):
        out = {part: np.empty((len(keys), *array.row_shape), np.float16) for part, array in reader.arrays.items()}
        reader.take(out, samples.rows, np.full(len(keys), view), samples.text_rows)
        for n, key in enumerate(keys):
            found[key] |= {f"{part} {name}": values[n].astype(np.float32) for part, values in out.items()}
    return found


@pytest.mark.usefixtures("black_fails")
@pytest.mark.parametrize("kind", BROKEN)
def test_on_error_fail_stops_at_the_broken_sample_and_names_it(
    kind: str, sd: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the key and the reason, status 2; without the flag the same cache is then finished."""
    data = write(tmp_path / "data", [good(0), *broken([kind]), good(1)])
    with pytest.raises(SystemExit) as stopped:
        encode(sd, data, tmp_path / "cache", on_error="fail")
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    encode(sd, data, tmp_path / "cache")
    (sample,) = (s for s in Cache.open(tmp_path / "cache").samples().to_pylist() if s["status"] != "ok")
    assert f"sample {sample['key']}: {sample['reason']}" in message
    assert sample["position"] == 1


def test_on_error_fail_stops_for_a_sample_that_stood_aside_earlier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier run set aside is not passed over in silence."""
    source = fakes.Pairs([Pair(GOOD, b"", "x"), Pair(GOOD, GOOD, "x")])
    fakes.install(monkeypatch, source, 4)
    fakes.encode(tmp_path / "cache")
    with pytest.raises(Exception, match=r"sample [0-9a-f]{32}: the image is empty"):
        fakes.encode(tmp_path / "cache", on_error="fail")


def test_retry_quarantined_tries_again_only_what_stood_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be encoded now becomes ok, what cannot keeps its reason, and nothing else is touched or encoded."""
    pairs = [Pair(fakes.png(n), fakes.png(n + 1), f"instruction {n % 3}") for n in range(6)]
    pairs[2] = pairs[2]._replace(edited=b"torn")
    source = fakes.Pairs(pairs)
    fakes.install(monkeypatch, source, 4)
    bad = fakes.content(fakes.view(fakes.png(4), False))

    def moments(
        self: fakes.Encoders, pixels: torch.Tensor, original: Any = fakes.Encoders.moments
    ) -> Callable[[], torch.Tensor]:
        failing = torch.tensor([fakes.content(image) == bad for image in pixels])
        finish = original(self, pixels)
        return lambda: finish().masked_fill(failing[:, None, None, None], torch.nan)

    def statuses() -> list[str]:
        return Cache.open(tmp_path / "cache").samples()["status"].to_pylist()

    with monkeypatch.context() as patch:
        patch.setattr(fakes.Encoders, "moments", moments)
        fakes.encode(tmp_path / "cache", random_flip=True)
    assert statuses() == ["ok", "ok", "quarantined", "quarantined", "quarantined", "ok"]
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("c/**/*")}

    fakes.Encoders.log.clear()
    fakes.encode(tmp_path / "cache", random_flip=True)
    assert fakes.Encoders.log == []
    fakes.encode(tmp_path / "cache", random_flip=True, retry_quarantined=True)
    assert set(fakes.Encoders.log) == {fakes.seen(pairs[n], flip) for n in (3, 4) for flip in (False, True)}
    assert statuses() == ["ok", "ok", "quarantined", "ok", "ok", "ok"]
    assert "not an image" in Cache.open(tmp_path / "cache").samples()["reason"][2].as_py()
    assert shards.items() <= {path: path.stat().st_mtime_ns for path in shards}.items()

    fakes.Encoders.log.clear()
    fakes.encode(tmp_path / "cache", random_flip=True)
    assert fakes.Encoders.log == []
    assert statuses() == ["ok", "ok", "quarantined", "ok", "ok", "ok"]


def test_retry_quarantined_looks_again_for_images_that_were_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A network disk that failed while the dataset was read leaves the dataset what it was."""
    source = fakes.Pairs([Pair(None, GOOD, "x"), Pair(GOOD, GOOD, "x")])
    fakes.install(monkeypatch, source, 4)
    monkeypatch.setattr(fakes.Pairs, "fingerprint", lambda _: "always the same")
    fakes.encode(tmp_path / "cache")
    source[0] = Pair(fakes.png(1), GOOD, "x")
    found = []
    for retry in (False, True):
        fakes.encode(tmp_path / "cache", retry_quarantined=retry)
        found.append(Cache.open(tmp_path / "cache").samples()["status"].to_pylist())
    assert found == [["quarantined", "ok"], ["ok", "ok"]]


def test_an_instruction_that_is_not_finite_sets_its_samples_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All samples with that instruction stand aside; the pair stays usable with another one."""
    source = fakes.Pairs([Pair(GOOD, GOOD, "fine"), Pair(GOOD, GOOD, "broken")])
    fakes.install(monkeypatch, source, 4)

    def embed(self: fakes.Encoders, prompts: list[str]) -> Callable[[], tuple[torch.Tensor, None]]:
        text = [fakes.text(prompt) + (torch.inf if prompt == "broken" else 0) for prompt in prompts]
        return lambda: (torch.stack(text), None)

    monkeypatch.setattr(fakes.Encoders, "embed", embed)
    fakes.encode(tmp_path / "cache")
    samples = Cache.open(tmp_path / "cache").samples().to_pylist()
    assert [sample["status"] for sample in samples] == ["ok", "quarantined"]
    assert "not finite" in samples[1]["reason"]


def changed_vae(sd: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    """A copy of a checkpoint whose VAE has other weights."""
    shutil.copytree(sd, folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        change(vae)
    vae.save_pretrained(folder / "vae")
    return folder


def test_what_half_precision_cannot_hold_is_encoded_in_float32(
    sd: Path, data: Path, tmp_path: Path, encode: Encode
) -> None:
    """A VAE whose activations overflow in float16 still gives what float32 gives."""
    model = changed_vae(sd, tmp_path / "sd", lambda vae: vae.encoder.conv_in.weight.mul_(1e5))
    half: Any = AutoencoderKL.from_pretrained(model / "vae", dtype=torch.float16)
    with torch.no_grad():
        assert not half.encode(torch.ones(1, 3, 16, 16, dtype=torch.float16)).latent_dist.mean.isfinite().all()
    encode(model, data, tmp_path / "half", mixed_precision="fp16")
    encode(model, data, tmp_path / "single")
    found, expected = (everything(tmp_path / name) for name in ("half", "single"))
    assert len(found) == 10
    for key, arrays in expected.items():
        np.testing.assert_allclose(found[key]["edited plain"], arrays["edited plain"], rtol=2**-9, atol=1e-3)


def test_what_overflows_in_a_batch_in_flight_alone_is_encoded_again(sd: Path, tmp_path: Path) -> None:
    """With the next batch begun already, float32 replaces what overflowed, and the rest stays bit for bit."""
    model = changed_vae(sd, tmp_path / "sd", lambda vae: vae.encoder.conv_in.weight.mul_(1e5))
    encoders = Encoders(Checkpoint(model), torch.device("cpu"), torch.float16, torch.float16)
    gray, white = (torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (128, 255))
    batches = [torch.cat([gray, white, gray]), torch.cat([white, gray])]
    begun = [encoders.moments(batch) for batch in batches]
    for batch, finish in zip(batches, begun, strict=True):
        expected, bad = encoders._moments(encoders.vae, batch), (batch == white).flatten(1).all(dim=1)
        assert expected[~bad].isfinite().all()
        assert not expected[bad].isfinite().all()
        expected[bad] = encoders._moments(encoders._float32_vae, white)
        assert torch.equal(finish(), expected)


def test_what_float32_cannot_give_either_is_never_stored(
    sd: Path, data: Path, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """A VAE that overflows always leaves no sample, an exit without an error, and no infinity in the arrays."""
    model = changed_vae(sd, tmp_path / "sd", lambda vae: vae.quant_conv.bias.fill_(1e6))
    encode(model, data, tmp_path / "cache", mixed_precision="fp16")
    assert "10 x the encoding is not finite" in capsys.readouterr().out
    group: Any = zarr.open_group(tmp_path / "cache" / "data.zarr", mode="r")
    assert np.isnan(group["edited"][:]).all()


def test_pictures_that_only_look_odd_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An animation shows its first frame; palettes, gray, transparency and 16 bits are pictures as well."""
    first, second = tiny.picture(0), tiny.picture(1)
    files = [
        file(first, "GIF", save_all=True, append_images=[second]),
        file(first, "WEBP", save_all=True, append_images=[second]),
        file(first.convert("P")),
        file(first.convert("LA")),
        file(first.convert("L").convert("I").convert("I;16")),
        file(first.convert("CMYK"), "JPEG"),
    ]
    fakes.install(monkeypatch, fakes.Pairs(Pair(content, GOOD, "x") for content in files), 4)
    fakes.encode(tmp_path / "cache")
    assert set(Cache.open(tmp_path / "cache").samples()["status"].to_pylist()) == {"ok"}


def test_pillows_suspicion_of_a_bomb_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A picture above Pillow's limit stands aside, though Pillow itself refuses only twice as much."""
    fakes.install(monkeypatch, fakes.Pairs([Pair(claim(9500, 9500), GOOD, "x")]), 4)
    fakes.encode(tmp_path / "cache")
    assert "decompression bomb" in Cache.open(tmp_path / "cache").samples()["reason"][0].as_py()


def test_shards_stay_dense_where_whole_chunks_stand_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A chunk without numbers is written all the same, so that the shard can still be mapped into memory."""
    monkeypatch.setitem(layout.CHUNK_ROWS, "images", 2)
    broken = [Pair(b"torn" + bytes([n]), GOOD, "x") for n in range(2)]
    fakes.install(monkeypatch, fakes.Pairs([*broken, Pair(GOOD, fakes.png(1), "x"), Pair(GOOD, fakes.png(2), "x")]), 4)
    fakes.encode(tmp_path / "cache")
    record = Cache.open(tmp_path / "cache").commits()[Unit("images", 0)]
    sizes = [entry["bytes"] for entry in record.files.values()]
    assert sizes == [4 * 2 * channels * 4 * 4 + 2 * 16 + 4 for channels in (4, 8)]  # rows, then the index of 2 chunks


def test_reasons_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing accidental, such as an address in memory, stands in a reason."""
    fakes.install(monkeypatch, fakes.Pairs([Pair(b"<html>", GOOD, "x"), Pair(GOOD, claim(3, 3), "x")]), 4)
    reasons = []
    for name in ("first", "second"):
        fakes.encode(tmp_path / name)
        reasons.append(Cache.open(tmp_path / name).samples()["reason"].to_pylist())
    assert reasons[0] == reasons[1]
