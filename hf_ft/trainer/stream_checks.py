"""Checks before training on a stream of samples, which has neither a length nor rows by index."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_ft.core.config import FTConfig
from hf_ft.core.context import FrozenCache
from hf_ft.data.mixing import Mixing
from hf_ft.data.streams import is_map_style
from hf_ft.errors import OptionError
from hf_ft.trainer.context import measures_first
from hf_ft.trainer.training_stream import is_stream

logger = logging.get_logger(__name__)


def train_dataset_of(positional: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The training data among the Trainer's arguments after model and args."""
    return (
        inspect.signature(Trainer.__init__)
        .bind_partial(None, None, None, *positional, **keywords)
        .arguments.get("train_dataset")
    )


def check_counts(train_dataset: Any, **counts: int) -> None:
    """Check how many samples of a stream are read before training and shuffled.

    Raises:
        OptionError: if one of them is not such a number.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise OptionError(f"{name}={count!r} must be a number of samples, such as 256, or 0.")
        if count and train_dataset is not None and not is_stream(train_dataset):
            logger.warning(f"{name}={count} has no effect: train_dataset is read by index, and shuffled as a whole.")


def check_stream(
    configs: Iterable[FTConfig],
    args: TrainingArguments,
    train_dataset: Any,
    **how: Any,
) -> None:
    """Reject what needs the length of the training data or their rows by index, if they are a stream.

    Args:
        how: see :func:`check_streamable`.

    Raises:
        OptionError: naming the argument and the fix.
    """
    if not is_stream(train_dataset):
        return
    if args.max_steps <= 0 and not hasattr(train_dataset, "__len__"):
        raise OptionError(
            f"max_steps={args.max_steps}: train_dataset is a stream without a length, so a number of epochs means "
            "nothing. Set max_steps to the number of steps to train."
        )
    if getattr(train_dataset, "_distributed", None) is not None:
        raise OptionError(
            "train_dataset is already split among processes (split_dataset_by_node): pass the whole, which the trainer "
            "splits itself."
        )
    check_streamable(configs, max_steps=args.max_steps, **how)


def check_streamable(
    configs: Iterable[FTConfig],
    *,
    max_steps: int,
    cache: FrozenCache,
    mixing: Mixing,
    looks: bool,
    known: Collection[str] = (),
) -> None:
    """Reject strategies and settings that do not support a stream.

    Args:
        looks: whether a few samples may be read before training.
        known: names of strategies that have measured already.

    Raises:
        OptionError: naming the argument and the fix.
    """
    for config in configs:
        if config.must_measure() and not looks and config.ft_type not in known:
            raise OptionError(measures_first(config.ft_type))
    if cache.use == "always":
        raise OptionError(
            "frozen_cache='always' records each sample once, but a streamed train_dataset does not say which ones it "
            "yields. Use 'auto': the frozen part is then computed in every step."
        )
    if mixing and not (looks and max_steps > 0):
        raise OptionError(
            f"{mixing}: batches of an iterable train_dataset are mixed only with max_steps and a few samples read "
            "beforehand (measure_samples=8), on which the loss is checked. Set both, or pass a map-style data set."
        )


def can_look(train_dataset: Any, plain: Any, measure_samples: int) -> bool:
    """Whether training samples can be read before training."""
    return train_dataset is None or measure_samples > 0 or is_map_style(train_dataset if plain is None else plain)
