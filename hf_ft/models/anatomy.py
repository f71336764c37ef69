"""The anatomy of a model: stem, blocks, neck and head.

All architecture knowledge of the package lives here. Other modules call `anatomy(model)` and work with module names:
those of `model.named_modules()`, never those of a checkpoint file (Transformers renames tensors on saving).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_ft.errors import AnatomyError
from hf_ft.models.architectures import _BLOCKS, _FEEDS_BLOCKS, _FOLLOWS_BLOCKS, _HEAD_NAMES, _MODULES_PER_BLOCK
from hf_ft.models.names import matches
from hf_ft.models.norms import _is_norm, is_dropout
from hf_ft.models.parts import Anatomy, Part, joined
from hf_ft.models.weight_files import COLLABORATIVE


def anatomy(model: nn.Module, head: str | None = None, blocks: str | None = None) -> Anatomy:
    """Split a classifier into stem, blocks, neck and head.

    A module between two blocks (patch merging) belongs to the block after it, and a dropout before the last layer
    belongs to the head. For a PeftModel, names are those of `model.named_parameters()`, adapters included.

    Args:
        head: names of the head's modules, separated by commas; found automatically by default.
        blocks: regex that matches the full name of each block; known or inferred by default.
            Both use the names of the plain model, without PEFT's "base_model.model.".

    Raises:
        AnatomyError: if no head or no blocks are found, or if the arguments match nothing or overlap.
    """
    base, prefix = unwrap(model)
    members = members_of(base)
    if members:
        arguments = names_of_members(members, head, blocks)
        return joined([(f"{prefix}{n}", anatomy(m, *names)) for (n, m), names in zip(members, arguments, strict=True)])
    backbone = _backbone(base)
    head_names = _find_head(base, backbone, head)
    groups = _find_blocks(base, backbone, head_names, blocks)
    stem, groups, neck, head_names = _assign(base, backbone, groups, head_names)
    part_modules = [prefix + name for name in itertools.chain(stem, *groups, neck, head_names)]
    # Tensors that belong to a mere container (timm's class token) or lie outside the base model (a PEFT prompt).
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    loose = [name for name, _ in tensors if not matches(name, part_modules)]

    def part(name: str, modules: list[str]) -> Part:
        return Part(name, tuple(prefix + module for module in modules))

    return Anatomy(
        stem=Part("stem", (*part("stem", stem).modules, *loose)),
        blocks=tuple(part(f"block{i}", group) for i, group in enumerate(groups)),
        neck=part("neck", neck),
        head=part("head", head_names),
        stages=_stages(base, groups),
    )


def members_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of an ensemble with their module names; empty for any other model."""
    if getattr(getattr(model, "config", None), "model_type", None) != COLLABORATIVE:
        return []
    return [(f"members.{index}", member) for index, member in enumerate(cast(Any, model).members)]


