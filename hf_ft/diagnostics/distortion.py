"""How far fine-tuning moved a model's features, block by block.

How well the features separate other classes is measured in :mod:`hf_ft.diagnostics.discrimination`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_ft.documents.figure import new_figure
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.feature_hooks import model_inputs
from hf_ft.models.find_layouts import find_layouts, head_layout
from hf_ft.models.layouts import Layout
from hf_ft.models.parts import Anatomy
from hf_ft.models.preserve import observing
from hf_ft.models.probing import leading

logger = logging.get_logger(__name__)
FEATURES = "features"
Distortions = dict[str, "Distortion"]


@dataclass(frozen=True)
class Distortion:
    """Difference between features a (before) and b (after), as means over samples.

    Attributes:
        cosine: ``a·b / (||a|| ||b||)``, 1 for an unchanged direction.
        l2: ``||a - b||``.
        relative_l2: ``||a - b|| / ||a||``.
        samples: number of samples.
    """

    cosine: float
    l2: float
    relative_l2: float
    samples: int


def feature_distortion(
    before: nn.Module,
    after: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    *,
    head: str | None = None,
    blocks: str | None = None,
) -> dict[str, Distortion]:
    """Cosine similarity and L2 distance between two models' features after every block and at the head's input.

    A block's output (N, C, H, W) is averaged over space, (N, T, C) over tokens without padding, to one vector per
    sample. Both models run in eval mode; modes and RNG states are restored on exit.

    Args:
        before: the model whose anatomy (:func:`hf_ft.models.anatomy`) defines the blocks.
        after: a model of the same architecture.
        loader: batches as dictionaries of the models' keyword arguments.
        head: see :func:`hf_ft.models.anatomy`.
        blocks: see :func:`hf_ft.models.anatomy`.

    Returns:
        Distortions by block (``block0``, ...), and under ``features`` for the input of the head.

    Raises:
        OptionError: if there are no samples, or if the models differ in anatomy.
    """
    parts, sums, samples = anatomy(before, head=head, blocks=blocks), dict[str, Tensor](), 0
    with ExitStack() as stack:
        taps = [stack.enter_context(_tapped(model, parts)) for model in (before, after)]
        stack.enter_context(observing(before, after))
        layouts: dict[str, Layout] = {}
        for batch in loader:
            features = []
            for model, outputs in zip((before, after), taps, strict=True):
                inputs = model_inputs(batch, next(model.parameters()).device)
                layouts = layouts or _layouts(model, parts, inputs)
                model(**inputs)
                features.append({name: _pool(layouts[name], values, inputs) for name, values in outputs.items()})
            samples += len(next(iter(features[0].values())))
            for name, vectors in features[0].items():
                sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64)) + _differences(
                    vectors, features[1][name]
                )
    if not samples:
        raise OptionError("feature_distortion: the loader yielded no samples (an iterator can only be used once).")
    means = {name: (total / samples).tolist() for name, total in sums.items()}
    return {name: Distortion(cosine, l2, relative, samples) for name, (cosine, l2, relative) in means.items()}


def plot_distortion(results: Mapping[str, Mapping[str, Distortion]], file: str | Path) -> None:
    """Plot cosine similarity and relative L2 distance over the blocks, one line per result.

    Args:
        results: results of :func:`feature_distortion` by name, such as ``{"ID": ..., "OOD": ...}``.
        file: output file; its suffix determines the format.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = new_figure("plot_distortion")
    axes = figure.subplots(1, 2)
    titles = {"cosine": "cosine similarity", "relative_l2": "relative L2 distance"}
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for label, result in results.items():
            axis.plot(list(result), [getattr(entry, field) for entry in result.values()], marker="o", label=label)
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=60)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file)


