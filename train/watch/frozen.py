"""The frozen parts of a model beside a UNet in training: as little of them as draws a picture, and what that takes."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutput

from ...encode.models.checkpoint import Checkpoint
from ...encode.models.parts import read_config
from ..memory import Live, Shapes, as_on_cuda, build, predict
from ..unet.weights import Precision, take_float32

TILE = 1024  # pixels; on a GPU larger pictures go through the VAE in parts


def half(device: torch.device) -> torch.dtype:
    """The precision of frozen parts on a device, as `Editor` chooses it."""
    return torch.float16 if device.type == "cuda" else torch.float32


class KnownTexts:
    """Takes a text encoder's place in a pipeline, for texts that are known before: the encoder takes memory.

    Args:
        encoder: of one of diffusers' pipelines for Stable Diffusion or SDXL.
        tokenizer: of that encoder.
        texts: all that the pipeline will ask for.
    """

    dtype = torch.float32  # which a pipeline takes for its latents

    def __init__(self, encoder: Any, tokenizer: Any, texts: Iterable[str]):
        self.config, self._known = encoder.config, dict[tuple[int, ...], list[Tensor]]()
        for text in texts:
            ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            found = encoder(ids.to(encoder.device), output_hidden_states=True)
            self._known[tuple(ids[0].tolist())] = [part.float().cpu() for part in (found[0], found.hidden_states[-2])]

    def __call__(self, ids: Tensor, **_: Any) -> BaseModelOutput:
        """What the encoder gives first for tokens (B, 77), and its penultimate hidden states: float32."""
        found = zip(*(self._known[tuple(row)] for row in ids.tolist()), strict=True)
        first, hidden = (torch.cat(parts).to(ids.device) for parts in found)
        return BaseModelOutput(first, hidden_states=(hidden, hidden))  # type: ignore[arg-type]


def encode(
    checkpoint: Checkpoint, texts: Iterable[str], device: torch.device, dtype: torch.dtype
) -> dict[str, KnownTexts]:
    """What each text encoder of a checkpoint makes of some texts, by its name; one after the other is loaded for it."""
    found = dict[str, KnownTexts]()
    for encoder, tokenizer in zip(checkpoint.text_encoders, checkpoint.tokenizers, strict=True):
        network = checkpoint.network(encoder, dtype).to(device)
        found[encoder] = KnownTexts(network, checkpoint.tokenizer(tokenizer), texts)
        del network  # before the next one is there
    return found


def load_vae(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The VAE, for one picture at a time: on a GPU in half precision, unless it overflows there, and in tiles."""
    vae = checkpoint.network("vae", torch.float32 if checkpoint.vae_overflows else half(device)).to(device)
    return spare(vae, tiles=device.type == "cuda")


def spare(vae: Any, *, tiles: bool) -> Any:
    """Let a VAE take one picture at a time, perhaps in tiles of `TILE`, and float32 whatever its own precision."""
    vae.enable_slicing()
    if tiles:
        vae.enable_tiling()
        vae.tile_sample_min_size = TILE
        vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)
    for part in (vae.encoder, vae.post_quant_conv or vae.decoder):
        part.register_forward_pre_hook(lambda _, given: (given[0].to(vae.dtype), *given[1:]))
    return vae


class Frozen(NamedTuple):
    """The frozen parts of a model by their configurations."""

    vae: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    vae_overflows: bool

    @classmethod
    def of(cls, base: Checkpoint) -> "Frozen":
        """From the files of a checkpoint."""
        texts = tuple(read_config(base.folder / name, name) for name in base.text_encoders)
        return cls(read_config(base.vae_folder, "vae"), texts, base.vae_overflows)

    def text_weights(self) -> list[int]:
        """How many numbers the weights of each text encoder are."""
        with torch.device("meta"):
            kinds = (CLIPTextModel, CLIPTextModelWithProjection)
            networks = [kind(CLIPTextConfig(**config)) for kind, config in zip(kinds, self.texts, strict=False)]
        return [sum(weight.numel() for weight in network.parameters()) for network in networks]


def simulate_picture(
    frozen: Frozen, unet: Mapping[str, Any], shapes: Shapes, precision: Precision, *, norms: bool
) -> int:
    """Bytes beside the UNet's weights that encoding the texts or drawing a picture takes of a GPU at most.

    Texts themselves take next to nothing beside their encoders, and so do adapters beside layers; nothing is computed.
    """
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(frozen.vae)
        latents = torch.empty(1, shapes.latents[0] // 2, *shapes.latents[1:])
        picture = torch.empty(
            1, 3, *(side * 2 ** (len(vae.config.block_out_channels) - 1) for side in latents.shape[2:])
        )
    torch.nn.Module.to(vae.eval(), torch.float32 if frozen.vae_overflows else torch.float16)
    spare(vae, tiles=True)
    model = build(unet, shapes, precision, norms=norms)
    if precision.half:
        take_float32(model, precision.half)
    peaks = list[int]()
    for work, casts in (
        (lambda: vae.decode(latents), None),
        (lambda: vae.encode(picture), None),
        (lambda: predict(model, shapes, 3), precision.casts),  # for guidance by text and picture
    ):
        with Live([*vae.parameters(), *model.parameters()]) as live, as_on_cuda(casts), torch.no_grad():
            work()
        peaks.append(live.most)
    return max(2 * max(frozen.text_weights()), max(peaks) + sum(weight.nbytes for weight in vae.parameters()))
