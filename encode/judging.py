"""The flags of `ip2p-encode` that say whether pairs are judged, and by what."""

import dataclasses
from collections.abc import Iterator

from .base.flags import Name, idle

CLIP = "openai/clip-vit-base-patch32"


@dataclasses.dataclass(frozen=True)
class PairScores:
    """How well the pairs show their edits."""

    pair_scores: bool = False
    """Add CLIP's scores of the dataset's own pictures to the table of samples, for `ip2p-train --keep`: clip_image, the
    likeness of both pictures; and where there are captions clip_direction, how far the pictures change as the captions
    do, and clip_t, the likeness of the edited picture and its caption. They can be added to a finished cache."""
    clip_model: str | None = None
    """The CLIP that judges: a folder or Hub id. Default: the one that has judged the cache before, else
    openai/clip-vit-base-patch32. Another one judges all pairs again."""
    original_caption_column: Name | None = None
    """Column with captions of the originals. Default: original_prompt, or like it, if there is any."""
    edited_caption_column: Name | None = None
    """Column with captions of the edited images. Default: edited_prompt, or like it, if there is any."""

    def idle(self) -> Iterator[str]:
        """What is said of flags that are set and cannot act."""
        if not self.pair_scores:
            yield from idle(self, "belongs to --pair_scores: add that, or leave it out")
