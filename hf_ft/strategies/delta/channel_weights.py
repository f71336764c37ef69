r"""The importance of each channel of a layer for the target: the increase of the loss when it is removed.

.. math:: a = \operatorname{softmax}(z / 5), \qquad
    z_c = \frac{g_c - \overline g}{\operatorname{std}(g)}, \quad g_c = L(\text{channel } c = 0) - L

Reference: Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks",
ICLR 2019.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm.auto import tqdm

from hf_ft.core.compose import compose
from hf_ft.core.config import FTConfig
from hf_ft.core.context import Context
from hf_ft.core.plan import Plan, Stage
from hf_ft.core.task_loss import are_classes, classifier_outputs
from hf_ft.engine.frozen.find_prefix import find_prefix
from hf_ft.engine.frozen.prefix import FrozenPrefix
from hf_ft.engine.frozen.recorder import Recordings
from hf_ft.engine.set_up import start
from hf_ft.engine.short_training import Batches, fit
from hf_ft.errors import OptionError
from hf_ft.models.feature_hooks import activations
from hf_ft.models.find_layouts import find_layouts
from hf_ft.models.names import Names, covers
from hf_ft.models.parts import Chain, Part
from hf_ft.models.preserve import observing
from hf_ft.models.probing import leading

TEMPERATURE = 5.0
ROWS = 256  # samples per forward pass, which evaluates several left-out channels in parallel
Batch = Mapping[str, Any]


def attention_weights(growth: Tensor) -> Tensor:
    """softmax(z / 5) of the loss increases, (C,), standardised by the population standard deviation.

    If all channels are equally important, their weights are 1 / C each.
    """
    spread = growth.std(correction=0)
    standardised = (growth - growth.mean()) / spread if float(spread) > 0 else torch.zeros_like(growth)
    return torch.softmax(standardised / TEMPERATURE, dim=0)


def channel_weights(
    model: nn.Module, layers: Names, config: FTConfig, context: Context, *, epochs: int, lr: float, batches: int
) -> dict[str, Tensor]:
    """Channel weights by layer name, (C,) each, summing to 1.

    A copy of the model gets a head trained on the frozen features, since the loss of a random head is uninformative.
    Then each channel in turn is set to zero on some batches in eval mode.

    Args:
        layers: modules that output (B, C, H, W) or (B, T, C).
        config: names the head and blocks if they cannot be found automatically.
        epochs: training epochs of the head.
        lr: learning rate of the head.
        batches: number of batches over which the loss increase is averaged.

    Raises:
        OptionError: if the task is not single-label classification, or a layer's output has no channels.
    """
    if not are_classes(context.samples.read([0]).get("labels"), getattr(model, "config", None)):
        raise OptionError(
            "delta: weights='attention' needs class labels, whose cross-entropy weights the channels. Set "
            "weights='uniform'."
        )
    probe = _with_trained_head(model, config, context, epochs, lr)
    size = context.recipe.batch_size * context.ranks  # the same batches for any number of processes
    order = torch.randperm(context.samples.count, generator=context.generator).tolist()
    chosen = [order[begin : begin + size] for begin in range(0, len(order), size)][:batches]
    with observing(probe), context.recipe.computing():
        read = [context.samples.read(rows) for rows in chosen]
        parts = config.anatomy(probe).parts
        growths = {layer: _growth(probe, layer, parts, read, context) for layer in layers}
    return {layer: attention_weights(growth.cpu().double()).float() for layer, growth in growths.items()}


def _with_trained_head(model: nn.Module, config: FTConfig, context: Context, epochs: int, lr: float) -> nn.Module:
    probe = copy.deepcopy(model)
    head = config.anatomy(probe).head.modules
    if not any(parameter.requires_grad for name in head for parameter in probe.get_submodule(name).parameters()):
        return probe  # a frozen head stays as it is
    run = start((config,), probe, compose([Plan(stages=(Stage("head", trains=head),))]), {})
    recipe = dataclasses.replace(context.recipe, learning_rate=lr, batch_size=context.recipe.batch_size * context.ranks)
    recordings = Recordings(model, context.samples, context.frozen_cache, recipe.computing)
    seed = int(torch.randint(2**31, (), generator=context.generator))
    rows = list(range(context.samples.count))
    fit(run, recipe, Batches(context.samples, recordings), rows, epochs, seed, lambda epoch, objective: None)
    return probe


def _growth(model: nn.Module, layer: str, parts: Sequence[Part], read: Sequence[Batch], context: Context) -> Tensor:
    """Increase of the mean loss over the batches without each channel, (C,). Processes share the channels."""
    suffix = _Suffix(model, layer, parts, read[0])
    channels, total = suffix.channels, torch.zeros(suffix.channels, device=context.device)
    bar = tqdm(total=len(read), desc=f"Weighing {layer}", disable=not context.progress, leave=False)
    for batch in read:
        rows = len(batch["labels"])
        together = max(1, ROWS // rows)
        at_border = suffix.at_border(batch)
        whole = suffix.losses(batch, at_border, [-1])
        mine = list(range(context.rank, channels, context.ranks))
        for begin in range(0, len(mine), together):
            some = mine[begin : begin + together]
            total[some] += suffix.losses(batch, at_border, some) - whole
        bar.update()
    bar.close()
    return context.reduce(total) / len(read)


class _Suffix:
    """The rest of a network from the part containing a layer, run for several left-out channels at once."""

    def __init__(self, model: nn.Module, layer: str, parts: Sequence[Part], batch: Batch) -> None:
        self.model, self.layer = model, layer
        self.layout = find_layouts(model, [layer], leading(batch))[layer]
        shape = self.layout.arranged(activations(model, [layer], batch)[layer]).shape
        if len(shape) not in (3, 4):
            raise OptionError(
                f"layer {layer!r} outputs {tuple(shape)}, which has no channels to weight. Name another layer."
            )
        self.dim = 1 if len(shape) == 4 else 2
        self.channels = int(shape[self.dim])
        inside = [i for i, part in enumerate(parts) if any(covers(m, layer) or covers(layer, m) for m in part.modules)]
        first = min(inside, default=0)
        small = [{k: v[rows] if isinstance(v, Tensor) else v for k, v in batch.items()} for rows in ([0], [0, -1])]
        enough = first > 0 and len(batch["labels"]) > 1
        follows = [Chain("", tuple(parts[first:]))]
        self.prefix: FrozenPrefix | None = find_prefix(model, follows, *small) if enough else None

    def at_border(self, batch: Batch) -> tuple[Tensor, ...]:
        return () if self.prefix is None else self.prefix.record(batch)

    def losses(self, batch: Batch, at_border: Sequence[Tensor], left_out: Sequence[int]) -> Tensor:
        """Mean loss of the batch without each of these channels (-1: with all channels), (channels,)."""
        copies, rows = len(left_out), len(batch["labels"])
        repeated = {k: _repeat(v, copies) if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
        labels = repeated.pop("labels")

        def leave_out(module: nn.Module, inputs: Any, output: Any) -> Any:
            leaves, structure = tree_flatten(output)
            first = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            leaves[first] = leaves[first].clone()
            arranged = self.layout.arranged(leaves[first])
            for number, channel in enumerate(left_out):
                if channel >= 0:
                    arranged[number * rows : (number + 1) * rows].select(self.dim, channel).zero_()
            return tree_unflatten(leaves, structure)

        handle = self.model.get_submodule(self.layer).register_forward_hook(leave_out)
        try:
            if self.prefix is None:
                outputs = self.model(**repeated)
            else:
                outputs = self.prefix([_repeat(activation, copies) for activation in at_border], repeated)
        finally:
            handle.remove()
        logits = classifier_outputs(outputs, getattr(self.model, "config", None))["logits"].float()
        return nn.functional.cross_entropy(logits, labels, reduction="none").reshape(copies, rows).mean(dim=1)


def _repeat(column: Tensor, copies: int) -> Tensor:
    return column if copies == 1 else column.repeat(copies, *(1,) * (column.dim() - 1))
