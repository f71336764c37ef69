"""The anatomy of a model: stem, blocks, neck and head.

All architecture knowledge of the package is in this module and those that it uses: the head is found in
:mod:`~hf_ft.models.find_head`, the blocks in :mod:`~hf_ft.models.find_blocks`. Other modules call `anatomy(model)` and
work with module names: those of `model.named_modules()`, never those of a checkpoint file (Transformers renames tensors
on saving).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_ft.errors import AnatomyError
from hf_ft.models.architectures import _FEEDS_BLOCKS, _FOLLOWS_BLOCKS
from hf_ft.models.find_blocks import find_blocks, is_known
from hf_ft.models.find_head import find_head, has_parameters
from hf_ft.models.names import BESIDE, covers, matches, parents
from hf_ft.models.norms import is_dropout
from hf_ft.models.parts import Anatomy, Body, Part, joined
from hf_ft.models.repeated_modules import parent_of
from hf_ft.models.tracing import Order
from hf_ft.models.weight_files import COLLABORATIVE


def anatomy(model: nn.Module, head: str | None = None, blocks: str | None = None) -> Anatomy:
    """Split a classifier into stem, blocks, neck and head.

    The head is found immediately; the rest when it is first read, unless `blocks` is given. What lies outside the
    blocks
    is assigned by when a forward pass first uses it: before the blocks to the stem, after them to the neck, in between
    (patch merging) to the block that follows. A dropout before the last layer belongs to the head. For a PeftModel,
    names are those of `model.named_parameters()`, adapters included.

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
    with _single_path(base) as beside:
        names = find_head(base, head)
        units = [unit for unit in _units(base, set(names), None) if unit not in names]
        loose = _loose(model, [prefix + name for name in [*units, *names]])
    rest = (*(prefix + unit for unit in [*beside, *units]), *loose)
    find_body = partial(_body, model, base, prefix, names, blocks)
    found = Anatomy(_part("head", names, prefix), Part("backbone", rest), find_body)
    if blocks is not None:
        _ = found.body  # which raises if they match nothing
    return found


@contextlib.contextmanager
def _single_path(model: nn.Module) -> Iterator[list[str]]:
    """A model without its gate and its frozen copy, whose name is given: they run first and count as stem."""
    beside = model._modules.pop(BESIDE, None)
    try:
        yield [] if beside is None else [BESIDE]
    finally:
        if beside is not None:
            model._modules[BESIDE] = beside


def _part(name: str, modules: Sequence[str], prefix: str) -> Part:
    return Part(name, tuple(prefix + module for module in modules))


def _body(model: nn.Module, base: nn.Module, prefix: str, head: list[str], pattern: str | None) -> Body:
    """Stem, blocks and neck of a model whose head is known."""
    with _single_path(base) as beside:
        groups, order = find_blocks(base, head, pattern)
        ends = {*itertools.chain(*groups), *head}
        units = [name for name in _units(base, ends, order) if name not in head]
        loose = _loose(model, [prefix + name for name in [*units, *head]])
    if order is None:
        stem, parts, neck = _by_definition(groups, units)
        stem_modules = (*_part("stem", stem, prefix).modules, *loose)
    else:
        mine = [name.removeprefix(prefix) for name in loose if name.startswith(prefix)]
        outside = [name for name in loose if not name.startswith(prefix)]
        stem, parts, neck = _by_order(groups, units, mine, order)
        stem_modules = (*_part("stem", stem, prefix).modules, *outside)
    return Body(
        stem=Part("stem", (*(prefix + name for name in beside), *stem_modules)),
        blocks=tuple(_part(f"block{i}", names, prefix) for i, names in enumerate(parts)),
        neck=_part("neck", neck, prefix),
        stages=_stages(base, groups),
    )


def _loose(model: nn.Module, units: Sequence[str]) -> list[str]:
    """Tensors that belong to a mere container (timm's class token) or are outside the base model (a PEFT prompt)."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    inside = set(units)
    return [name for name, _ in tensors if inside.isdisjoint(parents(name))]


def members_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of an ensemble with their module names; empty for any other model."""
    if getattr(getattr(model, "config", None), "model_type", None) != COLLABORATIVE:
        return []
    return [(f"members.{index}", member) for index, member in enumerate(cast(Any, model).members)]


def is_traced(model: nn.Module) -> bool:
    """Whether finding the blocks requires a forward pass, since the order of a model's modules is not known."""
    base, _ = unwrap(model)
    parts = [member for _, member in members_of(base)] or [base]
    return not all(is_known(part) for part in parts)


def names_of_members(
    members: Sequence[tuple[str, nn.Module]], head: str | None, blocks: str | None
) -> list[tuple[str | None, str | None]]:
    """The `head` and `blocks` arguments for each member: as given if they fit it, else None.

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


def _is_unit(module: nn.Module) -> bool:
    """Whether a module matters to training: it holds tensors, or it behaves differently in train mode."""
    has_buffers = next(module.buffers(), None) is not None
    return has_parameters(module) or has_buffers or any(is_dropout(child) for child in module.modules())


def unwrap(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model of a PeftModel, and the prefix of its module names there ('base_model.model.' for LoRA)."""
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model, ""
    base = cast(Any, model).get_base_model()
    return base, next(name for name, module in model.named_modules() if module is base) + "."


