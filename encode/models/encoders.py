"""The frozen VAE and text encoder(s), and what they compute."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL

from .checkpoint import Checkpoint, layout

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _begin_copy(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy to the CPU; what is returned waits for the copy and gives it."""
    if values.device.type != "cuda":
        return values.cpu
    copy = values.to("cpu", non_blocking=True)  # PyTorch takes pinned memory for it
    arrived = torch.cuda.current_stream(values.device).record_event()

    def finish() -> torch.Tensor:
        arrived.synchronize()
        return copy

    return finish


class TextEncoders:
    """The text encoder(s) of a checkpoint, frozen, on one device."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype):
        self.is_sdxl, self.device = checkpoint.is_sdxl, device
        self.tokenizers = [checkpoint.tokenizer(name) for name in checkpoint.tokenizers]
        self.encoders = [_load(checkpoint, name, device, dtype) for name in checkpoint.text_encoders]

    def tokenize(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Tokens for each text encoder, (B, 77) integers on the CPU.

        They are padded to the tokenizer's length; padding is kept, since the UNet attends to it.
        """
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [tokenizer(list(prompts), **options).input_ids for tokenizer in self.tokenizers]

    @torch.no_grad()
    def embed(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed tokens for each text encoder: text (B, 77, d) and pooled (B, 1280) or None, float16 on the device.

        SDXL: the penultimate hidden states of both encoders side by side, and the pooled embedding of the second.
        """
        hidden, pooled = [], None
        for ids, encoder in zip(tokens, self.encoders, strict=True):
            output = encoder(ids.to(self.device), output_hidden_states=self.is_sdxl)
            hidden.append(output.hidden_states[-2] if self.is_sdxl else output[0])
            pooled = output[0].half() if self.is_sdxl else None  # the last encoder's projection stays
        return torch.cat(hidden, dim=-1).half(), pooled


def _load(checkpoint: Checkpoint, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    return checkpoint.network(part, dtype).requires_grad_(False).to(device)


class Encoders:
    """The VAE and the text encoder(s) of a checkpoint, frozen, on one device.

    `moments` and `embed` begin a batch and return at once a function that waits for it. Where the next batch is begun
    before that function is called, a GPU need not wait between two batches.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype):
        self.checkpoint, self.device, self.vae_dtype = checkpoint, device, vae_dtype
        self.vae = self._load_vae(vae_dtype)
        self.texts = TextEncoders(checkpoint, device, dtype)

    def _load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        return _load(self.checkpoint, "vae", self.device, dtype).to(memory_format=layout(self.device))

    @functools.cached_property
    def _float32_vae(self) -> AutoencoderKL:
        return self._load_vae(torch.float32)

    @torch.inference_mode()
    def moments(self, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to encode images.

        Args:
            pixels: (B, 3, H, W) uint8 on the CPU.

        Returns:
            A function that waits for mean and log variance of the posterior, unscaled, (B, 8, h, w) float16 on the CPU.
            What half precision cannot hold is then encoded again in float32; what is still not finite stays so.
        """
        return functools.partial(self._finish, pixels, _begin_copy(self._moments(self.vae, pixels)))

    @torch.inference_mode()
    def _finish(self, pixels: torch.Tensor, arrived: Callable[[], torch.Tensor]) -> torch.Tensor:
        moments = arrived()
        bad = ~moments.isfinite().flatten(1).all(dim=1)  # (B,)
        if self.vae_dtype != torch.float32 and bad.any():
            moments[bad] = self._moments(self._float32_vae, pixels[bad]).cpu()
        return moments

    def _moments(self, vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        images = 2 * (pixels.to(self.device, non_blocking=True).float() / 255) - 1  # diffusers' order of operations
        images = images.to(dtype=vae.dtype, memory_format=layout(self.device))
        posterior = vae.encode(images).latent_dist  # type: ignore[union-attr]
        return torch.cat([posterior.mean, posterior.logvar], dim=1).half()  # (B, 8, h, w)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """Begin to encode instructions, as `TextEncoders` do; the function gives what these give, on the CPU."""
        text, pooled = self.texts.embed(self.texts.tokenize(prompts))
        begun, also = _begin_copy(text), None if pooled is None else _begin_copy(pooled)
        return lambda: (begun(), also() if also else None)


def cut_short(checkpoint: Checkpoint, prompts: Sequence[str]) -> list[str]:
    """Those of some instructions whose ends are cut off, since they have more tokens than the text encoder takes."""
    cut: set[str] = set()
    for name in checkpoint.tokenizers:
        tokenizer = checkpoint.tokenizer(name)
        whole, kept = (tokenizer(list(prompts), truncation=only, verbose=False).input_ids for only in (False, True))
        cut |= {prompt for prompt, *ids in zip(prompts, whole, kept, strict=True) if len(ids[0]) > len(ids[1])}
    return [prompt for prompt in prompts if prompt in cut]
