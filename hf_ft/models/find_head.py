"""Find the head of a classifier: what a checkpoint of the pretrained base lacks."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_MAPPING

from hf_ft.errors import AnatomyError
from hf_ft.models.architectures import _HEAD_NAMES
from hf_ft.models.names import matches
from hf_ft.models.norms import _is_norm, is_dropout
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.tracing import Untraceable, forward_order


def find_head(model: nn.Module, wanted: str | None = None) -> list[str]:
    """Names of the modules that map features to logits, with the dropouts before the last of them.

    They are those given by `wanted`; else the modules outside the backbone; else timm's ``get_classifier()``; else
    what Transformers' base class lacks, if it runs last; else a child with a usual name. A lone norm is never
    part of the head, since it is pretrained (CvT, PoolFormer).

    Raises:
        AnatomyError: if there are none, or the model has no module with a name in `wanted`.
    """
    names = _find(model, wanted)
    # A head's dropout goes before its last layer: DistilBERT defines it after that layer but calls it before.
    return [*names[:-1], *_dropouts(model, names), names[-1]]


def backbone_of(model: nn.Module) -> nn.Module:
    """The pretrained backbone by Transformers' convention, else the whole model."""
    backbone = getattr(model, getattr(model, "base_model_prefix", None) or "base_model_prefix", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _find(model: nn.Module, wanted: str | None) -> list[str]:
    modules = dict(model.named_modules())
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",")]
        if missing := [name for name in names if not name or name not in modules]:
            raise AnatomyError(
                f"head={wanted!r}: the model has no module {', '.join(map(repr, missing))}. {children_of(model)}. "
                'Name modules, separated by commas, for instance head="classifier".'
            )
        return names
    backbone = backbone_of(model)
    names = []
    if backbone is not model:
        others = [(name, child) for name, child in model.named_children() if child is not backbone]
        names = [name for name, child in others if has_parameters(child) and not _is_norm(child)]
    if not names and hasattr(backbone, "get_classifier"):  # timm; distilled models return two heads
        classifier = cast(Any, backbone).get_classifier()
        heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        names = [n for n, m in modules.items() if has_parameters(m) and any(m is head for head in heads)]
    names = names or _lacking(model)
    if not names and backbone is model:
        names = [name for name in _HEAD_NAMES if name in modules and has_parameters(modules[name])][:1]
    if not names:
        raise AnatomyError(
            "Found no head: looked for top-level children with parameters outside the backbone, for "
            f"get_classifier(), for what the base class lacks, and for a child called {', '.join(_HEAD_NAMES)}. "
            f'{children_of(model)}. Name the head\'s module, for instance head="classifier".'
        )
    return names


def _lacking(model: nn.Module) -> list[str]:
    """The outermost modules without a parameter in common with the base class, if they are the last to run.

    Whisper's classifier has an encoder, which is pretrained, and a projector and a classifier, which are not.
    Perceiver's base lacks a preprocessor, which runs first and is not a head, and a decoder.
    """
    if model not in _BASES:
        _BASES[model] = _names_of_base(model)
    backbone = backbone_of(model)
    prefix = "" if backbone is model else next(n for n, m in model.named_modules() if m is backbone) + "."
    known = {f"{prefix}{name}" for name in _BASES[model]}
    if not known:
        return []
    lacking: list[str] = []
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        if name and own and not known.intersection(own) and not matches(name, lacking) and not _is_norm(module):
            lacking.append(name)
    if not lacking or len(lacking) == len([child for child in backbone.children() if has_parameters(child)]):
        return []  # or the base class shares no names with this one
    if prefix == "" and all("." not in name for name in lacking):
        return lacking
    return _last_to_run(model, known, lacking)


_BASES: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()


def _names_of_base(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of a Transformers classifier's base model; empty if it has none of its own."""
    config: Any = getattr(model, "config", None)
    base_class = MODEL_MAPPING.get(type(config), None) if type(config) in MODEL_MAPPING else None
    if not isinstance(base_class, type) or isinstance(model, base_class):
        return frozenset()
    try:
        with torch.device("meta"), random_states_kept():
            return frozenset(name for name, _ in cast(nn.Module, base_class(config)).named_parameters())
    except Exception:  # a base that this config does not describe
        return frozenset()


def _last_to_run(model: nn.Module, known: set[str], lacking: list[str]) -> list[str]:
    """The modules that are first used after everything that the base has."""
    try:
        begins = forward_order(model).begins
    except Untraceable:
        return []
    last = max((begins[name] for name in known if name in begins), default=-1)
    return [name for name in lacking if begins.get(name, -1) > last]


def _dropouts(model: nn.Module, head: list[str]) -> list[str]:
    """Dropouts next to the head: after everything else that has parameters, or outside the backbone."""
    apart = backbone_of(model) is not model
    found: list[str] = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in head):
        dot = f"{parent}." if parent else ""
        siblings = [(f"{dot}{name}", child) for name, child in model.get_submodule(parent).named_children()]
        others = [i for i, (name, child) in enumerate(siblings) if has_parameters(child) and name not in head]
        late = -1 if apart and not parent else max(others, default=-1)
        found += [name for i, (name, child) in enumerate(siblings) if i > late and name not in head and _is_drop(child)]
    return found


def _is_drop(module: nn.Module) -> bool:
    return is_dropout(module) and not has_parameters(module)


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def size_of(module: nn.Module) -> int:
    """The number of parameters in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def children_of(model: nn.Module) -> str:
    """Describe the top-level children, for messages."""
    children = [f"{n} ({type(c).__name__}, {size_of(c):,} parameters)" for n, c in model.named_children()]
    return f"{type(model).__name__} has the top-level children: {', '.join(children) or 'none'}"
