"""Instructions of caches that do not hold them embedded: those of a batch are embedded when it is their turn."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ...encode.base.console import amount, say
from ...encode.cache.format import Cache
from ...encode.models.checkpoint import Checkpoint
from ...encode.models.encoders import DTYPES, TextEncoders


class Texts:
    """Embeds instructions as `ip2p-encode` would have: by the same encoders, in the precision that the caches name.

    Numbers are rounded to float16 as those of a cache are, so that training sees the same ones.
    """

    def __init__(self, caches: Sequence[Cache], checkpoint: Checkpoint, device: torch.device):
        self._columns = [cache.samples("instruction")["instruction"] for cache in caches]
        self._lock = threading.Lock()  # a tokenizer is for one thread at a time, and validation has batches of its own
        dtype = DTYPES[caches[0].manifest["encoding"]["mixed_precision"]]
        self.encoders = TextEncoders(checkpoint, device, dtype)
        size = sum(weight.nbytes for encoder in self.encoders.encoders for weight in encoder.parameters())
        say(f"instructions are embedded batch by batch: their encoder takes {amount(size)} of the {device}")

    @classmethod
    def of(cls, caches: Sequence[Cache], checkpoint: Checkpoint, device: torch.device) -> "Texts | None":
        """What caches need, which were encoded alike: nothing where they hold instructions embedded."""
        return None if caches[0].holds_text else cls(caches, checkpoint, device)

    def tokens(self, caches: Sequence[int], numbers: Sequence[int]) -> list[Tensor]:
        """Tokens of the distinct instructions of a batch for each encoder, (U, 77), and which is whose, (B,).

        Args:
            caches: number of the cache of each sample.
            numbers: where the samples table of that has it.
        """
        texts = [self._columns[cache][number].as_py() for cache, number in zip(caches, numbers, strict=True)]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        with self._lock:
            tokens = self.encoders.tokenize(list(distinct))
        return [*tokens, torch.tensor([distinct[text] for text in texts])]

    def embed(self, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """Embed what `tokens` gave, on the device: text (B, 77, d), for SDXL pooled (B, 1280), float16."""
        *ids, which = tokens
        text, pooled = self.encoders.embed(ids)
        return {"text": text[which]} | ({} if pooled is None else {"pooled": pooled[which]})
