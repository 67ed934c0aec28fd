"""Embeds pictures and captions as CLIP and DINO see them, and says how alike they are."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..base.errors import ModelError, explained
from ..base.files import content_key
from .checkpoint import find_device
from .hub import is_place
from .weights import hash_tensors

Captions = tuple[str | None, str | None]
"""Of the original and of the edited picture, None where there is none."""
SEEN = "size crop_size resample rescale_factor image_mean image_std do_resize do_center_crop do_rescale do_normalize"
"""What decides what CLIP sees of a picture: attributes of its image processor."""


class Judge:
    """CLIP and DINO, in float32.

    Args:
        clip: folder or Hub id of a CLIP with its tokenizer and image processor.
        dino: folder or Hub id of a ViT that DINO trained; None where CLIP is enough.
        device: "cuda", "mps", "cpu" …; default: the accelerator if there is one.
        published_range: show CLIP pixels from -1 to 1 instead of 0 to 1. The original project's metrics do:
            `metrics/compute_metrics.py` hands pictures from -1 to 1 to a module that expects 0 to 1.
        cache_dir: where downloads are kept; default: the Hub's own cache.

    Raises:
        ModelError: a model cannot be loaded, or is of another kind.
    """

    def __init__(
        self,
        clip: str,
        dino: str | None,
        device: str | None = None,
        published_range: bool = False,
        cache_dir: Path | None = None,
    ):
        self.device, self.cache_dir = find_device(device), cache_dir
        self.clip = self._model("clip_model", clip, CLIPModel)
        self.tokenizer = _load("clip_model", clip, AutoTokenizer, cache_dir)
        self.clip_processor = _load("clip_model", clip, CLIPImageProcessorPil, cache_dir)
        if published_range:  # pixels are scaled before the mean is taken away: 2x - 1 - mean
            self.clip_processor.rescale_factor *= 2
            self.clip_processor.image_mean = [1 + mean for mean in self.clip_processor.image_mean]
        self.dino: Any = self._model("dino_model", dino, ViTModel, add_pooling_layer=False) if dino else None
        if not dino:
            return
        # As DINO's own evaluation and MagicBrush's: the short side to 256, of which the middle 224.
        side = self.dino.config.image_size
        self.dino_processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": side * 8 // 7},
            crop_size={"height": side, "width": side},
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )

    @functools.cached_property
    def identity(self) -> str:
        """Hash of all that CLIP's embeddings depend on: its weights, the tokenizer, what is made of pictures."""
        weights = hash_tensors((name, tensor.cpu()) for name, tensor in self.clip.state_dict().items())
        seen = {name: getattr(self.clip_processor, name) for name in SEEN.split()}
        seen |= {name: dict(seen[name]) for name in ("size", "crop_size")}
        rest = json.dumps([self.tokenizer.get_vocab(), seen], sort_keys=True)
        return content_key(weights.encode(), rest.encode())

    def see(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """CLIP's embeddings (B, d) of RGB pictures."""
        return self.embed(self.clip_processor(list(pictures), return_tensors="pt")["pixel_values"])

    @torch.inference_mode()
    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """CLIP's embeddings (B, d) of what its processor makes of pictures, (B, 3, H, W)."""
        return self.clip.get_image_features(pixels.to(self.device)).pooler_output.cpu()

    @torch.inference_mode()
    def read(self, captions: Sequence[str]) -> torch.Tensor:
        """CLIP's embeddings (B, d) of captions, cut where they are longer than it can read."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.device)).pooler_output.cpu()

    def compare(
        self, original: torch.Tensor, edited: torch.Tensor, captions: Sequence[Captions]
    ) -> dict[str, list[float | None]]:
        """How alike pictures before and after an edit are to each other and to their captions, by CLIP.

        As in the InstructPix2Pix paper (arXiv 2211.09800, section 4.2 and `metrics/clip_similarity.py`) and, the first
        of them, in MagicBrush (arXiv 2306.10012, section 4.1):

        - `clip_t`: cosine similarity of the edited picture and its caption.
        - `clip_direction`: cosine similarity between the change of the picture and the change of its caption, 0
          where either does not change.
        - `clip_image`: cosine similarity of the original and the edited picture.

        Args:
            original, edited: embeddings (B, d) of the pictures.
            captions: of each of the B pairs; scores that need one that is None are None.
        """
        scores: dict[str, list[float | None]] = {name: [None] * len(captions) for name in ("clip_t", "clip_direction")}
        told = [n for n, (_, after) in enumerate(captions) if after is not None]
        both = [n for n in told if captions[n][0] is not None]
        if told:
            after = torch.zeros_like(edited)
            after[told] = self.read([captions[n][1] or "" for n in told])
            for n, value in zip(told, self.similarity(edited[told], after[told]), strict=True):
                scores["clip_t"][n] = value
            if both:
                change = _unit(after[both]) - _unit(self.read([captions[n][0] or "" for n in both]))
                seen = _unit(edited[both]) - _unit(original[both])
                for n, value in zip(both, self.similarity(seen, change), strict=True):
                    scores["clip_direction"][n] = value
        scores["clip_image"] = [*self.similarity(original, edited)]
        return scores

    @staticmethod
    def similarity(one: torch.Tensor, other: torch.Tensor) -> list[float]:
        """Cosines of B pairs of embeddings (B, d); in float64, so that equal ones give 1."""
        return cosine_similarity(one.double(), other.double()).tolist()

    @torch.inference_mode()
    def see_dino(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """DINO's embeddings (B, d) of RGB pictures: the class token behind the last norm."""
        pixels = self.dino_processor(list(pictures), return_tensors="pt")
        return self.dino(**pixels.to(self.device)).last_hidden_state[:, 0].cpu()

    def _model(self, flag: str, name: str, kind: Any, **options: Any) -> Any:
        _config(flag, name, kind, self.cache_dir)
        options |= {"dtype": torch.float32, "output_loading_info": True}
        model, found = _load(flag, name, kind, self.cache_dir, **options)
        if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
            raise ModelError(f"--{flag} {name} is damaged: it lacks the weights {missing[0]}")
        return model.to(self.device).eval()


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.double() / vectors.double().norm(dim=1, keepdim=True)


@functools.cache
def clip_bytes(name: str, cache_dir: Path | None) -> int:
    """Bytes of a CLIP's weights in float32, by its configuration alone; raises as `Judge` does."""
    config = _config("clip_model", name, CLIPModel, cache_dir)
    with torch.device("meta"):
        return sum(weight.nbytes for weight in CLIPModel(config).float().parameters())


def _config(flag: str, name: str, kind: Any, cache_dir: Path | None) -> Any:
    config, expected = _load(flag, name, AutoConfig, cache_dir), kind.config_class.model_type
    if config.model_type != expected:
        raise ModelError(f"--{flag} {name} holds a model of type {config.model_type}, expected {expected}")
    return config


def _load(flag: str, name: str, kind: Any, cache_dir: Path | None, **options: Any) -> Any:
    if not is_place(name):
        raise ModelError(f"--{flag} {name} is no model: expected a folder or a Hub id")
    with explained(ModelError, f"--{flag} {name} cannot be loaded"):  # whatever a foreign folder leads transformers to
        return kind.from_pretrained(name, cache_dir=cache_dir, **options)
