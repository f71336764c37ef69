"""The help of ``hf-ft train``, generated from the declarations of its flags."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from hf_ft.cli.console import table
from hf_ft.cli.flags import DEFAULTS, DataFlags, MethodFlags
from hf_ft.core.config import strategies

_HEAD = """hf-ft train: fine-tune an image or text classifier with a strategy.

usage: hf-ft train --model MODEL --dataset DATA [--strategy NAME ...] [flags]
       hf-ft train CONFIG.yaml [flags]                 (flags win over the file)
       accelerate launch -m hf_ft train ...            (several GPUs)

example:
  hf-ft train --model microsoft/resnet-18 --dataset my_photos/ --strategy lp_ft --strategy l2_sp \\
      --l2_sp.alpha 0.1 --output_dir runs/photos

the same as a file:
  model: microsoft/resnet-18
  dataset: my_photos/
  strategy: [lp_ft, l2_sp]
  l2_sp: {alpha: 0.1}
  output_dir: runs/photos
"""

# The most important training flags, with simpler descriptions.
_FIRST = {
    "output_dir": "where checkpoints and, at the end, the best model go",
    "num_train_epochs": "passes over the training data, all stages of a strategy together",
    "learning_rate": "the backbone's; by default what the strategy recommends",
    "weight_decay": "the optimizer's pull towards zero",
    "per_device_train_batch_size": "samples per step and process",
    "gradient_accumulation_steps": "batches per optimizer step",
    "bf16": "mixed precision",
    "seed": "of the new head, the order of the data and the augmentation",
    "resume_from_checkpoint": "true for the newest checkpoint in output_dir, or a checkpoint's folder",
    "push_to_hub": "upload the model to the Hub (see also --hub_model_id)",
}

_TAIL = """What the strategies recommend (`hf-ft describe NAME`) is used for every flag that you do not set.
Validation runs after each epoch, the best epoch's model (by accuracy, else the first of --metrics, else the loss) is
loaded at the end and saved, and a test split, where there is one, is scored once with it.
--config CONFIG.yaml names the file too. --help-all shows every flag of TrainingArguments. --traceback shows where an
error came from."""


def train_help(everything: bool) -> str:
    """The help text; ``everything`` adds all flags of TrainingArguments."""
    names = ", ".join(strategies())
    sections = [
        _HEAD,
        "model and data",
        _flags(fields(DataFlags)),
        "\nstrategy and scores",
        _flags(fields(MethodFlags)),
        table([(f"  {'--NAME.option':<30}", f"an option of a strategy, see `hf-ft describe NAME`; names: {names}")]),
        "\ntraining (flags of TrainingArguments" + ("" if everything else "; --help-all shows all of them") + ")",
        _flags(sorted((f for f in fields(TrainingArguments) if f.name in _FIRST), key=_rank)),
    ]
    others = [f for f in fields(TrainingArguments) if f.init and f.name not in _FIRST]
    if everything:
        sections += ["\nmore of TrainingArguments", _flags(others)]
    else:
        shown = [f"{name} {value}" for name, value in DEFAULTS.items() if name not in _FIRST]
        sections += ["\nother defaults of this command", table([("  ", ", ".join(shown))])]
    return "\n".join([*sections, "", _TAIL])


def _rank(flag: Field) -> int:
    return list(_FIRST).index(flag.name)


def _flags(flags: Any) -> str:
    return "\n".join(table([(f"  {'--' + flag.name:<30}", _help(flag))]) for flag in flags)


def _help(flag: Field) -> str:
    text = _FIRST.get(flag.name) or " ".join(str(flag.metadata.get("help", "")).split())
    default = DEFAULTS.get(flag.name, flag.default)
    default = getattr(default, "value", default)  # for enumerations
    silent = default in (None, MISSING, "") or (flag.name == "learning_rate")
    return text if silent or "default" in text else f"{text} (default: {default})"