def names_of_members(
    members: Sequence[tuple[str, nn.Module]], head: str | None, blocks: str | None
) -> list[tuple[str | None, str | None]]:
    """The `head` and `blocks` arguments for each member: both where they fit it, else None.

    Raises:
        AnatomyError: if they fit no member, or if a member's head or blocks cannot be found.
    """
    fitting: list[tuple[str | None, str | None]] = []
    errors = []
    for name, member in members:
        try:
            anatomy(member, head, blocks)
            fitting.append((head, blocks))
        except AnatomyError as error:
            errors.append(AnatomyError(f"{name}: {error}"))
            if (head is None and blocks is None) or len(errors) == len(members):
                raise errors[0] from error
            fitting.append((None, None))
    return fitting


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_unit(module: nn.Module) -> bool:
    """Whether a module matters to training: it holds tensors, or it behaves differently in train mode."""
    has_buffers = next(module.buffers(), None) is not None
    return _has_parameters(module) or has_buffers or any(is_dropout(child) for child in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _holder(run: list[str]) -> str:
    """The module that holds the list of a run."""
    return _parent(_parent(run[0]))


def _children(model: nn.Module) -> str:
    """Describe the top-level children, for messages."""
    children = [f"{n} ({type(c).__name__}, {_size(c):,} parameters)" for n, c in model.named_children()]
    return f"{type(model).__name__} has the top-level children: {', '.join(children) or 'none'}"


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model of a PeftModel, and the prefix of its module names there ('base_model.model.' for LoRA)."""
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model, ""
    base = cast(Any, model).get_base_model()
    return base, next(name for name, module in model.named_modules() if module is base) + "."


def _backbone(model: nn.Module) -> nn.Module:
    """The pretrained backbone by Transformers' convention, else the whole model."""
    backbone = getattr(model, getattr(model, "base_model_prefix", None) or "base_model_prefix", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _find_head(model: nn.Module, backbone: nn.Module, wanted: str | None) -> list[str]:
    """Names of the modules that map features to logits."""
    modules = dict(model.named_modules())
    if wanted is not None:
        names = [name.strip() for name in wanted.split(",")]
        if missing := [name for name in names if not name or name not in modules]:
            raise AnatomyError(
                f"head={wanted!r}: the model has no module {', '.join(map(repr, missing))}. {_children(model)}. "
                'Name modules, separated by commas, for instance head="classifier".'
            )
        return names
    names = []
    if backbone is not model:
        # A lone norm outside the backbone (CvT, PoolFormer) is pretrained: it is part of the neck, not of the head.
        others = [(name, child) for name, child in model.named_children() if child is not backbone]
        names = [name for name, child in others if _has_parameters(child) and not _is_norm(child)]
    if not names and hasattr(backbone, "get_classifier"):  # timm; distilled models return two heads
        classifier = cast(Any, backbone).get_classifier()
        heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        names = [n for n, m in modules.items() if _has_parameters(m) and any(m is head for head in heads)]
    if not names and backbone is model:
        names = [name for name in _HEAD_NAMES if name in modules and _has_parameters(modules[name])][:1]
    if not names:
        raise AnatomyError(
            "Found no head: looked for top-level children with parameters outside the backbone, for "
            f"get_classifier() and for a child called {', '.join(_HEAD_NAMES)}. {_children(model)}. "
            'Name the head\'s module, for instance head="classifier".'
        )
    return names


def _find_blocks(model: nn.Module, backbone: nn.Module, head: list[str], pattern: str | None) -> list[list[str]]:
    """Module names of each block, in forward order."""
    model_type = getattr(getattr(model, "config", None), "model_type", None) or ""
    runs = _repeated(model, head)
    regex = _BLOCKS.get(model_type) if pattern is None else pattern
    names = [] if regex is None else _match(model, regex)
    if not names and pattern is None:  # unknown architecture, or names of another Transformers version
        names = _most_of(model, backbone, runs, head)
    if not names:
        criterion = f"model_type {model_type!r} or by size" if pattern is None else f"blocks={pattern!r}"
        repeats = [f"{r[0]} ... {r[-1]} ({len(r)} x {type(model.get_submodule(r[0])).__name__})" for r in runs]
        raise AnatomyError(
            f"Found no blocks by {criterion}. {_children(model)}. Repeated modules: {'; '.join(repeats) or 'none'}. "
            'Give a regex that matches whole names, for instance blocks=r"encoder\\.layer\\.\\d+".'
        )
    if clash := [name for name in names if matches(name, head) or any(matches(h, [name]) for h in head)]:
        raise AnatomyError(
            f"The blocks {', '.join(clash[:3])} overlap the head {', '.join(head)}. {_children(model)}. "
            'Set head="..." to a module outside the blocks, or blocks=r"..." to match fewer modules.'
        )
    step = _MODULES_PER_BLOCK.get(model_type, 1) if pattern is None else 1
    return [names[i : i + step] for i in range(0, len(names), step)]


def _most_of(model: nn.Module, backbone: nn.Module, runs: list[list[str]], head: list[str]) -> list[str]:
    """The largest run if it holds over half of the backbone (without embeddings, which dwarf a small encoder)."""

    def size(run: list[str]) -> int:
        return sum(_size(model.get_submodule(name)) for name in run)

    heads = {model.get_submodule(name) for name in head}
    apart = sum(_size(m) for m in backbone.modules() if isinstance(m, nn.Embedding) or m in heads)
    best = max(runs, key=size, default=[])  # the outermost among equals
    # XLM keeps attentions and feed-forward layers in two lists and calls them alternately: neither is a block.
    twins = [run for run in runs if len(run) == len(best) and _holder(run) == _holder(best)]
    if len(twins) != 1:
        return []
    return best if 2 * size(best) > _size(backbone) - apart else []


def _match(model: nn.Module, pattern: str) -> list[str]:
    """The outermost modules whose full name matches; for a list of blocks, the blocks themselves."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise AnatomyError(f"blocks={pattern!r} is not a regular expression: {error}.") from error
    hits = [name for name, _ in model.named_modules() if name and regex.fullmatch(name)]
    holders = {holder for name in hits for holder in hits if name.startswith(holder + ".")}
    lists = {n for n in holders if isinstance(model.get_submodule(n), (nn.Sequential, nn.ModuleList))}
    names: list[str] = []
    for name in hits:
        if name not in lists and not matches(name, names[-1:]):
            names.append(name)
    return names


def _repeated(model: nn.Module, head: list[str]) -> list[list[str]]:
    """Runs of two or more non-leaf modules of one class; parallel lists (layer1, layer2, ...) form one run."""
    runs: dict[tuple[str, type], list[str]] = {}
    for name, module in model.named_modules():
        if matches(name, head) or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = dict(module.named_children())
        kinds = {type(child) for child in children.values()}
        nested = any(next(child.children(), None) is not None for child in children.values())
        if nested and len(kinds) == 1 and nn.ModuleList not in kinds:
            runs.setdefault((_parent(name), kinds.pop()), []).extend(f"{name}.{child}" for child in children)
    return [run for run in runs.values() if len(run) > 1]


def _units(model: nn.Module, ends: set[str]) -> list[str]:
    """The modules that make up the parts, in definition order: `ends`, and whatever lies outside all of them."""
    ancestors = {end[:i] for end in ends for i, letter in enumerate(end) if letter == "."} - ends
    units: list[str] = []
    for name, module in model.named_modules():
        if not name or name in ancestors or matches(name, units[-1:]):
            continue
        # A ModuleList is never called, so it is not a step of the forward pass; its children are.
        if name in ends or (_is_unit(module) and type(module) is not nn.ModuleList):
            units.append(name)
    return units


def _assign(
    model: nn.Module, backbone: nn.Module, groups: list[list[str]], head: list[str]
) -> tuple[list[str], list[list[str]], list[str], list[str]]:
    """Assign every unit to the stem, a block, the neck or the head."""
    owner = {name: index for index, group in enumerate(groups) for name in group}
    units = [name for name in _units(model, {*owner, *head}) if name not in head]
    positions = [position for position, name in enumerate(units) if name in owner]
    beside_head = {_parent(name) for name in head}
    stem, neck, dropouts = [], [], []
    parts: list[list[str]] = [[] for _ in groups]
    between: list[str] = []
    for position, name in enumerate(units):
        before, after = position < positions[0], position > positions[-1]
        late = after or ("." not in name and backbone is not model)
        if name in owner:
            parts[owner[name]] += [*between, name]
            between = []
        elif late and _parent(name) in beside_head and is_dropout(model.get_submodule(name)):
            dropouts.append(name)
        elif (before and not _FOLLOWS_BLOCKS.fullmatch(name)) or (after and _FEEDS_BLOCKS.fullmatch(name)):
            stem.append(name)
        elif before or after:
            neck.append(name)
        else:
            between.append(name)
    # A head's dropout goes before its last layer: DistilBERT defines it after that layer but calls it before.
    return stem, parts, neck, [*head[:-1], *dropouts, head[-1]]


def _stages(model: nn.Module, groups: list[list[str]]) -> tuple[tuple[int, ...], ...]:
    """Block indices by network stage: by the list that holds them; in a flat CNN, a stage begins at every stride."""
    holders = [_parent(group[-1]) for group in groups]
    keys: Sequence[Hashable] = holders
    if len(set(holders)) == 1 and not any(step.isdigit() for step in holders[0].split(".")):
        strides = [any(_is_strided(model.get_submodule(name)) for name in group) for group in groups]
        flat = any(strides) and not holders[0].endswith("stages")  # a block may itself be a stage
        keys = list(itertools.accumulate(strides)) if flat else list(range(len(groups)))
    stages = itertools.groupby(range(len(groups)), key=keys.__getitem__)
    return tuple(tuple(indices) for _, indices in stages)


def _is_strided(block: nn.Module) -> bool:
    return any(isinstance(module, _ConvNd) and max(module.stride) > 1 for module in block.modules())
