"""Checks before training: arguments, labels, class weights, and the size of the last batch."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_ft.core.compose import check_composed, check_examples, chooses_rate, recommended_arguments, shared_option
from hf_ft.core.config import FTConfig
from hf_ft.core.plan import Plan
from hf_ft.data.label_checks import IGNORED, check_labels
from hf_ft.data.labels import class_labels
from hf_ft.data.streams import is_map_style
from hf_ft.engine.objective import Objective
from hf_ft.engine.set_up import check, check_members
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import covers
from hf_ft.models.norms import batch_norms
from hf_ft.trainer.context import curve, measures_first
from hf_ft.trainer.protocols import ForProbe
from hf_ft.trainer.selection import metric_of
from hf_ft.trainer.sharding import check_shardable, check_sharding, check_whole
from hf_ft.trainer.source_streams import data_of
from hf_ft.trainer.trackers import check as check_trackers

logger = logging.get_logger(__name__)
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def preflight(
    configs: tuple[FTConfig, ...],
    args: TrainingArguments,
    model: nn.Module | None,
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    source_dataset: Any,
    looks: bool = True,
) -> None:
    """Reject invalid arguments before the Trainer creates its output folder.

    Args:
        model: None if the Trainer creates it; :func:`check_model` must then be called afterwards.
        positional, keywords: the Trainer's arguments after model and args.
        looks: whether training data can be looked at before training.

    Raises:
        OptionError: for any error that can be detected without reading the data.
    """
    check_composed(configs)
    check_trackers(args.report_to)
    check_arguments(args, configs)
    check_source(configs, source_dataset)
    if model is not None:
        given = inspect.signature(Trainer.__init__).bind_partial(None, model, args, *positional, **keywords).arguments
        optimizer, scheduler = given.get("optimizers", (None, None))
        check_shardable(args, model, optimizer)
        data = given.get("train_dataset"), given.get("eval_dataset")
        check_model(configs, args, model, *data, scheduler, source_dataset, looks)
        check_smoothing(args, model, given.get("compute_loss_func"))


def check_model(
    configs: tuple[FTConfig, ...],
    args: TrainingArguments,
    model: nn.Module,
    train_dataset: Any,
    eval_dataset: Any,
    scheduler: Any,
    source_dataset: Any,
    looks: bool = True,
) -> None:
    """Reject a model that does not fit its data or the strategies.

    The plan built here is used for checks only: the weights, and with them the reference of the terms, may have
    changed by the time training begins.

    Raises:
        OptionError: naming what does not fit.
    """
    check_whole(model)
    check_some_batch(args, train_dataset)
    check_datasets(model, train_dataset, eval_dataset)
    check_evaluation(configs, args, eval_dataset)
    check_members(configs, model)
    check_parts(configs, model)
    if any(config.must_measure() for config in configs):  # the plan depends on the measurement
        for config in configs:
            config.check_model(model)
        check_examples(configs, model)
        return
    trainable = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    plan = check(configs, model, {}, trainable)
    if not looks and plan.select and batch_norms(model):
        raise OptionError(measures_first(f"{plan.select[0].name} renews BatchNorm statistics and"))
    if not looks and plan.tensor_rates is not None:
        raise OptionError(measures_first(plan.tensor_rates.name))
    for stream in plan.streams:
        stream.batch_size(args.per_device_train_batch_size)
        if stream.prepare is not None:
            stream.prepare(data_of(stream, source_dataset))
    own = [stage for stage in plan.stages if stage.schedule is not None]
    if len(plan.stages) == 1 and not own:
        return
    if scheduler is not None:
        kind = "schedule" if own else f"{len(plan.stages)} stages"
        raise OptionError(
            f"optimizers: a custom scheduler cannot follow the {kind} of {plan.owner!r}; pass (optimizer, None)"
            + ("." if own else " and choose args.lr_scheduler_type.")
        )
    curve(args, 10)  # raises if the schedule cannot run once per stage


def check_evaluation(configs: Iterable[FTConfig], args: TrainingArguments, eval_dataset: Any) -> None:
    """Check whether there are data to choose a final model on, for strategies that need them.

    Raises:
        OptionError: if there are none, or if there are several and the metric belongs to none of them.
    """
    for config in configs:
        needs = config.needs()
        if needs.evaluation_data and eval_dataset is None:
            raise OptionError(
                f"{config.ft_type} chooses on evaluation data after training: pass eval_dataset=... to FTTrainer "
                f"(--validation_fraction on the command line){needs.without_evaluation_data}."
            )
        if needs.evaluation_data and isinstance(eval_dataset, Mapping):
            metric, _ = metric_of(args)
            if not any(metric.startswith(f"eval_{name}_") for name in eval_dataset):
                raise OptionError(
                    f"{config.ft_type} chooses by {metric}, but eval_dataset has the parts {', '.join(eval_dataset)}: "
                    f"set metric_for_best_model to a metric of one of them, such as {next(iter(eval_dataset))}_loss."
                )


def check_parts(configs: Iterable[FTConfig], model: nn.Module) -> None:
    """Check the head and blocks given by the user, whether or not the strategies need them.

    Raises:
        OptionError: if the model has no such modules.
    """
    head, blocks = (shared_option(configs, name) for name in ("head", "blocks"))
    if head is not None or blocks is not None:
        anatomy(model, head=head, blocks=blocks)


def check_source(configs: Iterable[FTConfig], dataset: Any) -> None:
    """Check whether the source data are missing, unused or invalid, as far as possible without a plan.

    Raises:
        OptionError: if a strategy needs source data and there are none, or they are empty or not a data set.
    """
    if dataset is None:
        for config in configs:
            if config.needs().source_data == "required":
                raise OptionError(
                    f"{config.ft_type} needs the pretraining data: pass source_dataset=... to FTTrainer "
                    f"(--source_dataset on the command line){config.needs().without_source_data}."
                )
        return
    if all(config.needs().source_data == "no" for config in configs):
        names = ", ".join(config.ft_type for config in configs)
        logger.warning(f"source_dataset is ignored: {names} does not use source data.")
    elif isinstance(dataset, (str, Mapping)):
        what = f"of the splits {list(dataset)}" if isinstance(dataset, Mapping) else repr(dataset)
        raise OptionError(f"source_dataset is a {type(dataset).__name__} {what}: pass a single data set.")
    elif is_map_style(dataset) and not len(dataset):
        raise OptionError("source_dataset contains no samples: pass one that does.")


def check_arguments(args: TrainingArguments, configs: Sequence[FTConfig] = ()) -> None:
    """Reject training arguments that this trainer or one of the strategies does not support.

    Raises:
        OptionError: for sharded training, a batch without samples, or arguments that a strategy rejects.
    """
    check_counts(args)
    for config in configs:
        config.check_arguments(args)
    check_sharding(args, configs)
    if args.n_gpu > 1:
        logger.warning(
            f"{args.n_gpu} GPUs are visible to one process; DataParallel is not supported, so only the first is used. "
            "Start with `accelerate launch` to use all of them."
        )
        args._n_gpu = 1


def check_counts(args: TrainingArguments) -> None:
    """Check how many samples and batches make an update.

    Raises:
        OptionError: if a number is less than 1.
    """
    for name in COUNTS:
        if getattr(args, name) < 1:
            raise OptionError(f"{name}={getattr(args, name)} must be at least 1.")


def check_some_batch(args: TrainingArguments, dataset: Any) -> None:
    """Check that an epoch has a batch for each process, if incomplete ones are dropped.

    Raises:
        OptionError: if it has none: the Trainer would train nothing, without an error if ``max_steps`` is set.
    """
    size = args.per_device_train_batch_size
    if args.dataloader_drop_last and is_map_style(dataset) and len(dataset) < size * args.world_size:
        processes = f" on {args.world_size} processes" if args.world_size > 1 else ""
        raise OptionError(
            f"dataloader_drop_last=True: {len(dataset)} samples do not fill a batch of per_device_train_batch_size="
            f"{size}{processes}. Set it to False, or use smaller batches."
        )


def check_datasets(model: nn.Module, train_dataset: Any, eval_dataset: Any) -> None:
    """Check the labels of all data sets against the model's head, and record the kind of task in its config.

    Transformers sets ``config.problem_type`` when the first batch arrives, but losses, head rates and class weights
    depend on it before.

    Raises:
        OptionError: if a label does not fit.
    """
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", None)
    if config is None or classes is None:
        return
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    named = {"train_dataset": train_dataset}
    named |= {f"eval_dataset[{name!r}]" if name else "eval_dataset": data for name, data in evaluated.items()}
    for where, dataset in named.items():
        kind = check_labels(dataset, where, classes, getattr(config, "problem_type", None))
        if kind is not None:
            config.problem_type = kind


def check_smoothing(args: TrainingArguments, model: nn.Module, function: Any) -> None:
    """Check that labels can be smoothed.

    Raises:
        OptionError: if samples do not have one class each.
    """
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if args.label_smoothing_factor and function is None and kind in ("regression", "multi_label_classification"):
        raise OptionError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs single-label classification, but the model's "
            f"problem_type is {kind}: leave it out."
        )


def class_weights_of(wanted: Any, dataset: Any, model: nn.Module, function: Any, label_smoother: Any) -> Tensor | None:
    """The weight of each class, (C,), scaled to a mean of 1 over the training rows if their labels are known.

    Raises:
        OptionError: if the number of weights differs from the number of classes, or with another loss.
    """
    if wanted is None:
        return None
    config: Any = getattr(model, "config", None)
    if function is not None or label_smoother is not None:
        raise OptionError("class_weights cannot be combined with compute_loss_func or label_smoothing_factor.")
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise OptionError(
            f"class_weights need single-label classification, but the model's problem_type is {config.problem_type}."
        )
    classes = config.num_labels
    labels = class_labels(dataset)
    labels = None if labels is None else labels[labels != IGNORED]
    if isinstance(wanted, str):
        if wanted != "balanced":
            raise OptionError(f"class_weights={wanted!r} must be 'balanced' or one number per class.")
        if labels is None or not len(labels):
            raise OptionError("class_weights='balanced' needs a label column in train_dataset; pass numbers instead.")
        present = np.unique(labels)
        wanted = np.ones(classes)  # the weight of a class without samples is never used
        wanted[present] = compute_class_weight("balanced", classes=present, y=labels)
    weights = torch.as_tensor(wanted, dtype=torch.float32)
    if weights.shape != (classes,) or not bool((weights >= 0).all()):
        raise OptionError(f"class_weights={wanted!r} must be {classes} non-negative numbers, one per class.")
    if labels is None or not len(labels):
        return weights
    mean = float(weights[torch.as_tensor(labels)].double().mean())
    if mean == 0:
        raise OptionError(f"class_weights={wanted!r} are 0 for all classes that occur in train_dataset.")
    return weights / mean


def check_last_batch(trainer: ForProbe, objective: Objective) -> None:
    """Check the last batch: BatchNorm in train mode fails on a single sample with 1x1 feature maps.

    Raises:
        OptionError: if the last batch of an epoch, or each of them, has one sample and the model cannot train on it.
    """
    args, dataset, size = trainer.args, trainer.train_dataset, trainer._train_batch_size
    norms = [norm for _, norm in batch_norms(objective) if norm.training]
    if not norms or not is_map_style(dataset) or not len(dataset):
        return
    last = len(dataset) % size == 1 and not args.dataloader_drop_last and args.world_size == 1
    if size > 1 and not last:
        return
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            rows = trainer._get_dataloader(torch.utils.data.Subset(dataset, [0]), "Probing", 1)
            objective.train()
            objective.task_loss(objective.model, trainer._prepare_inputs(next(iter(rows))))
    except ValueError as error:
        which = f"with {len(dataset)} samples, the last batch has" if size > 1 else "each batch has"
        remedy = "Set dataloader_drop_last=True, or use another size." if size > 1 else "Use larger batches."
        raise OptionError(
            f"per_device_train_batch_size={size}: {which} a single sample, on which BatchNorm cannot train ({error}). "
            f"{remedy}"
        ) from error
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm.load_state_dict(buffers, strict=False)


def warn_slow_statistics(model: nn.Module, trained: Collection[str], steps: int) -> None:
    """Warn if training is too short for BatchNorm statistics to follow the weights: they would be outdated."""
    slow = [
        norm.momentum
        for name, norm in batch_norms(model)
        if norm.momentum is not None and norm.momentum < 0.05 and any(covers(name, other) for other in trained)
    ]
    moved = 1 - (1 - max(slow)) ** steps if slow else 1.0
    if moved < 0.9:
        logger.warning(
            f"BatchNorm momentum {max(slow):g} of {len(slow)} layers: in {steps} steps, their running statistics move "
            f"{100 * moved:.0f} % of the way to those of the training data, and evaluation uses the statistics reached "
            "by then. Set batch_norm_momentum=0.1, or train longer."
        )


def warn_own_schedule(plan: Plan, args: TrainingArguments) -> None:
    """Warn about arguments of the learning rate schedule if stages have a schedule of their own."""
    own = [stage.name for stage in plan.stages if stage.schedule is not None]
    names = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    given = {name: getattr(args, name, None) for name in names}
    changed = [f"{n}={getattr(v, 'value', v)!r}" for n, v in given.items() if v and v != defaults.get(n)]
    if own and changed:
        logger.warning_once(
            f"{plan.owner}: {', '.join(changed)} has no effect in the stages {', '.join(own)}, which have a schedule "
            "of their own."
        )


def warn_left_out(plan: Plan) -> None:
    """Warn about modules that the user's optimizer does not train."""
    names = ", ".join(plan.term_modules)
    logger.warning(
        f"optimizers: this optimizer does not contain the extra parameters that {names} would train; they stay fixed."
    )


def warn_recommended(configs: Iterable[FTConfig], args: TrainingArguments, model: nn.Module) -> None:
    """Warn about training arguments that differ from those recommended for the method and the model."""
    configs = tuple(sorted(configs, key=lambda config: not chooses_rate(config)))
    present = recommended_arguments(configs, OptimizerNames(args.optim).value, model)
    # These are meant to be chosen, and depend on the optimizer: warn only if the user did not set them.
    chosen = {name: present[name] for name in ("learning_rate", "max_grad_norm", "warmup_steps") if name in present}
    stated = {name: value for config in reversed(configs) for name, value in config.recommended.items()}
    differing = []
    for name, value in (stated | chosen).items():
        if value.found:
            continue
        given = getattr(args, name)
        given = getattr(given, "value", given)
        unset = given == TrainingArguments.__dataclass_fields__[name].default
        if given != value.value and (unset or name not in chosen):
            why = f": {value.why}" if value.why else ""
            differing.append(f"{name}={given!r} (recommended: {value.value!r}, {value.source}{why})")
    if differing:
        names = ", ".join(config.ft_type for config in configs)
        logger.warning(f"{names}: these training arguments differ from the recommended ones: {'; '.join(differing)}.")
