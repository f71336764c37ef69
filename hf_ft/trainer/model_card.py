"""The model card: strategy, base model, training arguments and metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from transformers import TrainerState

from hf_ft.core.compose import finds_rate
from hf_ft.core.config import FTConfig, as_saved
from hf_ft.core.findings import Findings, Table
from hf_ft.core.head_rate import UNSET_RATE
from hf_ft.core.options import describe_value, options
from hf_ft.data.info import DataInfo
from hf_ft.documents.markdown import blocks
from hf_ft.models.hub import base_model_id, loaded_commit
from hf_ft.models.sharding import plain_class
from hf_ft.models.tasks import TASKS, classes_of
from hf_ft.trainer.card_usage import delta_usage, is_ensemble, usage
from hf_ft.trainer.protocols import ForCard
from hf_ft.trainer.selection import is_choice

_TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{{ base_sentence }} fine-tuned with hf_ft.

## How it was fine-tuned

{{ strategies }}

## Training

{{ training }}

## Results

{{ results }}

## Use

```python
{{ usage }}
```
"""


_PEFT = PeftModel.__module__.partition(".")[0]  # the library
# Type and name in the Hub's model index, for metrics with a different key there.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "Balanced accuracy"),
    "macro_f1": ("f1", "F1 (macro)"),
    "mse": ("mse", "MSE"),
    "mae": ("mae", "MAE"),
    "loss": ("loss", "Loss"),
}


def model_card(
    configs: Sequence[FTConfig],
    model: Any,
    *,
    model_name: str,
    base_model: str | None,
    metrics: Mapping[str, float],
    arguments: Mapping[str, Any],
    data: DataInfo | None = None,
    tags: Sequence[str] = (),
    findings: Mapping[str, Findings] | None = None,
    beside: Collection[str] = (),
    delta: bool = False,
    processor: bool = False,
    **card_fields: Any,
) -> ModelCard:
    """Build the card of a fine-tuned model.

    Args:
        configs: the strategies whose options and papers are listed.
        model: determines task and class.
        base_model: name or path of the base model; local paths are not shown. Ensembles know their own members.
        metrics: scores to show: ``eval_*`` on the validation data, ``test_*`` on the test data.
        arguments: training arguments to show.
        data: the data set.
        findings: findings of the strategies' measurements, by ``ft_type``.
        beside: names of the files in the card's folder; only plots among them are shown.
        delta: whether only what training changed is saved there.
        processor: whether the model's processor is saved there.
        card_fields: further metadata (license, language, datasets, ...).
    """
    bases = _bases(model, base_model)
    task = _task(model)
    names = [config.ft_type for config in configs]
    if data is not None and data.hub_id:
        card_fields.setdefault("datasets", data.hub_id)
    if card_fields.get("license"):
        card_fields["license"] = str(card_fields["license"]).lower()  # as the Hub spells all licenses
    pages = [base for base in bases if _on_the_hub(model, base)]
    kind = (task or "").removesuffix("-classification")
    piped = kind if processor and kind in ("image", "text", "audio") else None
    metadata = ModelCardData(
        library_name="hf_ft" if delta else _PEFT if isinstance(model, PeftModel) else "transformers",
        pipeline_tag=task,
        base_model=pages[0] if len(pages) == 1 else pages or None,
        tags=list(dict.fromkeys(["hf_ft", *names, *tags])),
        model_name=model_name,
        eval_results=_results(metrics, task, data),
        **card_fields,
    )
    return ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE,
        model_name=model_name,
        base_sentence=_sentence(model, bases),
        strategies="\n\n".join(
            _describe(config, (findings or {}).get(config.ft_type, Findings()), beside) for config in configs
        ),
        training=_training(arguments, data),
        results=_scores(metrics),
        usage=delta_usage(model_name, bool(pages)) if delta else usage(model, model_name, piped, *pages[:1]),
    )


def _bases(model: Any, base_model: str | None) -> list[str]:
    """The unique ids of the base models."""
    names = model.config.sources if is_ensemble(model) else [base_model]
    return list(dict.fromkeys(filter(None, map(base_model_id, names))))


def _on_the_hub(model: Any, base: str) -> bool:
    """Whether a name is known to be a page on the Hub: it has an owner, or the weights were loaded from there.

    A name without an owner may be a short name of the zoo.
    """
    known = getattr(getattr(model, "config", None), "_commit_hash", None)
    return "/" in base or known is not None or loaded_commit(base) is not None


def _sentence(model: Any, bases: Sequence[str]) -> str:
    named = (f"[{b}](https://huggingface.co/{b})" if _on_the_hub(model, b) else f"`{b}`" for b in bases)
    links = ", ".join(named)
    if is_ensemble(model):
        return f"An ensemble of {len(model.members)} members{f' from {links},' if links else ','}"
    return links or "A pretrained model"


def _describe(config: FTConfig, found: Findings, beside: Collection[str]) -> str:
    config = as_saved(config)
    changed = {
        field.name: describe_value(getattr(config, field.name))
        for field in options(type(config))
        if field.name in type(config).__annotations__ or getattr(config, field.name) != field.default
    }
    lines = [f"**{config.ft_type}**: {(type(config).__doc__ or '').strip().splitlines()[0]}"]
    if changed:
        lines.append(_table(changed, "option"))
    if found.summary:
        lines.append(found.summary)
    tables = [part for part in found.short if isinstance(part, Table) and part.headers]
    lines += [blocks(tables)] if tables else []
    lines += [f"![{Path(name).stem}]({name})" for name in found.plots if name in beside]
    if config.paper:
        lines.append(f"Paper: {config.paper}")
    lines += [f"See also: {paper}" for paper in config.further_papers]
    return "\n\n".join(lines)


