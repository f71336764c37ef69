"""The task loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from hf_ft.errors import OptionError
from hf_ft.functional import soft_cross_entropy
from hf_ft.models.feature_hooks import run


class TaskLoss:
    """The task loss alone, a mean over the micro-batch.

    Without arguments it is the model's own loss (which follows ``config.problem_type``); if the model returns none, the
    loss that Transformers' classifiers compute on their logits. For an ensemble it is the sum over its members.

    Labels (B, C) of a task with one class per sample are shares of several classes, as for mixed images: the loss is
    then the cross-entropy with these, whatever the model computes, with the same weights and smoothing.

    Args:
        label_smoother: label smoother that the Trainer creates from ``label_smoothing_factor``.
        class_weights: (C,), class weights of a cross-entropy. The mean is over rows, not over weights: otherwise the
            weight of a row would depend on which others share its micro-batch.
        compute_loss_func: ``f(outputs, labels, num_items_in_batch=...)``; the number refers to this micro-batch, so
            that a sum divided by it equals the mean. Labels may be shares (B, C).
    """

    def __init__(
        self,
        label_smoother: Callable[..., Tensor] | None = None,
        class_weights: Tensor | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
    ) -> None:
        self.label_smoother = label_smoother
        self.class_weights = class_weights
        self.compute_loss_func = compute_loss_func

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        config, labels = getattr(model, "config", None), batch.get("labels")
        if isinstance(labels, Tensor):
            labels = fitting_labels(labels, config)
            batch = {**batch, "labels": labels}
        own_loss = not (self.label_smoother or self.compute_loss_func or self.class_weights is not None)
        own_loss = own_loss and not are_shares(labels, config)
        inputs = batch if own_loss else {key: value for key, value in batch.items() if key != "labels"}
        outputs = classifier_outputs(run(model, inputs), config)
        if own_loss or labels is None:
            loss = outputs.pop("loss", None)
            return (loss_on_logits(model, outputs, labels) if loss is None and labels is not None else loss), outputs
        members = outputs.get("member_logits")
        whose = [outputs] if members is None else [{**outputs, "logits": logits} for logits in members]
        loss_of = self._soft_loss if are_shares(labels, config) else self._loss
        losses = [loss_of(one, labels) for one in whose]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), outputs

    def _loss(self, outputs: dict[str, Any], labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=labels.ne(-100).sum())
        if self.class_weights is not None:
            weights = self.class_weights.to(outputs["logits"].device)
            total = nn.functional.cross_entropy(outputs["logits"].float(), labels, weight=weights, reduction="sum")
            return total / labels.ne(-100).sum()
        assert self.label_smoother is not None
        return self.label_smoother(outputs, labels)

    def _soft_loss(self, outputs: dict[str, Any], shares: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, shares, num_items_in_batch=shares.sum())
        weights, logits = self.class_weights, outputs["logits"]
        smoothing = 0.0 if self.label_smoother is None else getattr(self.label_smoother, "epsilon", 0.0)
        return soft_cross_entropy(logits, shares, None if weights is None else weights.to(logits.device), smoothing)


def loss_on_logits(model: nn.Module, outputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """The loss for a model that returns none: cross-entropy, or what ``config.problem_type`` says.

    Raises:
        OptionError: if the model returns no logits either, or these do not fit the labels.
    """
    name, logits = type(model).__name__, outputs.get("logits")
    way_out = "Return a loss or logits (B, C) from its forward, or pass compute_loss_func=..."
    if not isinstance(logits, Tensor):
        raise OptionError(f"{name} returns neither a loss nor logits, only {sorted(outputs)}. {way_out}")
    by_class = logits.dim() == 2 and labels.shape == logits.shape[:1]
    if not by_class and labels.numel() != logits.numel():
        shapes = f"{tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}"
        raise OptionError(f"{name} returns no loss, and its logits of shape {shapes}. {way_out}")
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    like = SimpleNamespace(num_labels=logits.shape[-1], problem_type=kind)  # the model's own config stays as it is
    return ForSequenceClassificationLoss(labels, logits.float(), like)


def classifier_outputs(outputs: Any, config: Any = None) -> dict[str, Any]:
    """A classifier's outputs with one row of logits per sample, (B, C), whatever their name.

    Logits (B, 1, C) lose their second dimension. If no output is called ``logits``, the first one of shape
    (B, ``config.num_labels``) is used.
    """
    named = as_dict(outputs)
    if "logits" not in named:
        last = getattr(config, "num_labels", None)
        rows = [n for n, v in named.items() if isinstance(v, Tensor) and v.dim() == 2 and v.shape[1] == last]
        named = {"logits" if name in rows[:1] else name: value for name, value in named.items()}
    logits = named.get("logits")
    if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[1] == 1:
        named["logits"] = logits.squeeze(1)
    return named


def fitting_labels(labels: Tensor, config: Any) -> Tensor:
    """Labels in the type that the losses of Transformers need: classes as integers, anything else as floats."""
    kind = getattr(config, "problem_type", None)
    if kind in ("multi_label_classification", "regression"):
        return labels if labels.is_floating_point() else labels.float()
    return labels.long() if labels.dtype == torch.bool and labels.dim() == 1 else labels


def are_classes(labels: Any, config: Any) -> bool:
    """Whether labels (B,) are the classes of a task that has one class per sample; numbers may be integers as well."""
    usual = "regression" if getattr(config, "num_labels", None) == 1 else "single_label_classification"  # Transformers'
    kind = getattr(config, "problem_type", None) or usual
    integers = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return integers and kind == "single_label_classification"


def are_shares(labels: Any, config: Any) -> bool:
    """Whether labels are shares (B, C) of the classes of a task that has one class per sample."""
    kind = getattr(config, "problem_type", None)
    two = isinstance(labels, Tensor) and labels.dim() == 2 and labels.is_floating_point()
    return two and kind == "single_label_classification"


def as_dict(outputs: Any) -> dict[str, Any]:
    """Model outputs as a dictionary, including tuples (``return_dict=False``)."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    first_is_loss = outputs[0].dim() == 0
    return dict(zip(("loss", "logits") if first_is_loss else ("logits",), outputs, strict=False))
