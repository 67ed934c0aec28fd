"""Scores of edits against formulas written out here, with tiny real CLIP and ViT models."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, ViTConfig, ViTModel

import tiny
from ip2p.encode.base.errors import ModelError
from ip2p.encode.models.judge import Judge, clip_bytes
from ip2p.infer.score.metrics import Edit, measure, psnr

SIDE = 14  # of the pictures that the tiny models see
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Sizes at which no rounding of a size or of a margin is a matter of taste.
SIZES = [(40, 20), (20, 40), (28, 28)]


class Judges(NamedTuple):
    """Folders of a CLIP and a DINO, for the flags of those names."""

    clip: str
    dino: str


def tiny_judges(folder: Path, seed: int = 0) -> Judges:
    """Save a CLIP with its tokenizer and processor, and a ViT, both with random weights."""
    judges = Judges(str(folder / "clip"), str(folder / "dino"))
    tokens = tiny.tokenizer(folder / "vocabulary")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sight: dict[str, Any] = layers | {"image_size": SIDE, "patch_size": 7}
    text = layers | {
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=12)).save_pretrained(judges.clip)
        ViTModel(ViTConfig(**sight), add_pooling_layer=False).save_pretrained(judges.dino)
    tokens.save_pretrained(judges.clip)
    sizes: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**sizes).save_pretrained(judges.clip)
    return judges


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Judges:
    return tiny_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def judge(judges: Judges) -> Judge:
    return Judge(*judges)


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    """Three edits of three sizes with all that can be compared."""
    captions = [("a cat", "a red dog"), ("the house", "the house in snow"), ("day", "night")]
    return [
        Edit(tiny.picture(3 * n, size), tiny.picture(3 * n + 1, size), tiny.picture(3 * n + 2, size), texts)
        for n, (size, texts) in enumerate(zip(SIZES, captions, strict=True))
    ]


def pixels(
    image: Image.Image, short: int, mean: tuple[float, ...], std: tuple[float, ...], low: float = 0
) -> torch.Tensor:
    """(1, 3, SIDE, SIDE): the middle of the picture at that short side, its values from `low` to 1, normalized."""
    factor = short / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    values = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    values = (low + (1 - low) * values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)[None].float()


class ByHand:
    """The embeddings, one at a time, from the models' parts."""

    def __init__(self, judges: Judges, low: float = 0):
        self.clip, self.dino = CLIPModel.from_pretrained(judges.clip), ViTModel.from_pretrained(judges.dino)
        self.tokens: Any = tiny.tokenizer(Path(judges.clip).parent / "vocabulary")
        self.low = low

    def image(self, image: Image.Image) -> np.ndarray:
        seen = self.clip.vision_model(pixels(image, SIDE, CLIP_MEAN, CLIP_STD, self.low)).last_hidden_state[:, 0]
        return (self.clip.vision_model.post_layernorm(seen) @ self.clip.visual_projection.weight.T)[0].detach().numpy()

    def text(self, caption: str) -> np.ndarray:
        # The last token is the end of the text, where CLIP gathers what it says.
        read = self.clip.text_model(self.tokens(caption, return_tensors="pt").input_ids).last_hidden_state[0, -1]
        return (self.clip.text_projection.weight @ read).detach().numpy()

    def class_token(self, image: Image.Image) -> np.ndarray:
        seen = self.dino(pixels(image, SIDE * 256 // 224, DINO_MEAN, DINO_STD)).last_hidden_state
        return seen[0, 0].detach().numpy()


def angle(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / math.sqrt(one @ one) / math.sqrt(other @ other))


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / math.sqrt(vector @ vector)


@pytest.mark.parametrize("published", [False, True])
def test_every_score_follows_its_definition(judges: Judges, edits: list[Edit], published: bool) -> None:
    """Batched scores equal those of formulas applied to one picture at a time, also in the published range."""
    hand = ByHand(judges, low=-1 if published else 0)
    for edit, score in zip(edits, measure(Judge(*judges, published_range=published), edits), strict=True):
        assert edit.target is not None
        before, after = (hand.text(str(caption)) for caption in edit.captions)
        original, edited = hand.image(edit.original), hand.image(edit.edited)
        gap = torch.from_numpy(np.array(edit.edited)).float() - torch.from_numpy(np.array(edit.target)).float()
        expected = {
            "l1": gap.abs().mean().item() / 255,
            "l2": gap.square().mean().item() / 255**2,
            "psnr": 20 * math.log10(255 / gap.square().mean().sqrt().item()),
            "clip_i": angle(edited, hand.image(edit.target)),
            "dino": angle(hand.class_token(edit.edited), hand.class_token(edit.target)),
            "clip_t": angle(edited, after),
            "clip_direction": angle(unit(edited) - unit(original), unit(after) - unit(before)),
            "clip_image": angle(edited, original),
        }
        assert score == pytest.approx(expected, abs=1e-4)


def test_the_published_range_is_another_score(judges: Judges, judge: Judge, edits: list[Edit]) -> None:
    """The slip of the published metrics moves what CLIP sees in pictures, and nothing else."""
    right, slipped = (measure(kind, edits[:1])[0] for kind in (judge, Judge(*judges, published_range=True)))
    moved = {name for name, value in right.items() if abs(value - slipped[name]) > 1e-4}
    assert moved == {"clip_i", "clip_t", "clip_direction", "clip_image"}


def test_identical_pictures_score_0_0_infinity_and_1(judge: Judge, edits: list[Edit]) -> None:
    """A perfect edit of nothing has no error and full likeness; it goes in no direction."""
    same = edits[0].original
    (score,) = measure(judge, [Edit(same, same.copy(), same.copy(), edits[0].captions)])
    assert (score["l1"], score["l2"], score["psnr"]) == (0, 0, 60)
    assert [score[name] for name in ("clip_i", "dino", "clip_image")] == pytest.approx([1, 1, 1], abs=1e-9)
    assert score["clip_direction"] == 0


def test_an_edit_of_another_size_is_resized_to_its_target(judge: Judge) -> None:
    """As MagicBrush's evaluation does it: Pillow's own resize, to the target's size."""
    edited, target = tiny.picture(1, (40, 20)), tiny.picture(2, (20, 20))
    (score,) = measure(judge, [Edit(target, edited, target)])
    gap = np.asarray(edited.resize((20, 20)), np.int16) - np.asarray(target, np.int16)
    assert score["l1"] == pytest.approx(np.abs(gap).mean() / 255)


def test_what_cannot_be_compared_is_left_out(judge: Judge, edits: list[Edit]) -> None:
    """Without target and captions the likeness to the original remains."""
    original, edited, target, (_, after) = edits[0].original, edits[0].edited, edits[0].target, edits[0].captions
    assert measure(judge, [Edit(original, edited)])[0].keys() == {"clip_image"}
    assert measure(judge, [Edit(original, edited, captions=(None, after))])[0].keys() == {"clip_image", "clip_t"}
    of_target = {"l1", "l2", "psnr", "clip_i", "dino", "clip_image"}
    assert measure(judge, [Edit(original, edited, target)])[0].keys() == of_target


def test_what_lacks_a_model_is_left_out(judges: Judges, judge: Judge, edits: list[Edit]) -> None:
    """DINO is not loaded where CLIP is enough, nor either where pixels are; what is left is the same."""
    (whole,) = measure(judge, edits[:1])
    (seen,) = measure(Judge(judges.clip, None), edits[:1])
    assert seen == {name: value for name, value in whole.items() if name != "dino"}
    assert measure(None, edits[:1]) == [{name: whole[name] for name in ("l1", "l2", "psnr")}]
    sizes = [weight.nbytes for weight in CLIPModel.from_pretrained(judges.clip).parameters()]
    assert clip_bytes(judges.clip, None) == sum(sizes)


def test_long_captions_are_cut_as_clip_does(judge: Judge) -> None:
    """What stands beyond the 77 tokens that CLIP reads does not count, nor do its neighbors' lengths."""
    long = "the cat " * 60
    first, second, short = judge.read([long, long + "night", "a cat"])
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(short, judge.read(["a cat"])[0])


def without_a_weight(judges: Judges, folder: Path) -> str:
    """A copy of the ViT that has lost a weight."""
    model = ViTModel.from_pretrained(judges.dino, add_pooling_layer=False)
    weights = {name: value for name, value in model.state_dict().items() if "cls_token" not in name}
    model.save_pretrained(folder, state_dict=weights)
    return str(folder)


def test_models_of_another_kind_are_refused_in_one_line(judges: Judges, tmp_path: Path) -> None:
    """A missing folder, a swapped one, one without its tokenizer and one without a weight: the flag is named."""
    bare = tmp_path / "bare"
    CLIPModel.from_pretrained(judges.clip).save_pretrained(bare)
    wrong = {
        r"--clip_model \S+nowhere is no model: expected a folder or a Hub id": ("/nowhere", judges.dino),
        r"--clip_model \S+dino holds a model of type vit, expected clip": (judges.dino, judges.dino),
        r"--dino_model \S+clip holds a model of type clip, expected vit": (judges.clip, judges.clip),
        r"--clip_model \S+bare cannot be loaded: ": (str(bare), judges.dino),
        r"--dino_model no/where cannot be loaded: ": (judges.clip, "no/where"),
        r"--dino_model \S+ is damaged: it lacks the weights embeddings.cls_token": (
            judges.clip,
            without_a_weight(judges, tmp_path / "vit"),
        ),
    }
    for message, names in wrong.items():
        with pytest.raises(ModelError, match=message) as caught:
            Judge(*names)
        assert "\n" not in str(caught.value)


def test_psnr_follows_its_definition() -> None:
    """A difference of 16 levels everywhere is 20 log10(255 / 16) dB; equal pictures are infinitely near."""
    dark, light = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (4, 4), (116, 116, 116))
    assert psnr(dark, light) == pytest.approx(24.048, abs=1e-3)
    assert psnr(dark, dark) == 60