def parameters_under(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of these modules; in a PeftModel, the names may also be those in its base model.

    A plan is made for the model as it is, and the surgery of another strategy may then add adapters.
    """
    prefixes, wrapper = tuple(names), unwrap(model)[1]
    for name, parameter in model.named_parameters():
        if any(covers(prefix, name) or covers(prefix, name.removeprefix(wrapper)) for prefix in prefixes):
            yield name, parameter


def _units(model: nn.Module, ends: set[str], order: Order | None) -> list[str]:
    """The modules that make up the parts, in definition order: `ends`, and whatever is outside all of them."""
    ancestors = {end[:i] for end in ends for i, letter in enumerate(end) if letter == "."} - ends
    units: list[str] = []
    for name, module in model.named_modules():
        if not name or name in ancestors or matches(name, units[-1:]):
            continue
        # A ModuleList is never called, so it is not a step of the forward pass; its children are.
        if name in ends or (
            _is_unit(module) and type(module) is not nn.ModuleList and not _opened(name, module, order)
        ):
            units.append(name)
    return units


def _opened(name: str, module: nn.Module, order: Order | None) -> bool:
    """Whether a module with weights is never called, but something in it is: its children may run at any time."""
    if order is None or name in order.called or not has_parameters(module):
        return False
    return any(inner.startswith(f"{name}.") for inner in order.called)


Places = tuple[list[str], list[list[str]], list[str]]  # stem, blocks, neck


def _by_definition(groups: list[list[str]], units: list[str]) -> Places:
    """Assign every unit to the stem, a block or the neck, if modules are defined in the order in which they run."""
    owner = {name: index for index, group in enumerate(groups) for name in group}
    positions = [position for position, name in enumerate(units) if name in owner]
    stem: list[str] = []
    neck: list[str] = []
    between: list[str] = []
    parts: list[list[str]] = [[] for _ in groups]
    for position, name in enumerate(units):
        before, after = position < positions[0], position > positions[-1]
        if name in owner:
            parts[owner[name]] += [*between, name]
            between = []
        elif (before and not _FOLLOWS_BLOCKS.fullmatch(name)) or (after and _FEEDS_BLOCKS.fullmatch(name)):
            stem.append(name)
        elif before or after:
            neck.append(name)
        else:
            between.append(name)
    return stem, parts, neck


def _by_order(groups: list[list[str]], units: list[str], loose: list[str], order: Order) -> Places:
    """Assign every unit and loose tensor to the stem, a block or the neck by when it is first used.

    What is first used inside the first block (a mask, relative positions) is made for all of them and belongs to the
    stem; inside another block, to that block. What is never used belongs to the stem, unless it is defined last.
    """
    begins, ends = order.begins, order.ends
    owned = set(itertools.chain(*groups))
    starts = [min((begins[name] for name in group if name in begins), default=-1) for group in groups]
    stops = [max((ends[name] for name in group if name in ends), default=-1) for group in groups]
    places: tuple[list[str], list[list[str]], list[str]] = ([], [[] for _ in groups], [])
    stem, parts, neck = places
    last = max((position for position, name in enumerate(units) if name in owned), default=len(units))
    times, before = {}, -1
    for position, name in enumerate(units):
        late = position > last or _FOLLOWS_BLOCKS.fullmatch(name) is not None
        before = begins.get(name, max(stops) + 1 if late else min(before, starts[0]))
        times[name] = before
    for name in [*sorted(times, key=times.__getitem__), *loose]:
        if name in owned:
            continue
        time = times.get(name, begins.get(name, -1))
        # The last block that has begun, and whether it is still running; blocks are in the order in which they begin.
        number = max((i for i, start in enumerate(starts) if start < time), default=-1)
        if time > max(stops):
            neck.append(name)
        elif number < 0 or (number == 0 and time < stops[0]):
            stem.append(name)
        else:
            parts[number if time < stops[number] else min(number + 1, len(groups) - 1)].append(name)
    for part, group in zip(parts, groups, strict=True):
        part += group
    return places


def _stages(model: nn.Module, groups: list[list[str]]) -> tuple[tuple[int, ...], ...]:
    """Block indices by network stage: by the list that holds them; in a flat CNN, a stage begins at every stride."""
    holders = [parent_of(group[-1]) for group in groups]
    keys: Sequence[Hashable] = holders
    if len(set(holders)) == 1 and not any(step.isdigit() for step in holders[0].split(".")):
        strides = [any(_is_strided(model.get_submodule(name)) for name in group) for group in groups]
        flat = any(strides) and not holders[0].endswith("stages")  # a block may itself be a stage
        keys = list(itertools.accumulate(strides)) if flat else list(range(len(groups)))
    stages = itertools.groupby(range(len(groups)), key=keys.__getitem__)
    return tuple(tuple(indices) for _, indices in stages)


def _is_strided(block: nn.Module) -> bool:
    return any(isinstance(module, _ConvNd) and max(module.stride) > 1 for module in block.modules())
