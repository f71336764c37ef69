"""Trained classifiers as they were saved: plain checkpoints, ensembles, models with two paths, deltas and adapters.

Only configs and safetensors are read: no pickles, no code from the Hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from hf_ft.data.classifier import settle_padding
from hf_ft.data.columns import ProblemType
from hf_ft.data.inputs import Wanted
from hf_ft.engine.checkpoint import BUFFERS_NAME, checked, digests
from hf_ft.engine.deltas import base_of, load_delta
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.inference.calibration import FILE, Calibration, read_calibration
from hf_ft.models.names import covers
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.sharing import KINDS
from hf_ft.models.tasks import auto_model, tasks_of
from hf_ft.models.weight_files import DELTA_NAME
from hf_ft.zoo.bases import load_base
from hf_ft.zoo.models import SHORT_NAMES, load_processor, task_of
from hf_ft.zoo.reading import file_of, read_config, weights_of
from hf_ft.zoo.short_names import short_name

REPLACED = "original_module"  # in the names of PEFT
READ = ("image", "text", "audio")  # tasks whose data can be read


@dataclass(frozen=True)
class Trained:
    """A trained classifier with what is needed to use it.

    Attributes:
        model: in eval mode.
        processor: its image processor, feature extractor or tokenizer.
        wanted: the data that it takes, and its classes.
        name: Hub id or folder; empty for a model in memory.
        calibration: its temperature, if one was fitted.
    """

    model: Any
    processor: Any
    wanted: Wanted
    name: str = ""
    calibration: Calibration | None = None

    @property
    def temperature(self) -> float:
        """The number by which logits are divided; 1 without calibration."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @classmethod
    def of(cls, model: Any, processor: Any, name: str = "") -> Trained:
        """A model in memory with its processor.

        Raises:
            OptionError: if it is not a classifier of images, texts or sounds.
        """
        if processor is None:
            raise OptionError("processor=None: pass the image processor, feature extractor or tokenizer of the model.")
        if task_of(model.config) == "text":
            settle_padding(name or "the model", model, processor)
        return cls(model.eval(), processor, wanted_of(model.config), name)


def wanted_of(config: Any) -> Wanted:
    """What a model with this config predicts.

    Raises:
        OptionError: if it is not a classifier of images, texts or sounds.
    """
    task = task_of(config)
    if task not in READ:
        raise OptionError(f"{type(config).__name__} classifies {task} data: only {', '.join(READ)} can be read.")
    kind: ProblemType = config.problem_type or (
        "regression" if config.num_labels == 1 else "single_label_classification"
    )
    return Wanted(task, kind, tuple(str(config.id2label[number]) for number in range(config.num_labels)))


def load_trained(name: str | Path, *, revision: str | None = None, base: str | None = None) -> Trained:
    """Load a trained classifier and its processor.

    Args:
        name: Hub id, or folder written by training; also of a delta or an adapter.
        base: the model that a delta or an adapter belongs to (default: the one that it names).

    Raises:
        OptionError: if there is no config or processor, or the model is not a classifier.
        CheckpointError: if weights are missing or damaged, or there is no trained head.
    """
    trained = _loaded(str(name), revision, base)
    file = file_of(str(name), FILE, revision)
    if file is None:
        return trained
    return replace(trained, calibration=calibration_of(file, trained.model))


def calibration_of(file: Path, model: Any) -> Calibration | None:
    """The calibration in a file; None, with a warning, if it does not belong to the weights of a model.

    Raises:
        CheckpointError: if the file is damaged.
    """
    return read_calibration(file, weights_digest(model))


def weights_digest(model: Any) -> str:
    """A hash of all weights that are used: not of a head that an adapter replaces, which is random in each base."""
    used = sorted(item for item in digests(model).items() if f".{REPLACED}." not in item[0])
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()


def _loaded(name: str, revision: str | None, base: str | None) -> Trained:
    folder = Path(name).expanduser()
    if name in SHORT_NAMES:
        raise OptionError(f"{name} is only pretrained: {_train(name)}")

    apart = folder if folder.is_dir() else _of_the_hub(name, revision)
    if apart is not None and (apart / DELTA_NAME).is_file():
        return _delta(apart, name, base)
    if apart is not None and (apart / ADAPTER_CONFIG_NAME).is_file():
        return _adapted(apart, name, base)
    if base is not None:
        raise OptionError(
            f"base={base!r} has no effect, since {name} is a whole model: leave it out.", arguments=("base",)
        )
    config = read_config(name, revision=revision or "main")
    _check_classifier(name, config)
    model = _whole(name, config, revision)
    return Trained.of(model, load_processor(name, config, task_of(config), None, revision), name)


