"""Checks before training on mixed batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_ft.core.config import FTConfig
from hf_ft.core.context import FrozenCache
from hf_ft.data.mixing import Mixing, class_shares
from hf_ft.data.rows import spread_rows
from hf_ft.errors import OptionError
from hf_ft.models.preserve import observing
from hf_ft.trainer.protocols import ForMixing

COMPARED = 4  # samples on which the loss with shares is compared with that with classes
CLOSE = 0.02  # relative difference that rounding to bfloat16 may cause


def check_settings(mixing: Mixing, configs: Iterable[FTConfig], cache: FrozenCache) -> None:
    """Reject mixup and CutMix with strategies or settings that do not support them.

    Raises:
        OptionError: naming the argument and the reason.
    """
    if not mixing:
        return
    for config in configs:
        if config.needs().hard_labels:
            raise OptionError(
                f"{mixing}: {config.ft_type} needs the class of each sample, but a mixed image has shares of two. Set "
                f"{' and '.join(f'{name}=0' for name in mixing.given)}, or use another strategy."
            )
    if cache.use == "always":
        raise OptionError(
            f"frozen_cache='always' would train on recorded samples, which {mixing} changes in every step. Use 'auto'."
        )


def check_mixable(mixing: Mixing, model: Any) -> None:
    """Reject mixup and CutMix for a model that does not classify images.

    Raises:
        OptionError: naming the argument and the reason.
    """
    if not mixing:
        return
    main = getattr(model, "main_input_name", None)
    if main is not None and not str(main).startswith("pixel_values"):
        raise OptionError(f"{mixing}: only images can be mixed, but {type(model).__name__} reads {main!r}.")
    if getattr(getattr(model, "config", None), "num_labels", None) is None:
        raise OptionError(f"{mixing} needs the number of classes: set num_labels in the model's config.")


def classes_of(model: Any) -> int | None:
    """The number of classes; None if labels are numbers, as in regression or with several labels per sample."""
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", None)
    numbers = getattr(config, "problem_type", None) in ("regression", "multi_label_classification")
    return None if numbers or classes == 1 else classes


def check_loss(trainer: ForMixing) -> None:
    """Check that the loss with shares of classes equals the loss with classes if one class has the whole share.

    A model may compute a loss of its own that only takes classes, and so may ``compute_loss_func``.

    Raises:
        OptionError: if they differ.
    """
    classes = classes_of(trainer.model) if trainer.mixing else None
    if classes is None:
        return
    samples = trainer.context().samples
    batch = samples.read(spread_rows(samples.count, COMPARED))
    labels = batch.get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(
            f"{trainer.mixing}: labels of one class per sample were expected, (B,) integers. For other labels, set "
            "model.config.problem_type to 'multi_label_classification' or 'regression'."
        )
    trainer.model.config.problem_type = "single_label_classification"  # as Transformers does with its first batch
    shares, function = class_shares(labels, classes), trainer.task_loss.compute_loss_func
    own = "the model" if function is None else "compute_loss_func"
    with observing(trainer.model), trainer.accelerator.autocast():
        try:
            one, other = (trainer.task_loss(trainer.model, {**batch, "labels": each})[0] for each in (labels, shares))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise OptionError(
                f"{trainer.mixing}: {own} computes no loss for shares of classes (B, C): {error}"
            ) from error
    if one is None or other is None or not bool(torch.isfinite(one)):
        return
    if not torch.isclose(one.float(), other.float(), rtol=CLOSE, atol=CLOSE):
        raise OptionError(
            f"{trainer.mixing}: {own} computes {float(one):.4g} for classes, but the loss with shares of classes is "
            f"{float(other):.4g}. Pass compute_loss_func=... that takes labels (B,) and (B, C)."
        )
