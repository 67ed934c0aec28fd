"""Tests of train/watch/frozen.py: what a picture takes beside a UNet, and text encoders that are gone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ip2p.encode.models.checkpoint import Checkpoint
from ip2p.infer import Editor
from ip2p.train.memory import Live, Shapes, as_on_cuda
from ip2p.train.save.pipeline import make_pipeline
from ip2p.train.unet.weights import Precision
from ip2p.train.watch.frozen import TILE, Frozen, encode, load_vae, simulate_picture, spare

CPU = torch.device("cpu")


def test_a_picture_takes_what_is_simulated(sd: Path) -> None:
    """Within 2 % of all that is alive while one is really edited, with a VAE that is no smaller than its pictures."""
    base, unet, vae = Checkpoint(sd), tiny.unet(8, sample_size=32).eval(), tiny.vae((128, 128)).eval()
    frozen = Frozen(dict(vae.config), Frozen.of(base).texts, vae_overflows=True)
    shapes, precision = Shapes((8, 32, 32), (77, 16)), Precision("no", copies=False)
    found = simulate_picture(frozen, dict(unet.config), shapes, precision, norms=False)
    parts = {**encode(base, ["", "make it red"], CPU, torch.float32), "vae": spare(vae, tiles=False)}
    pipeline = make_pipeline(unet, base.scheduler(), base, parts)
    pipeline.set_progress_bar_config(disable=True)
    weights = [*vae.parameters(), *unet.parameters()]
    with Live(weights) as live, as_on_cuda(), torch.no_grad():
        Editor(pipeline).edit(
            tiny.picture(0, (64, 64)), "make it red", num_inference_steps=2, num_images=2, batch_size=1
        )
    assert found == pytest.approx(live.most + sum(weight.nbytes for weight in vae.parameters()), rel=0.02)


def test_where_text_encoders_are_the_largest_they_count(sd: Path) -> None:
    """In float16, one after the other, without the VAE."""
    base, text = Checkpoint(sd), dict(Frozen.of(Checkpoint(sd)).texts[0]) | {"vocab_size": 10**6}
    found = [
        simulate_picture(
            Frozen.of(base)._replace(texts=texts),
            dict(tiny.unet(8).config),
            Shapes((8, 8, 8), (77, 16)),
            Precision("no", copies=False),
            norms=True,
        )
        for texts in ((text,), (text, text))
    ]
    assert found[0] > 2 * 16 * 10**6
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_larger_pictures_go_through_the_vae_in_tiles(sd: Path) -> None:
    """On a GPU, whose memory they would not fit; those of the size of a tile are one."""
    vae, tiles = load_vae(Checkpoint(sd), CPU), list[Any]()
    assert not vae.use_tiling
    spare(vae, tiles=True)
    vae.decoder.register_forward_pre_hook(lambda _, given: tiles.append(given[0].shape))
    with torch.device("meta"), torch.no_grad():
        vae = vae.to("meta")
        for side in (TILE, 2 * TILE):
            tiles.clear()
            vae.decode(torch.empty(1, 4, side // 2, 8))
            assert len(tiles) == (1 if side == TILE else 3)


def test_half_precision_takes_and_makes_pictures_of_float32(sd: Path) -> None:
    """Whatever calls a VAE in it need not know."""
    vae = spare(Checkpoint(sd).network("vae", torch.bfloat16), tiles=False)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode()
        assert vae.decode(latents.float()).sample.shape == (1, 3, 16, 16)
