"""The help of ``hf-ft compare``, generated from the declarations of its flags."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from hf_ft.cli.console import table
from hf_ft.cli.flags import DataFlags
from hf_ft.comparison.settings import DEFAULTS, Settings
from hf_ft.core.config import strategies

_HEAD = """hf-ft compare: which strategy for my model and data?

usage: hf-ft compare --model MODEL --dataset DATA [--strategies NAME,NAME] [flags]
       accelerate launch --multi_gpu --num_processes N -m hf_ft compare ...   (N workers share the trainings)

Every strategy gets the same tuning budget: as much computing as so many trainings of full fine-tuning take, the
strategy's own search included. Learning rates and a few declared options are tuned on validation data; then the best
setting trains anew with several seeds, and only these runs look at the test data. A comparison that was interrupted
goes on when the same command is given again.

example:
  hf-ft compare --model microsoft/resnet-18 --dataset my_photos/ --strategies linear_probe,lp_ft,l2_sp,lp_ft+l2_sp \\
      --trials 8 --seeds 5 --num_train_epochs 20 --output_dir runs/photos
  hf-ft compare --model microsoft/resnet-18 --dataset my_photos/ --advise True --hours 2
"""
_FIRST = ("output_dir", "num_train_epochs", "per_device_train_batch_size", "optim", "lr_scheduler_type", "bf16")
_TAIL = """Written to --output_dir (default: runs/compare): report.html, report.md, results.json (every training), best/
(the winner, a plain Transformers checkpoint whose card holds the comparison), compare.db (an Optuna study).
An option that you set (--NAME.option) is not tuned. What is fair and what is not: docs/compare.md."""


def compare_help(own: type, everything: bool) -> str:
    """The help text; ``everything`` adds all flags of TrainingArguments.

    Args:
        own: the dataclass of the command's own flags.
    """
    training = [f for f in fields(TrainingArguments) if f.init and (everything or f.name in _FIRST)]
    sections = [
        _HEAD,
        "what takes part",
        _flags(fields(own)),
        table([(f"  {'--NAME.option':<30}", f"an option of a strategy; names: {', '.join(strategies())}")]),
        "\nbudget",
        _flags(fields(Settings)),
        "\nmodel and data",
        _flags(fields(DataFlags)),
        "\ntraining, the same for all (flags of TrainingArguments" + (")" if everything else "; --help-all shows all)"),
        _flags(training),
    ]
    return "\n".join([*sections, "", _TAIL])


def _flags(flags: Any) -> str:
    return "\n".join(table([(f"  {'--' + flag.name:<30}", _help(flag))]) for flag in flags)


def _help(flag: Field) -> str:
    text = " ".join(str(flag.metadata.get("help", "")).split())
    if flag.name == "augment":
        text = "none or basic: mirror and shift training images (default: none: what is frozen is computed once)"
    if flag.name == "output_dir":
        text = "where results, report and winner go (default: runs/compare)"
    default = DEFAULTS.get(flag.name, flag.default)
    default = getattr(default, "value", default)
    silent = default in (None, MISSING, "", False) or "default" in text
    return text if silent else f"{text} (default: {default})"