def _of_the_hub(name: str, revision: str | None) -> Path | None:
    """The files of a delta or an adapter on the Hub; None for anything else, which Transformers can load."""
    for marker in (DELTA_NAME, ADAPTER_CONFIG_NAME):
        if file_of(name, marker, revision) is not None:
            with weights_of(name, revision):
                return Path(snapshot_download(name, revision=revision, allow_patterns=[f"*{kind}" for kind in KINDS]))
    return None


def _check_classifier(name: str, config: Any) -> None:
    if len(tasks_of(config)) != 1:
        raise OptionError(
            f"{name} ({type(config).__name__}) is not a classifier of images, texts or sounds: give a model that was "
            "trained as one, such as the --output_dir of `hf-ft train`."
        )


def _whole(name: str, config: Any, revision: str | None) -> Any:
    options: dict[str, Any] = {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    with weights_of(name, revision):
        model, info = auto_model(task_of(config)).from_pretrained(name, config=config, **options)
    missing = sorted(map(str, info.get("missing_keys", ())))
    if missing:
        raise CheckpointError(
            f"{name} has no weights for {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}: it is only "
            f"pretrained, or damaged; {_train(name)}"
        )
    return model


def _train(name: str) -> str:
    return f"train it with `hf-ft train --model {name}`, and give the folder that this writes."


def _delta(folder: Path, name: str, base: str | None) -> Trained:
    source = base or base_of(folder).name
    if not source:
        raise OptionError(
            f"{name} is a delta that does not name its base: set base to its Hub id or folder.", arguments=("base",)
        )
    model: Any = load_delta(folder) if base is None else load_delta(base, folder)
    task = task_of(model.config)
    return Trained.of(model, _processor_beside(folder, source, model.config, task), name)


def _adapted(folder: Path, name: str, base: str | None) -> Trained:
    """An adapter on its base; the head's size and the names of its classes are in the config next to it."""
    if not (folder / CONFIG_NAME).is_file():
        raise OptionError(
            f"{name} is an adapter without {CONFIG_NAME}, which names its classes: save the config of its model "
            "there (model.config.save_pretrained), or merge the adapter and save the model (merge=True)."
        )
    adapter = PeftConfig.from_pretrained(str(folder))
    source = base or adapter.base_model_name_or_path
    if not source:
        raise OptionError(
            f"{name} is an adapter that does not name its base: set base to its Hub id or folder.",
            arguments=("base",),
        )
    config = read_config(str(folder))
    _check_classifier(name, config)
    revision = adapter.revision if base is None else None
    with random_states_kept():  # the new head is replaced by that of the adapter
        with weights_of(source):
            plain, random = load_base(source, config, auto_model(task_of(config)), revision, use_safetensors=True)
        _check_head(name, random, getattr(adapter, "modules_to_save", None) or ())
        with weights_of(str(folder)):
            model = PeftModel.from_pretrained(plain, str(folder), use_safetensors=True)
    if (folder / BUFFERS_NAME).is_file():
        model.load_state_dict(checked(folder / BUFFERS_NAME)[0], strict=False)
    return Trained.of(model, _processor_beside(folder, source, config, task_of(config)), name)


def _check_head(name: str, random: Collection[str], saved: Collection[str]) -> None:
    """Refuse an adapter if parts that its base lacks would stay random."""
    missing = [weight for weight in random if not any(covers(module, weight) for module in saved)]
    if missing:
        raise CheckpointError(
            f"neither the adapter {name} nor its base has weights for {missing[0]}: set base to the model that it "
            "belongs to."
        )


def _processor_beside(folder: Path, base: str, config: Any, task: Any) -> Any:
    """The processor in a folder, or else that of the base."""
    try:
        return load_processor(str(folder), config, task, None, None)
    except OptionError:
        return load_processor(short_name(base) or base, config, task, None, None)
