"""What the cached step is compared with, of which nothing is ip2p's: the bare UNet, and diffusers' scripts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import DEVICE, DTYPES
from diffusers import DDPMScheduler, UNet2DConditionModel
from shapes import Shape, make_text_encoders, make_unet, make_vae
from torch import Tensor

VOCABULARY = 49408  # of CLIP


def trainable(shape: Shape, precision: str) -> UNet2DConditionModel:
    """A UNet on the device in float32, in channels_last and under autocast."""
    with DEVICE:
        unet = make_unet(shape)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if (dtype := DTYPES[precision]) != torch.float32:
        unet.forward = torch.autocast(DEVICE.type, dtype)(unet.forward)  # as accelerate does it
    return unet


def script(
    unet: UNet2DConditionModel, precision: str, average: Any = None, **adamw: bool
) -> Callable[[Callable[[], Tensor]], None]:
    """The optimizer step of diffusers' scripts, with AdamW fused unless told otherwise.

    Args:
        average: diffusers' `EMAModel`, which the scripts keep for --use_ema.
        adamw: which of PyTorch's ways to compute it.
    """
    options: Any = adamw or {"fused": True}
    optimizer: Any = torch.optim.AdamW(unet.parameters(), lr=1e-5, **options)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def step(loss: Callable[[], Tensor]) -> None:
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if average:
            average.step(unet.parameters())

    return step


def bare(
    unet: UNet2DConditionModel,
    shape: Shape,
    *,
    batch_size: int,
    resolution: int,
    text_dtype: torch.dtype = torch.float32,
) -> Callable[[], Tensor]:
    """The loss of the UNet on tensors that are there."""
    side = resolution // 8
    with unet.device:
        sample, target = torch.randn(batch_size, 8, side, side), torch.randn(batch_size, 4, side, side)
        timesteps, text = (
            torch.randint(0, 1000, (batch_size,)),
            torch.randn(batch_size, 77, shape.text_width, dtype=text_dtype),
        )
        pooled = torch.randn(batch_size, shape.pooled) if shape.pooled else None
    added = conditions(pooled, resolution)
    return lambda: F.mse_loss(
        unet(sample, timesteps, text, added_cond_kwargs=added, return_dict=False)[0].float(), target
    )


def conditions(pooled: Tensor | None, resolution: int) -> dict[str, Tensor] | None:
    """What the UNet of SDXL is told besides: the pooled instruction, and sizes and crops that are alike for all."""
    if pooled is None:
        return None
    sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], device=pooled.device)
    return {"text_embeds": pooled, "time_ids": sizes.float().expand(len(pooled), -1)}


class Online:
    """The loss as train_instruct_pix2pix.py and its sibling for SDXL compute it, encoding everything anew.

    A batch of images that are decoded already, and the frozen models that encode it at each call. The script for SDXL
    encodes the empty instruction once, and runs its VAE in float32 unless another VAE is given: here one is.

    Args:
        dtype: of the encoders, and of what they give.
        dropout: probability of each kind of conditioning dropout.
        channels_last: of the VAE, which the scripts leave as it is loaded.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        shape: Shape,
        *,
        batch_size: int,
        resolution: int,
        dtype: torch.dtype,
        dropout: float,
        channels_last: bool = False,
    ):
        self.unet, self.resolution, self.dropout, self.scheduler = unet, resolution, dropout, DDPMScheduler()
        self.device = device = unet.device
        with device:
            self.vae, self.text_encoders = make_vae(shape), make_text_encoders(shape)
            self.images = torch.rand(2, batch_size, 3, resolution, resolution).mul(2).sub(1).to(dtype)
            self.tokens = torch.randint(0, VOCABULARY, (batch_size, 77))
            self.empty = torch.randint(0, VOCABULARY, (1, 77))
        models: list[torch.nn.Module] = [self.vae, *self.text_encoders]
        if dtype != torch.float32:  # diffusers warns where nothing is to be done
            for model in models:
                model.to(dtype=dtype)
        if channels_last:
            self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.null = self.embed(self.empty)[0] if shape.pooled else None

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text (B, 77, d), and for SDXL pooled (B, 1280)."""
        if len(self.text_encoders) == 1:
            return self.text_encoders[0](tokens)[0], None
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.text_encoders]
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]

    def __call__(self) -> Tensor:
        original, edited = self.images
        latents = self.vae.encode(edited).latent_dist.sample() * self.vae.config["scaling_factor"]  # type: ignore[union-attr]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, latents.shape[:1], device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        text, pooled = self.embed(self.tokens)
        image = self.vae.encode(original).latent_dist.mode()  # type: ignore[union-attr]

        uniform, p = torch.rand(len(latents), device=self.device), self.dropout
        null = self.embed(self.empty)[0] if self.null is None else self.null
        text = torch.where((uniform < 2 * p).reshape(-1, 1, 1), null, text)
        image = image * (1 - ((uniform >= p) & (uniform < 3 * p)).to(image.dtype)).reshape(-1, 1, 1, 1)

        added, sample = conditions(pooled, self.resolution), torch.cat([noisy, image], dim=1)
        prediction = self.unet(sample, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]
        return F.mse_loss(prediction.float(), noise.float())
