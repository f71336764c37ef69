"""``hf-ft demo``: compare six strategies on real images of solar cells, with a sound protocol.

The best epoch of each strategy and the best strategy are selected on the validation split. The test split is
evaluated once per training and not used for selection.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import DatasetDict
from sklearn.metrics import recall_score
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from hf_ft.cli.console import Parser, count, say, table
from hf_ft.cli.demo.data import Cells, channels_last
from hf_ft.cli.demo.report import MADE_BY, Trained, finish
from hf_ft.cli.logs import quieten
from hf_ft.cli.models import load_classifier
from hf_ft.core.compose import recommended_arguments, resolve
from hf_ft.core.config import FTConfig
from hf_ft.data.columns import Columns, find_columns
from hf_ft.errors import OptionError
from hf_ft.metrics import classification_metrics
from hf_ft.splits import stratified_split
from hf_ft.trainer.trainer import FTTrainer
from hf_ft.zoo.datasets import DATA_NOTICES, elpv
from hf_ft.zoo.models import SHORT_NAMES

DEFAULT_DIR = "runs/demo"
WRITTEN = ("best", "work", "results.json", "results.md", "plot.png", "blocks.png", "example.png")
EPILOG = """Images are opened and resized once, augmentation (mirror, shift) is new each epoch. Each strategy trains at
the rate its config recommends. The best epoch and the winner are chosen on validation by balanced accuracy, the
mean of the accuracies on either class; test is scored once per strategy, at the end, and chooses nothing.

example:
  hf-ft demo --model efficientnet-lite0 --strategies linear_probe,lp_ft,layer_decay --seeds 3"""


def run_demo(arguments: list[str]) -> None:
    """Train and compare the strategies, and save the winner."""
    flags = _parser().parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("the demo runs in one process; `hf-ft train` runs in several.")
    started = time.perf_counter()
    missing = [name for name in ("matplotlib", "rich", "optuna") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'hf-ft[demo]'")
    configs = resolve(name.strip() for name in flags.strategies.split(","))
    folder = Path(flags.output_dir)
    _check_folder(folder, flags.overwrite)
    quieten()
    transformers.utils.logging.set_verbosity_error()
    size = flags.image_size or (96 if flags.model in SHORT_NAMES else 224)
    splits = stratified_split(elpv(), flags.train_images, flags.validation_images, flags.test_images)
    columns = find_columns(splits)
    model, processor = load_classifier(flags.model, columns, 0, size)
    _renew(folder)
    _introduce(flags, model, splits, size)
    ready = {
        "train": Cells(splits["train"], processor, size, augment=True),
        "plain": Cells(splits["train"], processor, size, keep=True),
        "validation": Cells(splits["validation"], processor, size, keep=True),
        "test": Cells(splits["test"], processor, size),
    }
    work = [(config, seed) for config in configs for seed in range(flags.seeds)]
    runs = _train_all(work, flags, ready, columns, size, folder)
    finish(runs, folder, flags, size, splits, time.perf_counter() - started)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-ft demo",
        description="Compare strategies on real data: an ImageNet model learns to find defects of solar cells.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    short = ", ".join(name for name, entry in SHORT_NAMES.items() if entry.task == "image")
    add("--model", default="mobilenet_v2", help=f"{short}, any Hub id or folder (default: %(default)s)")
    names = "linear_probe,full,lp_ft,l2_sp,daft,blockwise"
    add("--strategies", default=names, metavar="A,B", help="names from `hf-ft list` (default: %(default)s)")
    add("--seeds", type=positive_number, default=1, help="how many; with several, mean ± std is shown (default: 1)")
    add(
        "--epochs",
        type=positive_number,
        default=8,
        help="per strategy, all its stages together (default: %(default)s)",
    )
    add("--image_size", type=positive_number, help="side in pixels (default: 96 for the short names, 224 for others)")
    add("--output_dir", default=DEFAULT_DIR, help="default: %(default)s, renewed if an earlier demo wrote it")
    add("--overwrite", action="store_true", help="write into an output_dir that is not empty")
    add("--train_images", type=positive_number, default=500, help="default: %(default)s")
    add("--validation_images", type=positive_number, default=250, help="default: %(default)s")
    add("--test_images", type=positive_number, help="default: all that are left, 1,874")
    return parser


def positive_number(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Raise an error if the folder holds anything but, at the default location, the output of an earlier demo."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output_dir {folder} is a file: name a folder.")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    if folder == Path(DEFAULT_DIR) and _is_own(folder / "results.json"):
        return
    raise OptionError(f"--output_dir {folder} is not empty: add --overwrite, or name another folder.")


def _is_own(results: Path) -> bool:
    try:
        return json.loads(results.read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _renew(folder: Path) -> None:
    """Delete only the output of an earlier demo, and mark the folder so that an interrupted demo is recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in WRITTEN):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "results.json").write_text(json.dumps({"made_by": MADE_BY, "finished": False}), encoding="utf-8")


