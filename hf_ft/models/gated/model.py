"""A classifier with two paths: built from a plain one, saved to a folder, loaded by Transformers' Auto classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import cached_file

from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.architectures import TRAIN_MODE_ALONE
from hf_ft.models.gated.config import GatedConfig, class_of, gated_config
from hf_ft.models.gated.paths import TwoPaths, install, wide_dtype
from hf_ft.models.gated.per_filter import PerFilter, PerFilterGate
from hf_ft.models.gated.per_sample import PerSample, PerSampleGate
from hf_ft.models.preserve import forget_evaluation, random_states_kept
from hf_ft.models.sharing import upload_of
from hf_ft.models.tasks import TASKS, auto_model, classes_of
from hf_ft.models.weight_files import COLLABORATIVE, GATED, WEIGHTS_NAME

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_KINDS: dict[str, tuple[Any, Any]] = {
    "per_sample": (PerSample, PerSampleGate),
    "per_filter": (PerFilter, PerFilterGate),
}


class GatedModel:
    """A classifier with two paths, as a class that precedes the classifier's own.

    An instance is also one of the classifier's class, with its forward, its config and its names of parameters; the
    gate and the frozen copy are in ``two_paths``. Only what is saved differs: ``config.json`` holds the classifier's
    config and the settings of the gate, ``model.safetensors`` all weights under the names of ``state_dict()``.
    """

    two_paths: TwoPaths
    config_class = GatedConfig  # older Auto classes look for it; those with two paths have the classifier's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OptionError(
            f"{type(self).__name__} with two paths cannot be created from a config or given another head: to train on "
            "other classes, start from the pretrained model."
        )

    @property
    def task(self) -> str:
        """``image``, ``text``, ``audio`` or ``video``."""
        found = _task_of(self)
        assert found is not None
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save ``config.json`` and ``model.safetensors``.

        Args:
            state_dict: weights to save instead of the current ones.
            push_to_hub: upload the files to ``repo_id`` (by default, the folder's name).
            options: options of the upload; those of ``save_pretrained`` have no effect.
        """
        if not is_main_process:
            return
        folder, model = Path(save_directory), cast(Any, self)
        folder.mkdir(parents=True, exist_ok=True)
        gate = self.two_paths.gate
        kind = next(name for name, (_, gate_class) in _KINDS.items() if type(gate) is gate_class)
        settings = {"kind": kind, **dataclasses.asdict(gate.settings)}
        gated_config(model, settings, self.task).save_pretrained(folder)
        tensors = {name: tensor.contiguous() for name, tensor in (state_dict or model.state_dict()).items()}
        save_file(_without_aliases(tensors), folder / WEIGHTS_NAME, metadata={"format": "pt"})
        if push_to_hub:
            with upload_of(folder, repo := options.pop("repo_id", folder.name)):
                model.push_to_hub(repo, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """Load such a model in eval mode, strictly.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            config: the config saved there, if it has been read; any other is not used.
            output_loading_info: also return the (empty) lists of weights that did not fit.
            options: ``dtype``, and where to find the files (``revision``, ``token``, ...); others have no effect.

        Raises:
            CheckpointError: if a file is missing or damaged, or of another model.
            OptionError: for another number of classes.
        """
        name, where = str(pretrained_model_name_or_path), {key: options[key] for key in _HUB if options.get(key)}
        dtype = options.get("dtype") or options.get("torch_dtype") or "auto"
        try:
            saved = config if isinstance(config, GatedConfig) else GatedConfig.from_pretrained(name, **where)
            if saved.model_type != GATED or not saved.base or not saved.gate:
                raise OptionError(f"its config is that of a {saved.model_type}")
            model = _built(saved, saved.dtype if dtype == "auto" else dtype)
            missing, unexpected = load_model(model, str(cached_file(name, WEIGHTS_NAME, **where)), strict=False)
        except (OSError, RuntimeError, SafetensorError, OptionError, TypeError, KeyError) as error:
            raise CheckpointError(f"{name} is not a complete model with two paths: {error}. Restore it.") from error
        if saved.num_labels != model.config.num_labels:
            raise OptionError(
                f"num_labels={saved.num_labels}: {name} has a head for {model.config.num_labels} classes. Load it as "
                "it is; to train on other classes, start from the pretrained model."
            )
        if missing or unexpected:
            raise CheckpointError(
                f"the weights in {name} do not fit its config: missing {sorted(missing)[:3]}, unexpected "
                f"{sorted(unexpected)[:3]}. Restore both."
            )
        saved.share_with(model.config)
        model.config.name_or_path = name
        forget_evaluation(model)
        info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, info) if output_loading_info else model


