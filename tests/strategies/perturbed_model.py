"""A model as after some training, without training it."""

import torch
from torch import nn


@torch.no_grad()
def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved by noise, in place; all modules in eval mode, which their owner is not told."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        module.training = False
    return model
