"""What the cached step is compared with, of which nothing is ip2p's: the bare UNet, and diffusers' script."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel


def bare(unet: UNet2DConditionModel, text_width: int, *, batch_size: int, resolution: int) -> Callable[[], Tensor]:
    """The loss of the UNet on tensors that are there."""
    side = resolution // 8
    with unet.device:
        sample, target = torch.randn(batch_size, 8, side, side), torch.randn(batch_size, 4, side, side)
        timesteps, text = torch.randint(0, 1000, (batch_size,)), torch.randn(batch_size, 77, text_width)
    return lambda: F.mse_loss(unet(sample, timesteps, text, return_dict=False)[0].float(), target)


class Online:
    """The loss as train_instruct_pix2pix.py computes it, encoding everything anew.

    A batch of images that are decoded already, and the frozen models that encode it at each call.

    Args:
        vae_width, text_width: widths of the encoders.
        dtype: of the encoders, and of what they give.
        dropout: probability of each kind of conditioning dropout.
        channels_last: of the VAE, which the script leaves as it is loaded.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae_width: tuple[int, ...],
        text_width: int,
        *,
        batch_size: int,
        resolution: int,
        dtype: torch.dtype,
        dropout: float,
        channels_last: bool = False,
    ):
        self.unet, self.dropout, self.scheduler = unet, dropout, DDPMScheduler()
        self.device = device = unet.device
        with torch.device(device):
            blocks: dict[str, Any] = {"block_out_channels": vae_width, "norm_num_groups": vae_width[0] // 4}
            blocks |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
            self.vae = AutoencoderKL(layers_per_block=2, **blocks)
            config = CLIPTextConfig(
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_hidden_layers=12,
                num_attention_heads=text_width // (64 if text_width % 64 == 0 else 32),
            )
            self.text_encoder = CLIPTextModel(config)
            self.images = torch.rand(2, batch_size, 3, resolution, resolution).mul(2).sub(1).to(dtype)
            self.tokens = torch.randint(0, config.vocab_size, (batch_size, 77))
            self.empty = torch.randint(0, config.vocab_size, (1, 77))
        models: list[torch.nn.Module] = [self.vae, self.text_encoder]
        for model in models:
            model.requires_grad_(False).eval()
            if dtype != torch.float32:
                model.to(dtype=dtype)
        if channels_last:
            models[0].to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self) -> Tensor:
        original, edited = self.images
        latents = self.vae.encode(edited).latent_dist.sample() * self.vae.config["scaling_factor"]  # type: ignore[union-attr]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, latents.shape[:1], device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        text = self.text_encoder(self.tokens)[0]
        image = self.vae.encode(original).latent_dist.mode()  # type: ignore[union-attr]

        uniform, p = torch.rand(len(latents), device=self.device), self.dropout
        null = self.text_encoder(self.empty)[0]
        text = torch.where((uniform < 2 * p).reshape(-1, 1, 1), null, text)
        image = image * (1 - ((uniform >= p) & (uniform < 3 * p)).to(image.dtype)).reshape(-1, 1, 1, 1)

        prediction = self.unet(torch.cat([noisy, image], dim=1), timesteps, text, return_dict=False)[0]
        return F.mse_loss(prediction.float(), noise.float())
