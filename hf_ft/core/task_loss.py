"""The task loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TaskLoss:
    """The task loss alone, a mean over the micro-batch.

    Without arguments it is the model's own loss (which follows ``config.problem_type``). For an ensemble it is the sum
    over its members.

    Args:
        label_smoother: label smoother that the Trainer creates from ``label_smoothing_factor``.
        class_weights: (C,), class weights of a cross-entropy. The mean is over rows, not over weights: otherwise a row
            would count more or less, depending on which others share its micro-batch.
        compute_loss_func: ``f(outputs, labels, num_items_in_batch=...)``; the number is that of this micro-batch, so
            that a sum divided by it equals the mean.
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
        if isinstance(batch.get("labels"), Tensor):
            batch = {**batch, "labels": fitting_labels(batch["labels"], getattr(model, "config", None))}
        own_loss = not (self.label_smoother or self.compute_loss_func or self.class_weights is not None)
        if own_loss or batch.get("labels") is None:
            outputs = as_dict(model(**batch))
            return outputs.pop("loss", None), outputs
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        outputs = as_dict(model(**inputs))
        members = outputs.get("member_logits")
        whose = [outputs] if members is None else [{**outputs, "logits": logits} for logits in members]
        losses = [self._loss(one, batch["labels"]) for one in whose]
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


def fitting_labels(labels: Tensor, config: Any) -> Tensor:
    """Labels in the type that the losses of Transformers need: classes as integers, anything else as floats."""
    kind = getattr(config, "problem_type", None)
    if kind in ("multi_label_classification", "regression"):
        return labels if labels.is_floating_point() else labels.float()
    return labels.long() if labels.dtype == torch.bool and labels.dim() == 1 else labels


def as_dict(outputs: Any) -> dict[str, Any]:
    """Model outputs as a dictionary, including tuples (``return_dict=False``)."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    first_is_loss = outputs[0].dim() == 0
    return dict(zip(("loss", "logits") if first_is_loss else ("logits",), outputs, strict=False))
