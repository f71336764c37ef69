"""``hf-ft train``: one fine-tuning run from files to a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from peft import PeftModel

from hf_ft.cli.calibration import calibrated_on, collected_outputs, keep_calibration
from hf_ft.cli.checks import check_source_data
from hf_ft.cli.console import count, refusals, say, table
from hf_ft.cli.cores import warn_if_crowded
from hf_ft.cli.findings import show_findings
from hf_ft.cli.flags import SOURCES_FLAGS
from hf_ft.cli.help import train_help
from hf_ft.cli.prepare import Made, augmentation_of, check_rows, make
from hf_ft.cli.request import Request, read
from hf_ft.cli.streaming import check_streaming
from hf_ft.core.config import strategies
from hf_ft.core.context import FrozenCache
from hf_ft.core.options import describe_value, options
from hf_ft.data.check_results import FILE
from hf_ft.documents.text import counted
from hf_ft.documents.usage import pipeline_usage
from hf_ft.engine.checkpoint_folders import INCOMPLETE, checkpoints, is_complete
from hf_ft.errors import OptionError
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import CollaborativeTokenizer
from hf_ft.models.gated.model import GatedModel
from hf_ft.trainer.card_usage import usage
from hf_ft.trainer.mixing_checks import check_settings
from hf_ft.trainer.run_lock import LOCK
from hf_ft.zoo.datasets import DATASETS
from hf_ft.zoo.models import SHORT_NAMES
from hf_ft.zoo.short_names import short_name


def run_train(arguments: list[str]) -> None:
    """Parse the request, train, and show how to load the result."""
    if not arguments or {"-h", "--help", "--help-all"} & set(arguments):
        say(train_help(everything="--help-all" in arguments))
        return
    request = read(arguments)
    check_request(request)
    made = make(request)
    _announce(request, made)
    if made.trainer.args.device.type == "cpu":
        warn_if_crowded(torch.get_num_threads())
    made.trainer.train(resume_from_checkpoint=request.resume)
    _finish(made, calibrates=not request.method.uncalibrated)


def check_request(request: Request) -> None:
    """Reject requests that are invalid regardless of model and data.

    Raises:
        OptionError: if a flag is missing, or the output folder is in use.
    """
    for name, what in (("model", ", ".join(SHORT_NAMES)), ("dataset", ", ".join(DATASETS))):
        if not getattr(request.data, name) and not (name == "model" and request.sources):
            raise OptionError(f"--{name} is missing: a Hub id, a folder or file, or one of {what}.")
    if request.data.model and request.sources:
        flag = next(SOURCES_FLAGS[config.ft_type] for config in request.configs if config.sources())
        raise OptionError(f"--model {request.data.model} and {flag} both say what to load: give only one.")
    with refusals():
        check_streaming(request)
    if request.method.strategy:
        check_source_data(request.data, request.configs)
    with refusals():
        check_settings(request.mixing, request.configs, FrozenCache(request.method.frozen_cache))
    folder = request.output_dir
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output_dir {folder} is a file: name a folder.")
    # A killed process leaves its lock and what it was writing; an interrupted search resumes from its files.
    kept = (LOCK, INCOMPLETE, FILE, *(name for config in strategies().values() for name in config.kept))
    if (
        folder.is_dir()
        and any(not file.name.startswith(kept) for file in folder.iterdir())
        and not (request.method.overwrite or request.resume)
    ):
        goes_on = any(map(is_complete, checkpoints(folder)))
        resume = ", or --resume_from_checkpoint true to continue the run in it" if goes_on else ""
        raise OptionError(f"--output_dir {folder} is not empty: add --overwrite{resume}, or name another folder.")


def _announce(request: Request, made: Made) -> None:
    trainer, columns = made.trainer, made.data.columns
    args = trainer.args
    sizes = ", ".join(
        f"{len(split):,} {name}" if hasattr(split, "__len__") else f"{name} streamed"
        for name, split in made.splits.items()
    )
    classes = f"{columns.num_labels} classes" if columns.names else "regression"
    if columns.problem_type == "multi_label_classification":
        classes += ", several per row"
    length = counted(args.max_steps, "step") if args.max_steps > 0 else counted(args.num_train_epochs, "epoch")
    processes = f"{args.world_size} process{'es' if args.world_size > 1 else ''} on {args.device.type}"
    named = request.data.model or " + ".join(request.sources)
    rows = [
        ("model", f"{named}, {count(sum(p.numel() for p in trainer.model.parameters()))} parameters"),
        ("data", f"{request.data.dataset}: {sizes}; {classes}; {augmentation_of(made.data, trainer.mixing)}"),
        ("strategy", " + ".join(map(_shown, request.configs))),
        ("training", f"{length}, batches of {args.per_device_train_batch_size}, {processes}"),
    ]
    rows[2:2] = check_rows(made.data, request.output_dir)
    if trainer.source_dataset is not None:
        rows.insert(2, ("source", f"{request.data.source_dataset}: {len(trainer.source_dataset):,} samples"))
    recommended = request.recommended(trainer.model)
    taken = ", ".join(f"{name}={wanted.value} ({wanted.source})" for name, wanted in recommended.items())
    if taken:
        rows.append(("", f"recommended by {', '.join(c.ft_type for c in request.configs)}: {taken}"))
    rows += [("notice", notice) for notice in made.data.notices]
    say(f"{table(rows)}\n")


def _shown(config: Any) -> str:
    """A strategy in short form: only options that differ from their defaults."""
    values = {field.name: getattr(config, field.name) for field in options(type(config))}
    changed = [f"{k}={describe_value(v)}" for k, v in values.items() if v != getattr(type(config), k)]
    return config.ft_type + (f"({', '.join(changed)})" if changed else "")


def _finish(made: Made, calibrates: bool) -> None:
    """Evaluate, calibrate and save the model, and show how to load it."""
    trainer, ready, columns = made.trainer, made.splits, made.data.columns
    with collected_outputs(trainer) as outputs:
        metrics = trainer.evaluate()
    if "test" in ready:
        trainer.test_metrics = trainer.predict(ready["test"], metric_key_prefix="test").metrics or {}
        metrics |= trainer.test_metrics
    folder, temperature = str(trainer.args.output_dir), ""
    if trainer.is_world_process_zero():  # before the model is saved, which may be uploaded then
        calibration, temperature = calibrated_on(trainer, outputs[-1]) if calibrates else (None, "")
        keep_calibration(calibration, Path(folder))
    trainer.save_model(_internal_call=True)  # uploaded once all of it is written
    trainer.save_metrics("all", metrics, combined=False)
    say()
    rows = [(name, _scores(metrics, prefix)) for name, prefix in (("validation", "eval"), ("test", "test"))]
    say(table([*rows, *([("temperature", temperature)] if temperature else [])]))
    adapter = isinstance(trainer.model, PeftModel)
    ensemble = isinstance(trainer.model, CollaborativeModel)
    gated = isinstance(trainer.model, GatedModel)
    what = "an ensemble, each member_* a plain checkpoint" if ensemble else "a plain Transformers checkpoint"
    what = "a model with two paths, which needs hf_ft" if gated else what
    registers = "the ensemble" if ensemble else "the model" if gated else ""
    say(f"saved       {folder}, {'a PEFT adapter' if adapter else what}:\n")
    several = isinstance(trainer.processing_class, CollaborativeTokenizer)
    if adapter:
        name = next(iter(trainer.model.peft_config.values())).base_model_name_or_path
        used = usage(trainer.model, folder, base=None if short_name(name) else name)
    else:
        used = pipeline_usage(folder, columns.task, registers=registers, tokenizers=several)
    say(indent(used, "  "))
    found = [c.findings(trainer.states[c.ft_type]) for c in trainer.configs if c.ft_type in trainer.states]
    for findings in found:
        show_findings(findings, Path(folder))
    if any(findings.plots for findings in found):
        trainer.create_model_card()  # the plots are now in the folder
    if trainer.args.push_to_hub:
        commit = trainer.push_to_hub()
        say(f"\nuploaded    {commit.commit_url}" if commit else "")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _scores(metrics: dict[str, float], prefix: str) -> str:
    speed = ("runtime", "per_second", "time")
    chosen = {k.removeprefix(f"{prefix}_"): v for k, v in metrics.items() if k.startswith(prefix)}
    shown = [f"{k} {v:.4g}" for k, v in chosen.items() if not k.endswith(speed) and isinstance(v, float)]
    return "  ".join(shown) or "no such split"