def _training(arguments: Mapping[str, Any], data: DataInfo | None) -> str:
    table = _table({key: value for key, value in arguments.items() if value is not None}, "argument")
    return table if data is None else f"{data}\n\n{table}"


def _scores(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "Not evaluated."
    splits = {"eval_": "on the validation data", "test_": "on the test data"}
    meant = ", ".join(f"`{p}`: {data}" for p, data in splits.items() if any(key.startswith(p) for key in metrics))
    table = _table({key: f"{value:.4f}" for key, value in metrics.items()}, "metric")
    return f"{meant}.\n\n{table}" if meant else table


def _table(rows: Mapping[str, Any], title: str) -> str:
    return "\n".join([f"| {title} | value |", "| --- | --- |", *(f"| {k} | {_code(v)} |" for k, v in rows.items())])


def _code(value: Any) -> str:
    """A value as code in a table, where an unescaped | would end the cell even within code."""
    text = str(value).replace("|", "\\|")
    return f"`{text}`"


def _task(model: Any) -> str | None:
    """The task by which the Hub lists it."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config, kind = getattr(model, "config", None), plain_class(model)
    classifier = getattr(kind, "plain_class", kind)
    if is_ensemble(model):
        return f"{model.config.task}-classification"
    return next((f"{task}-classification" for task in TASKS if classifier in classes_of(config, task)), None)


def _results(metrics: Mapping[str, float], task: str | None, data: DataInfo | None) -> list[EvalResult] | None:
    if not metrics or task is None:
        return None
    results = []
    for key, value in metrics.items():
        plain = key.removeprefix("eval_").removeprefix("test_")
        kind, name = _METRICS.get(plain, (plain, plain))
        if not math.isfinite(value):  # not a number in JSON
            continue
        results.append(
            EvalResult(
                task_type=task,
                dataset_type="unknown" if data is None else data.hub_id or _as_id(data.name),
                dataset_name="unknown" if data is None else data.name,
                dataset_split="test" if key.startswith("test_") else "validation",
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
        )
    return results or None


def _as_id(name: str) -> str:
    """A name in the characters that ids on the Hub allow."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "unknown"


def card_of(
    trainer: ForCard, base_model: str | None, folder: Path, name: str = "", delta: bool = False, **given: Any
) -> ModelCard:
    """Build the card of the model that a Trainer trained.

    Args:
        base_model: name or path of the base model.
        folder: the card's folder; plots in this folder are shown.
        name: model name if it is a delta, or there is no repository; default: the name of the folder.
        delta: whether only what training changed is saved there.
        given: arguments of ``Trainer.create_model_card``; tags, language, license and dataset are used.
    """
    fields = {key: value for key, value in given.items() if value is not None and key in ("language", "license")}
    if given.get("dataset"):
        fields["datasets"] = given["dataset"]
    tags = given.get("tags") or []
    kept = "learning_rate optim lr_scheduler_type weight_decay per_device_train_batch_size "
    kept += "gradient_accumulation_steps seed num_train_epochs max_steps"
    args, configs, states = trainer.args, trainer.configs, trainer.states
    arguments = args.to_dict()
    if args.learning_rate == UNSET_RATE and any(map(finds_rate, configs)):
        del arguments["learning_rate"]  # what the strategy found is among its findings
    return model_card(
        configs,
        trainer.model,
        model_name=(not delta and (trainer.hub_model_id or args.hub_model_id)) or name or folder.name,
        delta=delta,
        processor=trainer.processing_class is not None,
        base_model=base_model,
        metrics=_last_metrics(trainer.state, args.load_best_model_at_end)
        | _without_speed(trainer.test_metrics, "test_"),
        arguments={key: arguments[key] for key in kept.split() if key in arguments} | trainer.mixing.given,
        tags=[tags] if isinstance(tags, str) else tags,
        data=trainer.data_info,
        findings={c.ft_type: c.findings(states[c.ft_type]) for c in configs if c.ft_type in states},
        beside=[file.name for file in folder.iterdir()] if folder.is_dir() else (),
        **fields,
    )


def write_card(card: ModelCard, folder: Path) -> None:
    card.save(folder / "README.md")


def _last_metrics(state: TrainerState, of_best: bool) -> dict[str, float]:
    """Metrics of the model chosen after training, or of the best step if it was loaded, or else the last ones."""
    logs = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    if any(map(is_choice, logs)):
        return _without_speed(next(entry for entry in reversed(logs) if is_choice(entry)))
    best = [entry for entry in logs if entry["step"] == state.best_global_step]
    return {name: v for entry in ((best if of_best else []) or logs)[-1:] for name, v in _without_speed(entry).items()}


def _without_speed(entry: Mapping[str, float], prefix: str = "eval_") -> dict[str, float]:
    speed = ("runtime", "per_second", "preparation_time")
    return {k: v for k, v in entry.items() if k.startswith(prefix) and not k.endswith(speed)}