class FeatureDistortionCallback(TrainerCallback):
    """Measure at each evaluation how far the features have moved since the start of training.

    Adds ``distortion/<name>/blocks_cosine`` (the mean over blocks) and ``distortion/<name>/features_cosine`` to the
    evaluation's metrics and to the log; ``history`` holds all measurements.

    Args:
        loaders: re-iterable batches by name, such as ``{"id": ..., "ood": ...}``.
        reference: model to compare with; by default a copy made at the start of training. Required for a resumed
            run, whose model starts with trained weights.
        head: see :func:`hf_ft.models.anatomy`.
        blocks: see :func:`hf_ft.models.anatomy`.

    Attributes:
        history: the step of each evaluation, and its distortions by loader name.
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Mapping[str, Any]]],
        reference: nn.Module | None = None,
        *,
        head: str | None = None,
        blocks: str | None = None,
    ) -> None:
        self.loaders = dict(loaders)
        self.history: list[tuple[int, dict[str, Distortions]]] = []
        self._given = self._reference = reference
        self._measure = partial(feature_distortion, head=head, blocks=blocks)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._given is None and state.is_world_process_zero:
            if state.global_step:
                logger.warning(
                    f"FeatureDistortionCallback: training resumed at step {state.global_step}, so distortion is "
                    "relative to that step. Pass reference=<the model before training>."
                )
            self._reference = copy.deepcopy(model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self._reference is None or not state.is_world_process_zero:
            return
        results = {name: self._measure(self._reference, model, loader) for name, loader in self.loaders.items()}
        self.history.append((state.global_step, results))
        figures = {f"distortion/{name}/{key}": v for name, result in results.items() for key, v in _short(result)}
        if metrics is not None:
            metrics.update(figures)
        # The evaluation's own entry has been logged already.
        state.log_history.append({"epoch": state.epoch, **figures, "step": state.global_step})


def _short(result: Distortions) -> Iterator[tuple[str, float]]:
    in_blocks = [distortion.cosine for name, distortion in result.items() if name != FEATURES]
    yield "blocks_cosine", sum(in_blocks) / len(in_blocks)
    yield "features_cosine", result[FEATURES].cosine


def _differences(before: Tensor, after: Tensor) -> Tensor:
    """Sums over samples of cosine, L2 and relative L2 of vectors (N, d), as (3,)."""
    distance, length = (before - after).norm(dim=1), before.norm(dim=1)
    cosine = nn.functional.cosine_similarity(before, after, dim=1)
    return torch.stack([cosine.sum(), distance.sum(), (distance / length.clamp_min(1e-12)).sum()])


def _layouts(model: nn.Module, parts: Anatomy, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    """How the outputs of the blocks and the input of the head are laid out."""
    layers = {part.name: part.modules[-1] for part in parts.blocks}
    found = find_layouts(model, list(layers.values()), leading(inputs))
    by_part = {name: found[layer] for name, layer in layers.items()}
    return {**by_part, FEATURES: head_layout(model, parts.head.modules, leading(inputs))}


def _pool(layout: Layout, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """One vector per sample, (N, C), in float64 on the CPU."""
    values = layout.arranged(values.detach().to(torch.promote_types(values.dtype, torch.float32)))
    mask = layout.mask(inputs, values)
    if values.dim() == 3 and mask is not None:
        weights = mask.to(values).unsqueeze(2)
        values = (values * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
    elif values.dim() == 3:
        values = values.mean(dim=1)
    elif values.dim() > 3:
        values = values.flatten(2).mean(dim=2)
    return values.cpu().double()


@contextmanager
def _tapped(model: nn.Module, parts: Anatomy) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the blocks and the input of the head in the latest forward pass."""
    outputs: dict[str, Tensor] = {}
    modules, handles = dict(model.named_modules()), []
    try:
        for part in (*parts.blocks, parts.head):
            name = part.modules[0] if part is parts.head else part.modules[-1]
            if name not in modules:
                raise OptionError(
                    f"feature_distortion: the second model has no module {name!r}; both must have the same "
                    "architecture."
                )
            if part is parts.head:
                handles.append(modules[name].register_forward_pre_hook(partial(_keep, outputs, FEATURES)))
            else:
                handles.append(modules[name].register_forward_hook(partial(_keep_output, outputs, part.name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    outputs[name] = inputs[0]


def _keep_output(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    outputs[name] = output[0] if isinstance(output, (tuple, list)) else output
