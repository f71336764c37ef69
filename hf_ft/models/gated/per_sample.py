"""A gate per sample and block: a small network on the pretrained features chooses which blocks are fine-tuned ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax

from hf_ft.errors import OptionError
from hf_ft.functional import wide
from hf_ft.models.border import Border
from hf_ft.models.gated.paths import per_row, straight_through
from hf_ft.models.gated.survey import SAMPLES, called_units, survey, units_of
from hf_ft.models.head_features import HeadFeatures
from hf_ft.models.names import Names


@dataclass(frozen=True)
class PerSample:
    """Settings of the gate; :meth:`fitted` completes them for a model.

    Attributes:
        blocks: names of the modules of each block.
        head: names of the head's modules; their input in the frozen copy is the gate's input.
        logits: names of the layers that give the logits.
        features: number of features.
        width: number of hidden units.
        temperature: temperature of the Gumbel softmax.
        noise: whether decisions are drawn in training.
    """

    blocks: tuple[Names, ...]
    head: Names
    logits: Names
    width: int
    temperature: float
    noise: bool = True
    features: int = 0

    def fitted(self, model: nn.Module) -> PerSample:
        """The settings with the number of features, and with those modules of each block that have an output to choose.

        Raises:
            OptionError: if the model does not suit the gate.
        """
        blocks = units_of(model, self.blocks)
        units = [unit for block in blocks for unit in block]
        seen, pooled = survey(model, units, lambda batch: self.features_of(model, (), batch))
        chosen = called_units(blocks, seen)
        if pooled is None or pooled.dim() != 2 or len(pooled) != SAMPLES:
            raise OptionError(
                f"not one vector per sample enters the head of {type(model).__name__} "
                f"({None if pooled is None else tuple(pooled.shape)} for {SAMPLES} samples). Name the modules that map "
                "features to logits with head='...'."
            )
        return dataclasses.replace(self, blocks=chosen, features=pooled.shape[1])

    def features_of(self, model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> Any:
        """What enters the head of a model, (B, d)."""
        features, border = HeadFeatures(model, self.head, self.logits), Border(model, self.head)
        with torch.no_grad(), features, border.recording():
            model(*args, **inputs)
            return features.pooled(border)


def decisions(logits: Tensor, temperature: float, noise: bool) -> Tensor:
    r"""Decisions (..., ) in {0, 1} from logits (..., 2), with a straight-through gradient.

    .. math:: I = \arg\max_k (z_k + g_k), \qquad
        \nabla I = \nabla \, \mathrm{softmax}\big((z + g) / \tau\big)_1, \qquad g_k \sim \mathrm{Gumbel}(0, 1)

    Without noise, :math:`g = 0`, and ties are resolved in favour of 1.
    """
    soft = gumbel_softmax(logits, tau=temperature) if noise else (logits / temperature).softmax(dim=-1)
    return straight_through((soft[..., 1] >= 0.5).to(soft.dtype), soft[..., 1])


class PerSampleGate(nn.Module):
    """Decides for each sample, from its pretrained features and before its forward pass, about all blocks."""

    def __init__(self, settings: PerSample, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.settings = settings
        self.units: Names = tuple(unit for block in settings.blocks for unit in block)
        self._block = {unit: index for index, block in enumerate(settings.blocks) for unit in block}
        self._decisions: Tensor | None = None
        self.policy = nn.Sequential(
            nn.LayerNorm(settings.features),
            nn.Linear(settings.features, settings.width),
            nn.ReLU(),
            nn.Linear(settings.width, 2 * len(settings.blocks)),
        ).to(dtype)

    def begin(self, pretrained: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self._decisions = self(self.settings.features_of(pretrained, args, inputs))

    def forward(self, features: Tensor) -> Tensor:
        """Decisions (B, L) in {0, 1}, from features (B, d)."""
        with torch.autocast(features.device.type, enabled=False):
            logits = self.policy(wide(features).to(next(self.policy.parameters()).dtype)).unflatten(-1, (-1, 2))
            return decisions(logits, self.settings.temperature, self.training and self.settings.noise)

    def share(self, unit: str, inputs: Tensor, output: Tensor) -> Tensor:
        chosen = None if self._decisions is None else self._decisions[:, self._block[unit]]
        return per_row(chosen, output, unit)

    def end(self) -> None:
        self._decisions = None
