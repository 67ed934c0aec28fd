"""Which device networks run on, where no launcher has assigned one."""

import torch


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`, such as "cuda:1"; by default this machine's accelerator if there is one."""
    return torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
