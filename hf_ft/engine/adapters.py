"""Plan surgery that adds PEFT adapters inside selected modules, and merges them back into the weights."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_ft.core.options import tuner_from_json, tuner_to_json
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import unwrap
from hf_ft.models.example_inputs import example_inputs
from hf_ft.models.names import Names, covers
from hf_ft.models.norms import norm_layers
from hf_ft.models.preserve import observing, random_states_kept

NORMS = "LN_TUNING"  # kinds of tuners by what they adapt
CONV1D = ("LORA", "IA3")  # GPT-2's linear layers
EMBEDDINGS = ("LORA", "ADALORA", "RANDLORA")
LINEAR = ("VERA", "FOURIERFT", "RANDLORA", "VBLORA", "BONE", "MISS", "SHIRA", "WAVEFT", "C3A", "ADALORA")
PREFIX = "base_model.model."  # prefix of the base model's modules in a PeftModel


def adapter_targets(model: nn.Module, inside: Names, head: Names, tuner: PeftConfig) -> Names:
    """Modules under ``inside``, outside the head, that get an adapter: those named by the tuner, or all supported ones.

    Depthwise and grouped convolutions are not supported: they do not allow an arbitrary rank.
    """
    wanted, kind = getattr(tuner, "target_modules", None), str(getattr(tuner.peft_type, "value", tuner.peft_type))
    norms = {name for name, _ in norm_layers(model)} if kind == NORMS else set()
    targets = []
    for name, module in model.named_modules():
        fits = name in norms if kind == NORMS else _fits(module, kind)
        named = wanted is None or wanted == "all-linear" or _is_named(name, wanted)
        if fits and named and _in(name, inside) and not _in(name, head) and module.weight.requires_grad:
            targets.append(name)
    return tuple(targets)


def _fits(module: Any, kind: str) -> bool:
    """Whether a tuner can adapt a module. Classes with a forward of their own compute something else."""
    if type(module).forward is nn.Conv2d.forward:
        return bool(module.groups == 1) and kind not in LINEAR
    if type(module).forward is nn.Embedding.forward:
        return kind in EMBEDDINGS
    return type(module).forward is nn.Linear.forward or (type(module) is Conv1D and kind in CONV1D)


def _is_named(name: str, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == target or name.endswith("." + target) for target in wanted)


@dataclass(frozen=True)
class AddAdapters:
    """Surgery: add adapters to the target modules; ``saved`` modules (head, norms) train fully and are saved with them.

    Attributes:
        tuner: the PEFT config as JSON text, so that equal configs compare equal.
    """

    targets: Names
    saved: Names
    tuner: str

    def __call__(self, model: nn.Module) -> nn.Module:
        config = tuner_from_json(json.loads(self.tuner))
        config.target_modules = list(self.targets)  # type: ignore[attr-defined]
        config.modules_to_save = list(self.saved)  # type: ignore[attr-defined]
        try:
            # The same on every process, and where the model is set up again.
            with random_states_kept(torch.initial_seed() % 2**32), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT uses deprecated Transformers names
                adapted: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            raise OptionError(f"tuner: PEFT rejects {type(config).__name__} for this block: {error}") from error
        _check_attributes(adapted)
        return adapted


def _check_attributes(model: nn.Module) -> None:
    """Reject a model whose code reads attributes that adapted layers no longer have, such as MobileNet's strides.

    Raises:
        OptionError: naming the attribute.
    """
    for batch in example_inputs(unwrap(model)[0]):
        try:
            with observing(model):
                model(**batch)
            return
        except AttributeError as error:
            raise OptionError(
                f"tuner: the model reads what an adapter hides ({error}). Choose other target_modules, or use "
                "BitFitConfig."
            ) from error
        except Exception:  # inputs that do not suit the model
            continue


def add_adapters(
    model: nn.Module, inside: Names, head: Names, tuner: PeftConfig, with_norms: bool = True
) -> AddAdapters:
    """Adapters in the modules ``inside``; the head and, unless ``with_norms`` is False, the norms inside train fully.

    Raises:
        OptionError: if no module inside supports an adapter.
    """
    if not hasattr(tuner, "target_modules"):
        raise OptionError(
            f"tuner: {type(tuner).__name__} does not adapt modules, so it cannot be limited to a block: use one that "
            "does, such as LoraConfig(r=8)."
        )
    targets = adapter_targets(model, inside, head, tuner)
    if not targets:
        raise OptionError(
            f"tuner: none of {', '.join(inside) or 'no modules'} supports an adapter (linear layers, embeddings and "
            "ungrouped convolutions do): choose another block, or other target_modules."
        )
    norms = [name for name, _ in norm_layers(model) if with_norms and _in(name, inside) and not _in(name, head)]
    norms = [name for name in norms if _trains(model, name) and name not in targets]
    heads = [name for name in head if _trains(model, name)]
    return AddAdapters(targets, (*norms, *heads), json.dumps(tuner_to_json(tuner), sort_keys=True))


def merge_adapters(model: nn.Module) -> nn.Module:
    """The model without PEFT's wrapper, with its adapters merged into the weights.

    Raises:
        OptionError: if adapters of this kind cannot be merged.
    """
    if not isinstance(model, PeftModel):
        return model
    kind = type(next(iter(model.peft_config.values()))).__name__
    try:
        merged: nn.Module = model.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise OptionError(f"merge: adapters of {kind} cannot be merged ({error}): set merge=False.") from error
    for name, module in list(merged.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # some kinds leave these
            merged.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    return merged


def _in(name: str, modules: Names) -> bool:
    return any(covers(module, name) for module in modules)


def _trains(model: nn.Module, name: str) -> bool:
    return any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())