def _introduce(flags: argparse.Namespace, model: Any, splits: DatasetDict, size: int) -> None:
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    licence = SHORT_NAMES[flags.model].licence if flags.model in SHORT_NAMES else ""
    parameters = count(sum(p.numel() for p in model.parameters() if p.requires_grad))
    rows = [
        ("data", DATA_NOTICES["elpv"]),
        ("task", f"functional or defective? Stratified random split: {sizes}; {size} x {size} pixels"),
        ("model", f"{flags.model}, {parameters} parameters" + (f"; {licence}" if licence else "")),
    ]
    say(f"hf-ft demo: which fine-tuning strategy finds defective solar cells best?\n\n{table(rows, indent='  ')}\n")


class Bar(TrainerCallback):
    """Advances a progress bar and shows the best score so far."""

    def __init__(self, advance: Callable[..., None], before: int) -> None:
        self.advance = advance
        self.before = before
        self.best = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(completed=self.before + state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.best = max(self.best, kwargs["metrics"]["eval_balanced_accuracy"])
        self.advance(score=f"validation {self.best:.3f}")


def _train_all(
    work: list[tuple[FTConfig, int]],
    flags: argparse.Namespace,
    ready: dict[str, Cells],
    columns: Columns,
    size: int,
    folder: Path,
) -> list[Trained]:
    """Train all strategies with all seeds in sequence, with one progress bar per strategy."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    parts = (TextColumn("  {task.description:<20}"), BarColumn(), TextColumn("{task.fields[score]:<16}"))
    runs: list[Trained] = []
    with Progress(*parts, TimeElapsedColumn()) as progress:
        bars = {c.ft_type: progress.add_task(c.ft_type, start=False, total=None, score="") for c, _ in work}
        for config, seed in work:
            bar = bars[config.ft_type]
            progress.start_task(bar)
            model, processor = load_classifier(flags.model, columns, seed, size)
            trainer = _trainer(model, processor, config, seed, ready, folder / "work" / config.ft_type, flags.epochs)
            steps = -(-len(ready["train"]) // trainer.args.per_device_train_batch_size) * flags.epochs
            steps += 1  # the final scores
            progress.update(bar, total=steps * flags.seeds)
            trainer.add_callback(Bar(partial(progress.update, bar), steps * seed))
            runs.append(_train(trainer, config, seed, ready))
            progress.update(bar, completed=steps * (seed + 1))
    return runs


def _trainer(
    model: Any, processor: Any, config: FTConfig, seed: int, ready: dict[str, Cells], folder: Path, epochs: int
) -> FTTrainer:
    recommended = {name: wanted.value for name, wanted in recommended_arguments([config]).items()}
    args = TrainingArguments(
        str(folder / str(seed)),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,  # fits into the processor's cache: four times as fast as 256
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="balanced_accuracy",
        logging_strategy="epoch",
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        seed=seed,
        **recommended,
    )
    trainer = FTTrainer(
        model,
        args,
        strategy=config,
        plain_train_dataset=ready["plain"],
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        data_collator=channels_last,
        processing_class=processor,
        compute_metrics=classification_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: FTTrainer, config: FTConfig, seed: int, ready: dict[str, Cells]) -> Trained:
    """Train, then evaluate the best epoch's model on validation, and once on test."""
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    folder = Path(str(trainer.args.output_dir)) / "best"
    trainer.save_model(str(folder))
    best = trainer.state.best_global_step or trainer.state.global_step
    return Trained(
        config.ft_type,
        seed,
        best_epoch=round(best * trainer.args.num_train_epochs / trainer.state.max_steps),
        validation=_scores(trainer, ready["validation"]),
        test=_scores(trainer, ready["test"]),
        seconds=seconds,
        # The optimizer holds the parameters trained in any stage.
        parameters=sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]),
        folder=folder,
        search=trainer.states["blockwise"].info["scores"] if config.ft_type == "blockwise" else None,
    )


def _scores(trainer: FTTrainer, split: Cells) -> dict[str, float]:
    """Accuracy, balanced accuracy, and the standard error of the latter from the small number of images."""
    output = trainer.predict(split)
    labels, predicted = np.asarray(output.label_ids), np.asarray(output.predictions).argmax(-1)
    classes, sizes = np.unique(labels, return_counts=True)
    recalls = recall_score(labels, predicted, labels=classes, average=None, zero_division=0)
    variance = (recalls * (1 - recalls) / sizes).sum() / len(classes) ** 2
    metrics: dict[str, Any] = output.metrics or {}
    return {
        "accuracy": metrics["test_accuracy"],
        "balanced_accuracy": metrics["test_balanced_accuracy"],
        "standard_error": float(variance**0.5),
    }
