"""The help of the commands that take many flags, generated from the declarations of these flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from hf_ft.cli.console import table
from hf_ft.cli.flags import DEFAULTS, DataFlags, MethodFlags, StreamFlags
from hf_ft.cli.workers import WorkerFlags
from hf_ft.comparison.settings import DEFAULTS as COMPARE_DEFAULTS
from hf_ft.comparison.settings import Settings

_TRAIN = """hf-ft train: fine-tune an image, text or audio classifier with a strategy.

usage: hf-ft train --model MODEL --dataset DATA [--strategy NAME ...] [flags]
       hf-ft train CONFIG.yaml [flags]                 (flags override the file)
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
_TRAIN_FIRST = {
    "output_dir": "where checkpoints and, at the end, the best model go",
    "num_train_epochs": "passes over the training data, in all stages together",
    "learning_rate": "learning rate of the backbone (default: recommended by the strategy)",
    "weight_decay": "weight decay of the optimizer",
    "per_device_train_batch_size": "samples per step and process",
    "gradient_accumulation_steps": "batches per optimizer step",
    "bf16": "mixed precision (without a GPU, add --use_cpu true)",
    "seed": "seed of the new head, the data order and the augmentation",
    "resume_from_checkpoint": "true for the latest checkpoint in output_dir, or the folder of a checkpoint",
    "report_to": "log to tensorboard, mlflow, trackio, ... (docs/trackers.md)",
    "push_to_hub": "upload the model to the Hub (see also --hub_model_id)",
}

_TRAIN_TAIL = """Flags that you do not set take the values that the strategies recommend (see `hf-ft describe NAME`).
The model is validated after each epoch. The one of the best epoch (by accuracy, else the first of --metrics, else the
loss) is loaded at the end and saved, and scored once on the test split, if there is one.
The file can also be given as --config CONFIG.yaml. --help-all shows every flag of TrainingArguments. --traceback shows
where an error was raised."""

_COMPARE = """hf-ft compare: which strategy for my model and data?

usage: hf-ft compare --model MODEL --dataset DATA [--strategies NAME,NAME] [flags]
       hf-ft compare ... --workers N        (N processes share the training runs)

Every strategy gets the same tuning budget: the work of --trials training runs of full fine-tuning, including the
strategy's own search. Its first trial uses its defaults; optimizer, learning rate and a few declared options are tuned
on validation data, around values that suit the method, the model and the data. The best setting and the defaults are
then trained again, and the better of the two with several seeds; only these runs are scored on the test data. Run the
same command again to continue an interrupted comparison.

example:
  hf-ft compare --model microsoft/resnet-18 --dataset my_photos/ --strategies linear_probe,lp_ft,l2_sp,lp_ft+l2_sp \\
      --trials 8 --seeds 5 --num_train_epochs 20 --output_dir runs/photos
  hf-ft compare --model microsoft/resnet-18 --dataset my_photos/ --advise True --hours 2
"""

_COMPARE_FIRST = (
    "output_dir",
    "num_train_epochs",
    "per_device_train_batch_size",
    "optim",
    "lr_scheduler_type",
    "bf16",
    "report_to",
)
_COMPARE_WORDS = {
    "optim": "optimizer (default: each strategy tries AdamW and SGD with momentum 0.9; for text AdamW alone)",
    "augment": "of training images: none, basic, trivial, rand, auto (default: none: frozen parts are computed once)",
    "output_dir": "folder for results, report and winner (default: runs/compare)",
    "report_to": "log each training as a run: tensorboard, mlflow, trackio, ... (docs/trackers.md; default: none)",
}

_COMPARE_TAIL = """\
Written to --output_dir (default: runs/compare): report.html, report.md, results.json (every run), best/ (the winner,
a plain Transformers checkpoint whose card holds the comparison), logits/ (outputs of the final runs), compare.db (an
Optuna study).
Options that you set (--NAME.option) are not tuned. What makes the comparison fair, and its limits: docs/compare.md."""


