"""What is checked before any training: arguments that cannot work, labels, class weights, the last batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from hf_ft.core.compose import recommended_arguments
from hf_ft.core.config import FTConfig
from hf_ft.data.labels import class_labels
from hf_ft.errors import OptionError
from hf_ft.models.names import covers
from hf_ft.models.norms import batch_norms

logger = logging.get_logger(__name__)


def check_arguments(args: TrainingArguments, configs: Iterable[FTConfig] = ()) -> None:
    """Refuse by name what this trainer, or one of the strategies, cannot do.

    Raises:
        OptionError: sharded training, or what a strategy refuses.
    """
    for config in configs:
        config.check_arguments(args)
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise OptionError(
                f"args.{name}={getattr(args, name)!r}: sharded training is not supported, since strategies address "
                "single parameters. Use DDP (accelerate launch --multi_gpu), gradient accumulation, or activation "
                "checkpointing."
            )
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible to one process; DataParallel is not supported, the first is used. "
            "Start with `accelerate launch` to use all."
        )
        args._n_gpu = 1


def check_labels(dataset: Any, model: nn.Module) -> None:
    """Check class labels against the model's head, where they can be read without decoding the inputs.

    Raises:
        OptionError: a label lies outside [0, num_labels).
    """
    labels, classes = class_labels(dataset), getattr(getattr(model, "config", None), "num_labels", None)
    if labels is None or classes is None or len(labels) == 0 or classes == 1:
        return
    bad = labels[((labels < 0) | (labels >= classes)) & (labels != -100)]
    if bad.size:
        raise OptionError(
            f"train_dataset: label {bad[0]} lies outside [0, {classes}), the model's num_labels={classes}. "
            "Load the model with num_labels=<number of classes>, or map the labels to 0..num_labels-1."
        )


def class_weights_of(wanted: Any, dataset: Any, model: nn.Module, function: Any, label_smoother: Any) -> Tensor | None:
    """The weight of each class, (C,).

    Raises:
        OptionError: another number of weights than classes, or together with another loss.
    """
    if wanted is None:
        return None
    config: Any = getattr(model, "config", None)
    if function is not None or label_smoother is not None:
        raise OptionError("class_weights cannot be combined with compute_loss_func or label_smoothing_factor.")
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise OptionError(f"class_weights need single-label classes, the model's are {config.problem_type}.")
    classes = config.num_labels
    if isinstance(wanted, str):
        if wanted != "balanced":
            raise OptionError(f"class_weights={wanted!r}: 'balanced', or one number per class.")
        labels = class_labels(dataset)
        if labels is None:
            raise OptionError("class_weights='balanced' needs a column of labels in train_dataset; pass numbers.")
        present = np.unique(labels)
        wanted = np.ones(classes)  # a class without samples is never weighed
        wanted[present] = compute_class_weight("balanced", classes=present, y=labels)
    weights = torch.as_tensor(wanted, dtype=torch.float32)
    if weights.shape != (classes,) or not bool((weights >= 0).all()):
        raise OptionError(f"class_weights={wanted!r}: {classes} non-negative numbers are needed, one per class.")
    return weights


def check_last_batch(trainer: Any, objective: Any) -> None:
    """BatchNorm in train mode fails on one sample with 1x1 maps: tell before, not at the end of an epoch.

    Raises:
        OptionError: the last batch of an epoch holds one sample, and the model cannot train on it.
    """
    args, dataset = trainer.args, trainer.train_dataset
    norms = [norm for _, norm in batch_norms(objective) if norm.training]
    alone = hasattr(dataset, "__len__") and len(dataset) % trainer._train_batch_size == 1
    if not alone or not norms or args.dataloader_drop_last or args.world_size > 1:
        return
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            rows = trainer._get_dataloader(torch.utils.data.Subset(dataset, [0]), "Probing", 1)
            objective.train()
            objective.task_loss(objective.model, trainer._prepare_inputs(next(iter(rows))))
    except ValueError as error:
        raise OptionError(
            f"per_device_train_batch_size={trainer._train_batch_size}: with {len(dataset)} samples the last batch "
            f"holds one, on which BatchNorm cannot train ({error}). Set dataloader_drop_last=True, or another size."
        ) from error
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm.load_state_dict(buffers, strict=False)


def warn_slow_statistics(model: nn.Module, trained: Collection[str], steps: int) -> None:
    """Say where BatchNorm statistics cannot follow the weights in so few steps, so that evaluation sees old ones."""
    slow = [
        norm.momentum
        for name, norm in batch_norms(model)
        if norm.momentum is not None and norm.momentum < 0.05 and any(covers(name, other) for other in trained)
    ]
    moved = 1 - (1 - max(slow)) ** steps if slow else 1.0
    if moved < 0.9:
        logger.warning(
            f"BatchNorm momentum {max(slow):g} of {len(slow)} layers: in {steps} steps their running statistics go "
            f"{100 * moved:.0f} % of the way to those of the training data, and scores are computed with what they are "
            "then. Set batch_norm_momentum=0.1, or train longer."
        )


def warn_recommended(configs: Iterable[FTConfig], args: TrainingArguments) -> None:
    """Say which training arguments differ from what the method's source uses."""
    wanted = recommended_arguments(configs)
    untouched = TrainingArguments.__dataclass_fields__["learning_rate"].default
    differing = []
    for name, value in wanted.items():
        given = getattr(args, name)
        given = getattr(given, "value", given)
        # A rate is tuned: only one that was never set is worth a word.
        if given != value.value and (name != "learning_rate" or given == untouched):
            why = f": {value.why}" if value.why else ""
            differing.append(f"{name}={given!r} (recommended: {value.value!r}, {value.source}{why})")
    if differing:
        names = ", ".join(config.ft_type for config in configs)
        logger.warning(f"{names}: these training arguments differ from the recommended ones: {'; '.join(differing)}.")
