"""End training once the validation score no longer improves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import EarlyStoppingCallback, TrainingArguments

from hf_ft.errors import OptionError


def patience_callback(patience: int, args: TrainingArguments) -> EarlyStoppingCallback:
    """Ends training after this many evaluations in a row without a better score.

    Raises:
        OptionError: if ``patience`` is less than 1, or there is no score to watch.
    """
    if patience < 1:
        raise OptionError(
            f"patience={patience}: it must be a number of evaluations without a better score, at least 1."
        )
    if not args.load_best_model_at_end:
        raise OptionError(
            f"patience={patience} watches the score that chooses the best model, but load_best_model_at_end is False: "
            "set it to True, with an eval_strategy."
        )
    return EarlyStoppingCallback(early_stopping_patience=patience)


def stopped_early(callbacks: Iterable[Any]) -> bool:
    """Whether the run was ended by this callback; known after a resume if callbacks are restored."""
    stops = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    return any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops)
