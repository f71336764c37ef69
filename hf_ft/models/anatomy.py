"""What a model is made of: stem, blocks, neck, head, and its normalisation layers.

All architecture knowledge of the package lives here. The rest asks `anatomy(model)` and works with names: names
as in `model.named_modules()`, never as in a checkpoint file (Transformers renames tensors when it saves).
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
    """Take a classifier apart.

    A module between two blocks (patch merging) joins the block that follows, and a dropout before the last layer
    joins the head. With a PeftModel, names are those of `model.named_parameters()`, adapters included.

    Args:
        head: the head's module names, separated by commas, instead of what is found.
        blocks: regex that fits the whole name of each block, instead of what is known or guessed.
            Both in the names of the plain model: without PEFT's "base_model.model.".

    Raises:
        AnatomyError: no head or no blocks are found, or the arguments match nothing or overlap.
    """
    base, prefix = unwrap(model)
    members = members_of(base)
    if members:
        said = names_of_members(members, head, blocks)
        return joined([(f"{prefix}{n}", anatomy(m, *names)) for (n, m), names in zip(members, said, strict=True)])
    backbone = _backbone(base)
    head_names = _find_head(base, backbone, head)
    groups = _find_blocks(base, backbone, head_names, blocks)
    stem, groups, neck, head_names = _assign(base, backbone, groups, head_names)
    known = [prefix + name for name in itertools.chain(stem, *groups, neck, head_names)]
    # Tensors that sit on a mere container (timm's class token), or beside the base model (a PEFT prompt).
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    loose = [name for name, _ in tensors if not matches(name, known)]

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
    """The models that a model of several runs side by side, with their module names; of any other, none."""
    if getattr(getattr(model, "config", None), "model_type", None) != COLLABORATIVE:
        return []
    return [(f"members.{index}", member) for index, member in enumerate(cast(Any, model).members)]


def names_of_members(
    members: Sequence[tuple[str, nn.Module]], head: str | None, blocks: str | None
) -> list[tuple[str | None, str | None]]:
    """What counts for each member of what is said of head and blocks: all of it where it fits, else nothing.

    Raises:
        AnatomyError: it fits no member, or a member's head or blocks cannot be told.
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
    """Whether a module matters to training: it holds tensors, or behaves differently in train mode."""
    has_buffers = next(module.buffers(), None) is not None
    return _has_parameters(module) or has_buffers or any(is_dropout(child) for child in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _holder(run: list[str]) -> str:
    """The module that has the list of a run."""
    return _parent(_parent(run[0]))


def _children(model: nn.Module) -> str:
    """The top-level children in words, for messages."""
    found = [f"{n} ({type(c).__name__}, {_size(c):,} parameters)" for n, c in model.named_children()]
    return f"{type(model).__name__} has the top-level children: {', '.join(found) or 'none'}"


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside a PeftModel, and the prefix its names have there ('base_model.model.' for LoRA)."""
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model, ""
    base = cast(Any, model).get_base_model()
    return base, next(name for name, module in model.named_modules() if module is base) + "."


def _backbone(model: nn.Module) -> nn.Module:
    """The pretrained part by Transformers' convention, else the whole model."""
    backbone = getattr(model, getattr(model, "base_model_prefix", None) or "base_model_prefix", None)
    return backbone if isinstance(backbone, nn.Module) else model


def _find_head(model: nn.Module, backbone: nn.Module, wanted: str | None) -> list[str]:
    """Names of the modules that turn features into logits."""
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
        # A bare norm beside the backbone (CvT, PoolFormer) is pretrained: neck, not head.
        others = [(name, child) for name, child in model.named_children() if child is not backbone]
        names = [name for name, child in others if _has_parameters(child) and not _is_norm(child)]
    if not names and hasattr(backbone, "get_classifier"):  # timm; distilled models return two heads
        found = cast(Any, backbone).get_classifier()
        heads = found if isinstance(found, (tuple, list)) else (found,)
        names = [n for n, m in modules.items() if _has_parameters(m) and any(m is head for head in heads)]
    if not names and backbone is model:
        names = [name for name in _HEAD_NAMES if name in modules and _has_parameters(modules[name])][:1]
    if not names:
        raise AnatomyError(
            "Found no head: looked for top-level children with parameters beside the backbone, for "
            f"get_classifier() and for a child called {', '.join(_HEAD_NAMES)}. {_children(model)}. "
            'Name the head\'s module, for instance head="classifier".'
        )
    return names


def _find_blocks(model: nn.Module, backbone: nn.Module, head: list[str], pattern: str | None) -> list[list[str]]:
    """The modules of each block, in forward order."""
    model_type = getattr(getattr(model, "config", None), "model_type", None) or ""
    runs = _repeated(model, head)
    regex = _BLOCKS.get(model_type) if pattern is None else pattern
    names = [] if regex is None else _match(model, regex)
    if not names and pattern is None:  # unknown architecture, or the names of another Transformers version
        names = _most_of(model, backbone, runs, head)
    if not names:
        tried = f"model_type {model_type!r} or by size" if pattern is None else f"blocks={pattern!r}"
        known = [f"{r[0]} ... {r[-1]} ({len(r)} x {type(model.get_submodule(r[0])).__name__})" for r in runs]
        raise AnatomyError(
            f"Found no blocks by {tried}. {_children(model)}. Repeated modules: {'; '.join(known) or 'none'}. "
            'Give a regex that fits whole names, for instance blocks=r"encoder\\.layer\\.\\d+".'
        )
    if clash := [name for name in names if matches(name, head) or any(matches(h, [name]) for h in head)]:
        raise AnatomyError(
            f"The blocks {', '.join(clash[:3])} overlap the head {', '.join(head)}. {_children(model)}. "
            'Set head="..." to a module outside of the blocks, or blocks=r"..." to fit less.'
        )
    step = _MODULES_PER_BLOCK.get(model_type, 1) if pattern is None else 1
    return [names[i : i + step] for i in range(0, len(names), step)]


def _most_of(model: nn.Module, backbone: nn.Module, runs: list[list[str]], head: list[str]) -> list[str]:
    """The largest run, if it holds over half of the backbone (embeddings apart, they dwarf a small encoder)."""

    def size(run: list[str]) -> int:
        return sum(_size(model.get_submodule(name)) for name in run)

    heads = {model.get_submodule(name) for name in head}
    apart = sum(_size(m) for m in backbone.modules() if isinstance(m, nn.Embedding) or m in heads)
    best = max(runs, key=size, default=[])  # the outermost of equals
    # XLM keeps attentions and feed-forward layers in two lists, and calls them in turn: neither is a block.
    twins = [run for run in runs if len(run) == len(best) and _holder(run) == _holder(best)]
    if len(twins) != 1:
        return []
    return best if 2 * size(best) > _size(backbone) - apart else []


def _match(model: nn.Module, pattern: str) -> list[str]:
    """The modules whose whole name fits: the outermost, but inside a list of blocks the blocks themselves."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise AnatomyError(f"blocks={pattern!r} is not a regular expression: {error}.") from error
    hits = [name for name, _ in model.named_modules() if name and regex.fullmatch(name)]
    holders = {holder for name in hits for holder in hits if name.startswith(holder + ".")}
    lists = {n for n in holders if isinstance(model.get_submodule(n), (nn.Sequential, nn.ModuleList))}
    found: list[str] = []
    for name in hits:
        if name not in lists and not matches(name, found[-1:]):
            found.append(name)
    return found


def _repeated(model: nn.Module, head: list[str]) -> list[list[str]]:
    """Runs of two or more non-leaf modules of one class; lists side by side (layer1, layer2, ...) make one run."""
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
    """The modules that parts are made of, in definition order: `ends`, and what lies outside of all of them."""
    ancestors = {end[:i] for end in ends for i, letter in enumerate(end) if letter == "."} - ends
    units: list[str] = []
    for name, module in model.named_modules():
        if not name or name in ancestors or matches(name, units[-1:]):
            continue
        # A ModuleList is never called, so it is no step of the forward pass: its children are.
        if name in ends or (_is_unit(module) and type(module) is not nn.ModuleList):
            units.append(name)
    return units


def _assign(
    model: nn.Module, backbone: nn.Module, groups: list[list[str]], head: list[str]
) -> tuple[list[str], list[list[str]], list[str], list[str]]:
    """Give every unit to the stem, a block, the neck or the head."""
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
    # A head's dropout stands before its last layer: DistilBERT defines it behind, and calls it there.
    return stem, parts, neck, [*head[:-1], *dropouts, head[-1]]


def _stages(model: nn.Module, groups: list[list[str]]) -> tuple[tuple[int, ...], ...]:
    """Block indices by stage: by the list that holds them, else (flat CNN) a new stage at every stride."""
    holders = [_parent(group[-1]) for group in groups]
    keys: Sequence[Hashable] = holders
    if len(set(holders)) == 1 and not any(step.isdigit() for step in holders[0].split(".")):
        strides = [any(_is_strided(model.get_submodule(name)) for name in group) for group in groups]
        flat = any(strides) and not holders[0].endswith("stages")  # a block may itself be a stage
        keys = list(itertools.accumulate(strides)) if flat else list(range(len(groups)))
    grouped = itertools.groupby(range(len(groups)), key=keys.__getitem__)
    return tuple(tuple(indices) for _, indices in grouped)


def _is_strided(block: nn.Module) -> bool:
    return any(isinstance(module, _ConvNd) and max(module.stride) > 1 for module in block.modules())
