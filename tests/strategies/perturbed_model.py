"""A model as if after some training, without training it."""

import torch
from torch import nn


@torch.no_grad()
def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter in place, and put all modules in eval mode without calling ``eval``."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        module.training = False
    return model
