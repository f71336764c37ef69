"""``hf_ft.compare``: from a model, data and names of strategies to results."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from hf_ft.comparison.contenders import Strategies
from hf_ft.comparison.prepare import prepare_comparison
from hf_ft.comparison.results import Results
from hf_ft.comparison.runner import Tell
from hf_ft.comparison.settings import Settings
from hf_ft.comparison.task import Data, Loader
from hf_ft.trainer.trainer import ClassWeights


def compare(
    model: str | Loader,
    data: DatasetDict | Data,
    strategies: Strategies = "all",
    *,
    output_dir: str | Path,
    settings: Settings | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    class_weights: ClassWeights | None = None,
    command: str | None = None,
    advised: bool = False,
    tell: Tell = print,
    **arguments: Any,
) -> Results:
    """Compare strategies with the same tuning budget each, and save the winner.

    A comparison that was interrupted, or whose time was up, goes on when it is called again with the same
    ``output_dir``; several processes that call it at the same time share the work.

    Args:
        model: a Hub id, a folder, a short name; or a function of a seed and of whether to keep the
            pretrained head, that gives a model with a new head and its processor.
        data: the splits ``train``, ``validation``, ``test`` and, if you like, ``ood``: test data out of
            distribution. Or :class:`Data`, which says more.
        strategies: ``"all"``; names joined by commas, where ``a+b`` composes; or a list of names and configs. Full
            fine-tuning always takes part. Options that a config sets are not tuned.
        output_dir: for ``results.json``, ``report.html``, ``report.md`` and ``best``, the winner.
        settings: the budget.
        image_size: side of the images, in pixels.
        revision: of the model on the Hub.
        class_weights: as :class:`~hf_ft.trainer.FTTrainer` takes them.
        command: what makes the comparison again, for the report.
        advised: look at model and data first (:func:`hf_ft.advice.advise`), and take the strategies in the order that
            follows: under ``settings.hours`` the promising ones come first.
        tell: told in a line what happens.
        arguments: training arguments for all strategies, such as ``num_train_epochs``.

    Raises:
        OptionError: a value that cannot work, or an ``output_dir`` that holds another comparison.
    """
    prepared = prepare_comparison(
        model, data, strategies, output_dir=output_dir, settings=settings, image_size=image_size, revision=revision,
        class_weights=class_weights, tell=tell, **arguments,
    )  # fmt: skip
    advice = prepared.advised() if advised else None
    tell(prepared.estimate())
    prepared.runner.run()
    return prepared.finish(command or shlex.join(sys.argv), advice)
