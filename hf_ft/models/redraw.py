"""Redraw the weights of modules, as Transformers initialises them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_ft.models.preserve import random_states_kept

_INITIALISED = "_is_hf_initialized"  # Transformers skips what has this mark


def draw(model: Any, module: nn.Module) -> None:
    """Draw the weights of a module as a Transformers model initialises those of its own modules."""
    parts: list[Any] = list(module.modules())
    for part in parts:
        if not any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            continue  # what does not train keeps its weights, such as PEFT's copies of the originals
        for marked in (part, *part.parameters(recurse=False)):
            vars(marked).pop(_INITIALISED, None)
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        if hasattr(model, "_init_weights"):
            model._init_weights(part)


def redraw(model: nn.Module, base: nn.Module, names: Sequence[str], number: int) -> None:
    """Draw the weights of some modules; the same on every process, and after a resume.

    Args:
        base: the Transformers model in a wrapper, or the model itself.
        names: names of the modules.
        number: number of the redraw; together with the seed of the run, it determines what is drawn.
    """
    if not names:
        return
    with random_states_kept((torch.initial_seed() + number) % 2**32), torch.no_grad():
        for name in names:
            draw(base, model.get_submodule(name))
