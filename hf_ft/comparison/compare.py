"""``hf_ft.compare``: compare strategies on a model and a data set."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from datasets import DatasetDict

from hf_ft.comparison.contenders import Strategies
from hf_ft.comparison.prepare import prepare_comparison
from hf_ft.comparison.results import Results
from hf_ft.comparison.runner import Tell
from hf_ft.comparison.settings import Settings
from hf_ft.comparison.task import Loader
from hf_ft.data.task import Data
from hf_ft.documents.public import shareable_command, shareable_text
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
    soup: Literal["none", "uniform", "greedy"] | None = None,
    tell: Tell = print,
    **arguments: Any,
) -> Results:
    """Compare strategies with equal tuning budgets, and save the winner.

    To continue a comparison that was interrupted or ran out of time, call it again with the same ``output_dir``.
    Several processes that call it at the same time share the work.

    Args:
        model: a Hub id, a folder or a short name; or a function of a seed and of whether to keep the pretrained head,
            which returns a model with a new head and its processor.
        data: the splits ``train``, ``validation``, ``test`` and, optionally, ``ood`` (out-of-distribution test data);
            or a :class:`Data` for further settings.
        strategies: ``"all"``; names joined by commas, where ``a+b`` composes; or a list of names and configs. Full
            fine-tuning always takes part. Options set in a config are not tuned.
        output_dir: folder of ``results.json``, ``report.html``, ``report.md``, ``best``, the winner, and ``soup``.
        settings: the budget.
        image_size: side of the images, in pixels.
        revision: revision of the model on the Hub.
        class_weights: as in :class:`~hf_ft.trainer.FTTrainer`.
        command: the command that reproduces the comparison, for the report.
        advised: run :func:`hf_ft.advice.advise` first and train the strategies in the recommended order, so that
            promising ones come first under ``settings.hours``.
        soup: as ``settings.soup``: whether to average the final runs into one model.
        tell: called with each line of progress.
        arguments: training arguments for all strategies, such as ``num_train_epochs``.

    Raises:
        OptionError: if a value is invalid, or ``output_dir`` holds another comparison.
    """
    if soup is not None:
        settings = replace(settings or Settings(), soup=soup)
    prepared = prepare_comparison(
        model, data, strategies, output_dir=output_dir, settings=settings, image_size=image_size, revision=revision,
        class_weights=class_weights, tell=tell, **arguments,
    )  # fmt: skip
    advice = prepared.advised() if advised else None
    tell(prepared.estimate())
    prepared.runner.run()
    return prepared.finish(shareable_text(command) if command else shareable_command(sys.argv), advice)
