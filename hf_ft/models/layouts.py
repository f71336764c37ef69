"""Where the outputs of layers hold samples, positions and channels, and which positions are padding.

This is inferred from what a network does with a few samples: which axis grows with the samples, which with the length
of the text or the size of the image, and which positions change with a padded token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ft.models.probing import MASK, Batch


@dataclass(frozen=True)
class Tokens:
    """Which input tokens the positions of a layer stand for.

    Position p stands for the tokens from ``stride * p + first`` on, ``stride`` of them. Positions before the first
    token are valid: prompts, or a class token. So are the ``after`` positions that follow the last token, such as the
    patches of an image. Any further ones are padding that the model adds.
    """

    stride: int = 1
    first: int = 0
    after: int = 0

    def mask(self, mask: Tensor, positions: int) -> Tensor | None:
        """The mask of a layer with this many positions, (B, positions), from that of the input, (B, T).

        A position is valid if none of its tokens is padding. None for a layer with too few positions for its tokens.
        """
        length = mask.shape[1]
        if positions == length and self == Tokens():
            return mask
        if self.stride == 1 and self.first <= 0:
            before = -self.first
            valid = nn.functional.pad(mask, (before, self.after), value=1)
            more = positions - valid.shape[1]
            return nn.functional.pad(valid, (0, more), value=0) if more >= 0 else None
        begin = self.stride * torch.arange(positions, device=mask.device) + self.first
        index = begin[:, None] + torch.arange(self.stride, device=mask.device)
        inside = (index >= 0) & (index < length)
        valid = mask.bool()[:, index.clamp(0, length - 1)] | ~inside
        return (valid.all(dim=2) & ((begin < length) & (begin + self.stride <= length))).to(mask)


@dataclass(frozen=True)
class Layout:
    """The layout of a layer's output.

    Attributes:
        order: its axes in the order samples, positions, channels (for feature maps samples, channels, height, width);
            None if they are already in this order.
        tokens: which tokens its positions stand for; None if they do not follow the tokens, or if that is unknown.
    """

    order: tuple[int, ...] | None = None
    tokens: Tokens | None = Tokens()

    def arranged(self, state: Tensor) -> Tensor:
        """The output as (B, T, C) or (B, C, H, W), without a copy."""
        return state if self.order is None or state.dim() != len(self.order) else state.permute(self.order)

    def mask(self, batch: Batch, state: Tensor) -> Tensor | None:
        """The mask of the valid positions of an arranged state, (B, T); None if all are."""
        mask = batch.get(MASK)
        if self.tokens is None or state.dim() != 3 or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        return self.tokens.mask(mask, state.shape[1])


PLAIN = Layout()


class Layouts:
    """The layouts of the layers of one model; those of layers not yet examined are plain."""

    def __init__(self) -> None:
        self._by_layer: dict[str, Layout] = {}

    def __getitem__(self, layer: str) -> Layout:
        return self._by_layer.get(layer, PLAIN)

    def lacks(self, layers: Iterable[str]) -> bool:
        """Whether one of these layers has not been examined."""
        return any(layer not in self._by_layer for layer in layers)

    def add(self, layouts: Mapping[str, Layout]) -> None:
        """Add layouts by layer."""
        self._by_layer |= layouts

    def arranged(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of layers as (B, T, C) or (B, C, H, W)."""
        return {layer: self[layer].arranged(state) for layer, state in states.items()}

    def masks(self, batch: Batch, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks (B, T) of arranged states, for layers in which there may be padding."""
        masks = {layer: self[layer].mask(batch, state) for layer, state in states.items()}
        return {layer: mask for layer, mask in masks.items() if mask is not None}
