"""How far fine-tuning moved a model's features, block by block; and what TRED's disentangling found.

How well the features tell other classes apart is in :mod:`hf_ft.diagnostics.discrimination`.
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
from hf_ft.models.parts import Anatomy
from hf_ft.models.preserve import observing

logger = logging.get_logger(__name__)
FEATURES = "features"
Distortions = dict[str, "Distortion"]


@dataclass(frozen=True)
class Distortion:
    """How features a (before) and b (after) differ, as means over samples.

    Attributes:
        cosine: ``a·b / (||a|| ||b||)``, 1 for an unchanged direction.
        l2: ``||a - b||``.
        relative_l2: ``||a - b|| / ||a||``.
        samples: how many there were.
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
    """Cosine similarity and L2 distance of two models' features after every block, and of what goes into the head.

    A block's output is averaged over space (N, C, H, W) or over tokens (N, T, C), padded ones left out, so that
    each sample has one vector. Both models run in eval mode; modes and random states are as before afterwards.

    Args:
        before: the model whose parts (:func:`hf_ft.models.anatomy`) are compared.
        after: one of the same architecture.
        loader: batches as dictionaries of the models' keyword arguments.
        head: as for :func:`hf_ft.models.anatomy`.
        blocks: as for :func:`hf_ft.models.anatomy`.

    Returns:
        By block (``block0``, ...), and ``features`` for what goes into the head.

    Raises:
        OptionError: no sample, or a model of other parts.
    """
    parts, sums, samples = anatomy(before, head=head, blocks=blocks), dict[str, Tensor](), 0
    with ExitStack() as stack:
        taps = [stack.enter_context(_tapped(model, parts)) for model in (before, after)]
        stack.enter_context(observing(before, after))
        for batch in loader:
            pooled = []
            for model, outputs in zip((before, after), taps, strict=True):
                inputs = model_inputs(batch, next(model.parameters()).device)
                model(**inputs)
                pooled.append({name: _pool(values, inputs) for name, values in outputs.items()})
            samples += len(next(iter(pooled[0].values())))
            for name, vectors in pooled[0].items():
                sums[name] = sums.get(name, torch.zeros(3, dtype=torch.float64)) + _differences(
                    vectors, pooled[1][name]
                )
    if not samples:
        raise OptionError("feature_distortion: the loader holds no sample (an iterator can be passed over once).")
    means = {name: (total / samples).tolist() for name, total in sums.items()}
    return {name: Distortion(cosine, l2, relative, samples) for name, (cosine, l2, relative) in means.items()}


def plot_distortion(results: Mapping[str, Mapping[str, Distortion]], file: str | Path) -> None:
    """Draw cosine similarity and relative L2 distance over the blocks, a line for each result.

    Args:
        results: by name, such as ``{"ID": ..., "OOD": ...}``, what :func:`feature_distortion` returned.
        file: to write; its ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("plot_distortion")
    axes = figure.subplots(1, 2)
    titles = {"cosine": "cosine similarity", "relative_l2": "relative L2 distance"}
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for label, result in results.items():
            axis.plot(list(result), [getattr(found, field) for found in result.values()], marker="o", label=label)
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=60)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file)


class FeatureDistortionCallback(TrainerCallback):
    """Measures at each evaluation how far the features have moved since training began.

    It adds ``distortion/<name>/blocks_cosine`` (the mean over blocks) and ``distortion/<name>/features_cosine`` to
    the evaluation's metrics and to the log; ``history`` holds all of it.

    Args:
        loaders: by name, such as ``{"id": ..., "ood": ...}``, batches that can be passed over again and again.
        reference: what to compare with; by default a copy of the model made when training begins. A resumed run
            needs it, since its model begins with trained weights.
        head: as for :func:`hf_ft.models.anatomy`.
        blocks: as for :func:`hf_ft.models.anatomy`.

    Attributes:
        history: for each evaluation its step, and the distortions by name.
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
                    f"FeatureDistortionCallback: resumed at step {state.global_step}, and distortion counts from "
                    "there. Pass reference=<the model before training>."
                )
            self._reference = copy.deepcopy(model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self._reference is None or not state.is_world_process_zero:
            return
        found = {name: self._measure(self._reference, model, loader) for name, loader in self.loaders.items()}
        self.history.append((state.global_step, found))
        figures = {f"distortion/{name}/{key}": v for name, result in found.items() for key, v in _short(result)}
        if metrics is not None:
            metrics.update(figures)
        # The evaluation's own entry is in the log already.
        state.log_history.append({"epoch": state.epoch, **figures, "step": state.global_step})


def _short(result: Distortions) -> Iterator[tuple[str, float]]:
    in_blocks = [found.cosine for name, found in result.items() if name != FEATURES]
    yield "blocks_cosine", sum(in_blocks) / len(in_blocks)
    yield "features_cosine", result[FEATURES].cosine


def _differences(before: Tensor, after: Tensor) -> Tensor:
    """Sums over samples of cosine, L2 and relative L2, (3,), of vectors (N, d)."""
    distance, length = (before - after).norm(dim=1), before.norm(dim=1)
    cosine = nn.functional.cosine_similarity(before, after, dim=1)
    return torch.stack([cosine.sum(), distance.sum(), (distance / length.clamp_min(1e-12)).sum()])


def _pool(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """One vector per sample, (N, C), in float64 on the CPU."""
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    mask = inputs.get("attention_mask")
    if values.dim() == 3 and isinstance(mask, Tensor) and mask.shape == values.shape[:2]:
        weights = mask.to(values).unsqueeze(2)
        values = (values * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
    elif values.dim() == 3:
        values = values.mean(dim=1)
    elif values.dim() > 3:
        values = values.flatten(2).mean(dim=2)
    return values.cpu().double()


@contextmanager
def _tapped(model: nn.Module, parts: Anatomy) -> Iterator[dict[str, Tensor]]:
    """What the blocks of a model gave out, and its head took in, in the last forward pass."""
    outputs: dict[str, Tensor] = {}
    known, handles = dict(model.named_modules()), []
    try:
        for part in (*parts.blocks, parts.head):
            name = part.modules[0] if part is parts.head else part.modules[-1]
            if name not in known:
                raise OptionError(f"feature_distortion: the second model has no module {name!r}; both must be alike.")
            if part is parts.head:
                handles.append(known[name].register_forward_pre_hook(partial(_keep, outputs, FEATURES)))
            else:
                handles.append(known[name].register_forward_hook(partial(_keep_output, outputs, part.name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    outputs[name] = inputs[0]


def _keep_output(outputs: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    outputs[name] = output[0] if isinstance(output, (tuple, list)) else output
