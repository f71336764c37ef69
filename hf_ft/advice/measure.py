"""Measure the signals: one pass over the data without gradients, then a few batches with gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_ft.advice.signals import Shift, Signals
from hf_ft.advice.transferability import (
    Array,
    Probe,
    cross_validated_probe,
    cross_validated_relationship,
    fit_probe,
    logme,
)
from hf_ft.data.groups import given_groups
from hf_ft.data.label_checks import IGNORED
from hf_ft.data.labels import class_labels
from hf_ft.data.rows import read_rows
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy, members_of, unwrap
from hf_ft.models.architectures import TRAIN_MODE_ALONE
from hf_ft.models.batch_norm import BatchNormStatistics, estimate_batch_norm
from hf_ft.models.border import Border
from hf_ft.models.feature_hooks import Taps, model_inputs
from hf_ft.models.find_layouts import head_layout
from hf_ft.models.layouts import PLAIN, Layout
from hf_ft.models.names import matches
from hf_ft.models.norms import batch_norms
from hf_ft.models.parts import Part
from hf_ft.models.preserve import evaluating, observing, random_states_kept
from hf_ft.models.source_head import SourceHead, border_head, has_source_head, source_head

Collate = Callable[[list[Any]], Mapping[str, Any]]
LIMIT = 5000  # samples used; more would change the figures too little to affect the advice
BATCH = 32
GRADIENT_BATCHES = 4


@dataclass
class Recorded:
    """Values recorded in one pass over the data; statistics of all samples, the rest of the n that have a label.

    Attributes:
        rows: their rows in the data set, (n,).
        features: inputs of the head, (n, D).
        labels: (n,).
        source: class probabilities of the pretrained head, (n, C_s), if there is one.
        statistics: statistics of each BatchNorm layer's input, by layer name.
    """

    rows: NDArray[Any]
    features: Array
    labels: NDArray[Any]
    source: Array | None = None
    statistics: Mapping[str, BatchNormStatistics] = field(default_factory=dict)


def measure_signals(
    model: nn.Module,
    dataset: Any,
    collate: Collate,
    *,
    source_head: bool,
    source_data: bool,
    members: int = 1,
    seed: int = 0,
    head: str | None = None,
    blocks: str | None = None,
    groups: Any = None,
) -> Signals:
    """Measure a pretrained model on its training data, leaving the model, its modes and the random states unchanged.

    At most ``LIMIT`` samples are used, drawn at random. Arguments as for :func:`hf_ft.advice.advise`.

    Raises:
        OptionError: if the model has several members, the data set has no length, labels are not one class per
            sample, there are fewer than two classes, or features are not finite.
    """
    started = time.perf_counter()
    if members_of(model):
        raise OptionError(
            "advise measures a single model: pass one member of the ensemble, and members=<number of members>."
        )
    if not hasattr(dataset, "__len__"):
        raise OptionError("advise measures the training data: train_dataset must be map-style, not iterable.")
    numbers = given_groups(groups, dataset)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[:LIMIT]
    parts = anatomy(model, head=head, blocks=blocks)
    with random_states_kept(seed):
        layout = _head_layout(model, dataset, collate, rows, parts.head.modules)
        recorded = record(model, dataset, collate, rows, parts.head.modules, layout)
        labelled = recorded.rows.tolist()
        if len(np.unique(recorded.labels)) < 2:
            raise OptionError(
                f"advise: all {len(labelled)} samples have the same label, but at least two classes are needed. Check "
                "the labels."
            )
        few = labelled[: BATCH * GRADIENT_BATCHES]
        backbone = parts.backbone
        probe = fit_probe(recorded.features, recorded.labels)
        batches = _batches(dataset, collate, few)
        gradients = relative_gradients(model, probe, batches, backbone, parts.head.modules, layout)
    held = None if numbers is None else numbers[labelled]
    score = cross_validated_probe(recorded.features, recorded.labels, seed, held)
    source = recorded.source
    related = None if source is None else cross_validated_relationship(source, recorded.labels, seed, held)
    samples, class_counts = _population(dataset, recorded.labels, len(labelled) / len(rows))
    return Signals(
        samples=samples,
        class_counts=class_counts,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        feature_size=recorded.features.shape[1],
        logme=logme(recorded.features, recorded.labels),
        logme_constant=logme(np.ones((len(labelled), 1)), recorded.labels),
        probe_accuracy=score.accuracy if score else None,
        probe_balanced_accuracy=score.balanced_accuracy if score else None,
        probe_std=score.std if score else None,
        probe_folds=score.folds if score else 0,
        probe_classes=score.classes if score else None,
        source_relation=related.balanced_accuracy if related else None,
        batch_norm=shifts(model, recorded.statistics),
        gradients=gradients,
        source_head=source_head,
        source_data=source_data,
        members=members,
        forward_samples=len(rows),
        backward_samples=len(few),
        seconds=time.perf_counter() - started,
    )


def record(
    model: nn.Module,
    dataset: Any,
    collate: Collate,
    rows: Sequence[int],
    modules: Sequence[str],
    layout: Layout = PLAIN,
) -> Recorded:
    """Record features, labels, the pretrained head's probabilities and BatchNorm statistics in a single pass.

    Args:
        modules: module names of the head.
        layout: how its input is laid out.

    Raises:
        OptionError: if labels are not one class per sample, or features are not finite.
    """
    features, labels, probabilities = [], [], []
    kept = source_head(model).to(next(model.parameters()).device) if has_source_head(model) else None

    def batches() -> Iterator[Mapping[str, Any]]:
        for batch in _batches(dataset, collate, rows):
            labels.append(_labels(batch))
            border = Border(model, border_head(model, tuple(modules)))
            with Taps(model, head=modules) as taps, border.recording():
                yield batch  # the caller runs the model here, inside the hooks
            features.append(pooled_features(taps, batch, layout).detach().cpu().double().numpy())
            if kept:
                probabilities.append(_probabilities(kept, border))

    statistics: Mapping[str, BatchNormStatistics] = {}
    if batch_norms(model):
        statistics = estimate_batch_norm(model, batches(), "pooled")
    else:
        device = next(model.parameters()).device
        with observing(model):
            for batch in batches():
                model(**model_inputs(batch, device))
    inputs, classes = np.concatenate(features), np.concatenate(labels)
    if not np.isfinite(inputs).all():
        raise OptionError("advise: the head's input is not finite: check the inputs for NaN or infinite values.")
    source = np.concatenate(probabilities) if kept else None
    known = classes != IGNORED
    source = None if source is None else source[known]
    return Recorded(np.asarray(rows)[known], inputs[known], classes[known], source, statistics)


def _head_layout(
    model: nn.Module, dataset: Any, collate: Collate, rows: Sequence[int], modules: Sequence[str]
) -> Layout:
    """How the input of the head is laid out."""
    with random_states_kept():
        batch = model_inputs(collate(read_rows(dataset, rows[:2])), next(model.parameters()).device)
        return head_layout(model, tuple(modules), batch)


def pooled_features(taps: Taps, batch: Mapping[str, Any], layout: Layout = PLAIN) -> Tensor:
    """The head's input, one vector per sample (B, D); sequences are averaged over their valid tokens."""
    features = taps.features
    if features is None:
        raise OptionError("advise: the head is not called in the forward pass: set its module name with head=...")
    if features.dim() == 3:
        features = layout.arranged(features)
        mask = layout.mask(batch, features)
        weight = torch.ones_like(features[..., :1]) if mask is None else mask.to(features)[..., None]
        features = (features * weight).sum(1) / weight.sum(1).clamp_min(1)
    return features.float()


