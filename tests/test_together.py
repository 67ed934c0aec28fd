"""Tests of all that a cache can hold and a run can ask of it, at once: shapes, masks, columns, instructions alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny
from ip2p.encode.cache.format import Cache
from ip2p.encode.keeper.__main__ import main as keeper
from ip2p.encode.keeper.verify import verify
from ip2p.train.__main__ import main
from test_masks import edit, white
from test_train import assert_same, flags, states

Encode = Callable[..., None]
SIZES = ((24, 24), (40, 20), (20, 40))
RUN: dict[str, object] = {"train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 3, "edit_weight": 3}
RUN |= {"keep": "score > 2", "num_validation_samples": 2, "validation_steps": 3, "seed": 4}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_everything_goes_together(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on such a cache resumes bit for bit, and trains the same where the cache lies elsewhere."""
    model = request.getfixturevalue(family)
    table = tiny.pairs(18, sizes=SIZES)
    table["mask_image"] = [white(edit(picture.size, n)) for n, picture in enumerate(table["input_image"])]
    table["score"] = [float(n) for n in np.arange(18) % 9]
    data, cache = tiny.dataset(tmp_path / "data", table), tmp_path / "cache"
    shapes = {"resolution": 32, "bucket_step": 8, "resize_mode": "random_crop", "crops": 2, "random_flip": True}
    encode(model, data, cache, **shapes, mask_column="mask_image", keep_columns=["score"], cache_text=False)
    assert not verify(cache)
    assert len({(row["height"], row["width"]) for row in Cache.open(cache).samples().to_pylist()}) == 3
    main(flags(model, cache, tmp_path / "whole", **RUN))
    assert "--keep" in capsys.readouterr().out
    main(flags(model, cache, tmp_path / "again", **RUN, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3"))
    assert not keeper(["push", str(cache), f"memory://{family}/cache"])
    main(flags(model, f"memory://{family}/cache", tmp_path / "afar", **RUN, window_dir=tmp_path / "window"))
    expected = states(tmp_path / "whole" / "checkpoint-6")
    for other in ("again", "afar"):
        assert_same(states(tmp_path / other / "checkpoint-6"), expected)