_INFERENCE = {
    "predict": (
        """hf-ft predict: classify images, sounds or texts with a trained model.

usage: hf-ft predict --model MODEL --dataset DATA [DATA ...] [flags]

Writes one row per sample, in the order of the data: its file, or its row number in a table, the class and its
probability. Rows are written as they are computed, in constant memory. If a sample cannot be read, its column `error`
gives the reason; such samples are counted at the end. If there are labels (a label column, or folders named after
classes), scores are printed too.

examples:
  hf-ft predict --model runs/photos --dataset new_photos/ --output predictions.csv
  hf-ft predict --model runs/photos --dataset a.jpg b.jpg --top_k 3 --tta
  hf-ft predict --model runs/reviews --dataset reviews.csv --text_column body --output predictions.jsonl
""",
        """\
Columns: file or row; label, probability, label_2, probability_2, ...; for several labels per sample, labels and
probabilities, joined by `;` (lists in jsonl); for regression, value; true_label, if known; error. The model, its
processor and the data are read without running code from the Hub. docs/predict.md has more.""",
    ),
    "evaluate": (
        """hf-ft evaluate: score a trained model on labelled data.

usage: hf-ft evaluate --model MODEL --dataset DATA [flags]

The metrics are those of a Trainer's evaluation. Classes are matched by name with those of the model; a class that the
model does not know is refused. Samples that cannot be read are listed but not scored.

examples:
  hf-ft evaluate --model runs/photos --dataset my_photos/test --output_dir runs/evaluation
  hf-ft evaluate --model runs/photos --dataset my_photos/ --split test \\
      --calibrate my_photos/ --calibrate_split validation
""",
        """\
Written to --output_dir: evaluation.html and evaluation.md (scores, confusion matrix, reliability, unreadable samples),
evaluation.json (the same content) and predictions.csv (as by `hf-ft predict`). docs/predict.md has more.""",
    ),
    "export": (
        """hf-ft export: write a trained model for other runtimes, and check what was written.

usage: hf-ft export --model MODEL [--dataset DATA] [flags]

Every file is run again, on the CPU, and its logits are compared with those of the model, on random samples and on
--dataset, in batches of one and of several; if they differ, nothing is written. ONNX needs pip install 'hf-ft[export]'.

examples:
  hf-ft export --model runs/photos --dataset my_photos/test --output_dir runs/photos_onnx
  hf-ft export --model runs/photos --dataset my_photos/test --quantize int8 --output_dir runs/photos_int8
  hf-ft export --model runs/reviews --dataset reviews.csv --text_column body --formats onnx pt2
""",
        """\
Written: model.onnx, model.int8.onnx and model.pt2, as requested; for texts export_tokenizer.json; and export.json with
classes, temperature, the preprocessing of inputs, differences and scores. docs/export.md has more.""",
    ),
    "push": (
        """hf-ft push: upload a saved model, adapter, ensemble or delta to the Hub.

usage: hf-ft push --model FOLDER --hub_model_id USER/NAME [flags]

Weights, configs, processor, plots and the card are uploaded; checkpoints, logs, local paths and tokens are not. Files
that are already on the Hub are not sent again, so the same command continues an upload that failed.

examples:
  hf-ft push --model runs/photos --hub_model_id ann/photos
  hf-ft push --model runs/photos/ft_delta --hub_model_id ann/photos-delta --hub_private_repo true
""",
        """\
`hf-ft train --push_to_hub true --hub_model_id USER/NAME` uploads the result of a training run, and with
`--hub_strategy every_save` each save. docs/sharing.md has more.""",
    ),
}


def train_help(everything: bool) -> str:
    """The help text of ``hf-ft train``; ``everything`` adds all flags of TrainingArguments."""
    known = {f.name: f for f in fields(TrainingArguments) if f.init}
    first = [known.pop(name) for name in _TRAIN_FIRST]
    sections = [
        _TRAIN,
        "model and data",
        _flags([*fields(DataFlags), *fields(StreamFlags)]),
        "\nstrategy and scores",
        _flags(fields(MethodFlags)),
        _options("an option of a strategy, see `hf-ft describe NAME`"),
        "\ntraining (flags of TrainingArguments" + ("" if everything else "; --help-all shows all of them") + ")",
        _flags(first, _TRAIN_FIRST, DEFAULTS | {"learning_rate": None}),
    ]
    if everything:
        sections += ["\nmore of TrainingArguments", _flags(known.values(), defaults=DEFAULTS)]
    else:
        shown = [f"{name} {value}" for name, value in DEFAULTS.items() if name not in _TRAIN_FIRST]
        sections += ["\nother defaults of this command", table([("  ", ", ".join(shown))])]
    return "\n".join([*sections, "", _TRAIN_TAIL])


def compare_help(own: type, everything: bool) -> str:
    """The help text of ``hf-ft compare``; ``everything`` adds all flags of TrainingArguments.

    Args:
        own: the dataclass of the command's own flags.
    """
    training = [f for f in fields(TrainingArguments) if f.init and (everything or f.name in _COMPARE_FIRST)]
    sections = [
        _COMPARE,
        "what takes part",
        _flags(fields(own)),
        _options("an option of a strategy"),
        "\nprocesses",
        _flags(fields(WorkerFlags)),
        "\nbudget",
        _flags(fields(Settings)),
        "\nmodel and data",
        _flags(fields(DataFlags), _COMPARE_WORDS),
        "\ntraining, the same for all (flags of TrainingArguments" + (")" if everything else "; --help-all shows all)"),
        _flags(training, _COMPARE_WORDS, COMPARE_DEFAULTS),
    ]
    return "\n".join([*sections, "", _COMPARE_TAIL])


def inference_help(command: str, own: type, words: Mapping[str, str]) -> str:
    """The help text of ``hf-ft predict``, ``hf-ft evaluate`` or ``hf-ft export``.

    Args:
        own: the dataclass of the command's flags.
        words: descriptions that differ between them.
    """
    about, tail = _INFERENCE[command]
    return "\n".join([about, "flags", _flags(fields(own), words), "", tail])


def _options(what: str) -> str:
    return table([(f"  {'--NAME.option':<30}", f"{what}; `hf-ft list` shows the names")])


def _flags(
    flags: Iterable[Field], words: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None
) -> str:
    """A line for each flag.

    Args:
        words: descriptions in place of those declared with the flags.
        defaults: defaults of the command in place of the declared ones.
    """
    rows = [(f"  {'--' + flag.name:<30}", _help(flag, words or {}, defaults or {})) for flag in flags]
    return "\n".join(table([row]) for row in rows)


def _help(flag: Field, words: Mapping[str, str], defaults: Mapping[str, Any]) -> str:
    text = words.get(flag.name) or " ".join(str(flag.metadata.get("help", "")).split())
    default = defaults.get(flag.name, flag.default)
    default = getattr(default, "value", default)  # for enumerations
    told = "default: " in text or "efaults to" in text
    silent = told or any(default is nothing for nothing in (None, MISSING, "", False))
    return text if silent else f"{text} (default: {default})"