def shifts(model: nn.Module, statistics: Mapping[str, BatchNormStatistics]) -> dict[str, Shift]:
    """The shift between each BatchNorm layer's running statistics and its statistics on the target."""
    by_layer = {}
    for name, norm in batch_norms(model):
        if name not in statistics or norm.running_mean is None or norm.running_var is None:
            continue
        mean, var = norm.running_mean.cpu().double(), norm.running_var.cpu().double() + norm.eps
        there, spread = statistics[name].mean.cpu(), statistics[name].var.cpu() + norm.eps
        moved = (there - mean).abs() / ((var + spread) / 2).sqrt()
        by_layer[name] = Shift(float(moved.mean()), float((spread / var).log().abs().mean() / 2))
    return by_layer


def relative_gradients(
    model: nn.Module,
    probe: Probe,
    batches: Iterator[Mapping[str, Any]],
    parts: Sequence[Part],
    head: Sequence[str],
    layout: Layout = PLAIN,
) -> dict[str, float]:
    r"""Each part's share of the sum of :math:`\|g_b\| / \|w_b\|`, averaged over the batches, in eval mode.

    The loss is the cross-entropy with the fitted probe in place of the head: a new head is random, and so would be
    the gradients it propagates. Empty for the few types that have gradients only in train mode.

    Reference: Lee et al. Surgical Fine-Tuning Improves Adaptation to Distribution Shifts. ICLR 2023 (relative
        gradient norm).
    """
    base = unwrap(model)[0]
    if getattr(getattr(base, "config", None), "model_type", None) in TRAIN_MODE_ALONE:
        return {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = {part.name: [n for n in trained if matches(n, part.modules)] for part in parts}
    groups = {name: names for name, names in groups.items() if names}
    if not groups:
        return {}
    ratios = dict.fromkeys(groups, 0.0)
    for batch in batches:
        gradients = _gradients(
            model, probe, batch, [n for names in groups.values() for n in names], trained, head, layout
        )
        for name, names in groups.items():
            weights = _norm([trained[n].detach() for n in names])
            ratios[name] += _norm([gradients[n] for n in names]) / weights if weights else 0.0
    total = sum(ratios.values())
    return {name: value / total for name, value in ratios.items()} if total > 0 else {}


def _gradients(
    model: nn.Module,
    probe: Probe,
    batch: Mapping[str, Any],
    names: Sequence[str],
    trained: Mapping[str, nn.Parameter],
    head: Sequence[str],
    layout: Layout,
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    with evaluating(model), torch.enable_grad():
        with Taps(model, head=head) as taps:
            model(**model_inputs(batch, device))
        features = pooled_features(taps, batch, layout)
        weight, bias = (torch.as_tensor(a, dtype=features.dtype, device=device) for a in (probe.weight, probe.bias))
        target = torch.as_tensor(np.searchsorted(probe.classes, _labels(batch)), device=device)
        loss = nn.functional.cross_entropy(features @ weight.T + bias, target)
        found = torch.autograd.grad(loss, [trained[name] for name in names], allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.float().square().sum()) for tensor in tensors) ** 0.5


def _batches(dataset: Any, collate: Collate, rows: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(rows), BATCH):
        yield collate(read_rows(dataset, rows[start : start + BATCH]))


def _labels(batch: Mapping[str, Any]) -> NDArray[Any]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        actual = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise OptionError(f"advise: 'labels' are {actual}, but one integer class per sample, (B,), is needed.")
    return labels.cpu().numpy()


@torch.no_grad()
def _probabilities(head: SourceHead, border: Border) -> Array:
    return nn.functional.softmax(head(border), dim=-1).cpu().double().numpy()


def _population(dataset: Any, seen: NDArray[Any], share: float) -> tuple[int, tuple[int, ...]]:
    """Number of samples with a label, and of those per non-empty class, smallest first.

    Estimates if not all labels can be read: from the labels seen, and their share of the samples seen.
    """
    known = class_labels(dataset)
    labels = seen if known is None else known[known != IGNORED]
    samples = round(len(dataset) * share) if known is None else len(labels)
    counts = np.unique(labels, return_counts=True)[1]
    scale = samples / counts.sum()
    return samples, tuple(sorted(max(1, round(float(count * scale))) for count in counts))
