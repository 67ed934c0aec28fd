"""The optimizer that the flags ask for, and all that moves with it in a step."""

from typing import Any

import torch

from ...encode.base.errors import SettingsError
from ..config import TrainConfig
from .average import Average
from .compiled import takes_one_pass
from .update import LossScale, Update
from .weights import Precision, Weights


def make_update(config: TrainConfig, unet: torch.nn.Module, precision: Precision, processes: int) -> Update:
    """All that a step changes of a UNet, which is on its device and in float32; its weights may become copies."""
    device = next(unet.parameters()).device
    weights = Weights(unet, precision.half)
    average = Average(weights.masters, config.optimizer.ema_decay) if config.optimizer.use_ema else None
    scale = LossScale(device) if precision.name == "fp16" else None
    optimizer = make_optimizer(config, weights, processes)
    fused = not config.optimizer.use_8bit_adam and takes_one_pass(device, precision.half)
    return Update(weights, optimizer, config.optimizer.max_grad_norm, average, scale, fused=fused)


def make_optimizer(config: TrainConfig, weights: Weights, processes: int) -> torch.optim.Optimizer:
    """AdamW over the masters, fused or in 8 bits."""
    scale = config.steps.train_batch_size * config.steps.gradient_accumulation_steps * processes
    options: dict[str, Any] = {
        "lr": config.optimizer.learning_rate * (scale if config.optimizer.scale_lr else 1),
        "betas": (config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        "weight_decay": config.optimizer.adam_weight_decay,
        "eps": config.optimizer.adam_epsilon,
    }
    if not config.optimizer.use_8bit_adam:
        return torch.optim.AdamW(weights.masters, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingsError("--use_8bit_adam needs bitsandbytes (pip install 'ip2p[gpu]'), or leave it out") from None
    return AdamW8bit(weights.masters, **options)