@dataclass(frozen=True)
class AddPaths:
    """Surgery: give a classifier a second path and a gate; the model stays the same object.

    Attributes:
        settings: the settings of the gate; completed for the model.
    """

    settings: Any

    def __call__(self, model: nn.Module) -> nn.Module:
        gate_class = next(gate for settings, gate in _KINDS.values() if settings is type(self.settings))
        with random_states_kept(torch.initial_seed() % 2**32):  # the same on every process
            gate = gate_class(self.settings.fitted(model), wide_dtype(model))
        return _with_paths(model, gate.to(next(model.parameters()).device))


def check_not_computed_again(args: TrainingArguments) -> None:
    """Reject gradient checkpointing.

    Raises:
        OptionError: if it is on.
    """
    if args.gradient_checkpointing:
        raise OptionError(
            "gradient_checkpointing=True recomputes layers when the decisions about them are gone, so a model with "
            "two paths cannot be trained with it: set it to False."
        )


def check_plain(model: nn.Module) -> None:
    """Reject a model that cannot have a second path.

    Raises:
        OptionError: naming the reason and the fix.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model, PeftModel):
        raise OptionError("a PEFT model cannot have two paths: pass its base model, or merge the adapters first.")
    if kind == COLLABORATIVE:
        raise OptionError("an ensemble cannot have two paths: pass one of its members (model.members[0]).")
    if not isinstance(model, PreTrainedModel):
        raise OptionError(f"{type(model).__name__} is not a Transformers model, so it could not be saved: pass one.")
    if isinstance(model, GatedModel):
        raise OptionError("the model has two paths already: pass the pretrained model, or train it with FullConfig.")
    if kind in TRAIN_MODE_ALONE:
        raise OptionError(f"the layers of {type(model).__name__} are reversible, so they cannot have a second path.")
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise OptionError("gradient checkpointing with two paths: call model.gradient_checkpointing_disable().")
    if _task_of(model) is None:
        raise OptionError(
            f"{type(model).__name__} is not a classifier that Transformers' Auto classes know, so it could not be "
            "loaded again: use one from Transformers."
        )


def _task_of(model: Any) -> str | None:
    """The task of a classifier, by its class."""
    classifier = getattr(type(model), "plain_class", type(model))
    return next((task for task in TASKS if classifier in classes_of(model.config, task)), None)


def _with_paths(model: Any, gate: nn.Module) -> Any:
    install(model, gate)
    model.__class__ = _gated(type(model))  # type: ignore[arg-type]
    return model


@functools.cache
def _gated(classifier: type) -> type:
    # Transformers looks things up by the printed form of a class, so the new one has that of the old.
    names = {name: getattr(classifier, name) for name in ("__module__", "__qualname__", "__doc__", "config_class")}
    more = {"plain_class": classifier, "supports_gradient_checkpointing": False}
    return type(classifier.__name__, (GatedModel, classifier), names | more)


def _built(saved: GatedConfig, dtype: Any) -> Any:
    """A model built from a saved config, in eval mode, with random weights."""
    assert saved.base is not None and saved.gate is not None
    content = dict(saved.gate)
    settings_class, gate_class = _KINDS[content.pop("kind")]
    config = saved.of_base()
    with random_states_kept():
        model = class_of(config, saved.task)(config)
        if dtype is not None:
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        gate = gate_class(
            settings_class(**{name: _tuples(value) for name, value in content.items()}), wide_dtype(model)
        )
    return _with_paths(model.eval(), gate.eval())


def _tuples(value: Any) -> Any:
    """Lists as tuples, as they were before they were JSON."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that several names share, under the first of these."""
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
    return {name: tensors[name] for name in first.values()}


for _task in TASKS:
    auto_model(_task).register(GatedConfig, GatedModel, exist_ok=True)
