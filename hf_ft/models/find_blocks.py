"""Find the blocks of a classifier: the repeated modules, in the order in which a forward pass calls them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from torch import nn

from hf_ft.errors import AnatomyError
from hf_ft.models.architectures import _BLOCKS, _MODULES_PER_BLOCK, _UNSURE
from hf_ft.models.find_head import children_of
from hf_ft.models.names import matches
from hf_ft.models.repeated_modules import Blocks, Run, Search
from hf_ft.models.tracing import Order


def find_blocks(model: nn.Module, head: Sequence[str], pattern: str | None = None) -> tuple[Blocks, Order | None]:
    """The blocks, and the order in which the model runs, unless it is the order of definition.

    Blocks are what the pattern matches; else those of a known architecture, if they hold most of the weights; else what
    :meth:`~hf_ft.models.repeated_modules.Search.find` finds.

    Raises:
        AnatomyError: if none of these is found, or the blocks overlap the head.
    """
    model_type = _type_of(model)
    known = _match(model, _BLOCKS[model_type]) if pattern is None and model_type in _BLOCKS else []
    search = Search(model, head)
    if known and is_known(model):
        step = _MODULES_PER_BLOCK.get(model_type, 1)
        return _apart([known[i : i + step] for i in range(0, len(known), step)], model, head), None
    if pattern is not None and is_known(model):
        search.order = None  # these are defined in the order in which they run
    else:
        search.trace()
    given = known if pattern is None else _match(model, pattern)
    if pattern is not None or search.holds_half(given):
        blocks = [[name] for name in search.in_order(given)]
    else:
        blocks = search.find()
    if not blocks:
        raise AnatomyError(_nothing(model, search, model_type, pattern))
    return _apart(blocks, model, head), search.order


def is_known(model: nn.Module) -> bool:
    """Whether the architecture is one whose modules are defined in the order in which they run."""
    return _type_of(model) in _BLOCKS and _type_of(model) not in _UNSURE


def _type_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _nothing(model: nn.Module, search: Search, model_type: str, pattern: str | None) -> str:
    criterion = f"model_type {model_type!r} or by size" if pattern is None else f"blocks={pattern!r}"
    untraced = f" Its forward could not be traced ({search.reason})." if pattern is None and search.reason else ""
    repeats = [
        f"{run[0]} ... {run[-1]} ({len(run)} x {type(model.get_submodule(run[0])).__name__})"
        for run in search.runs(several_classes=False)
    ]
    return (
        f"Found no blocks by {criterion}.{untraced} {children_of(model)}. Repeated modules: "
        f"{'; '.join(repeats) or 'none'}. Give a regex that matches whole names, for instance "
        'blocks=r"encoder\\.layer\\.\\d+".'
    )


def _apart(blocks: Blocks, model: nn.Module, head: Sequence[str]) -> Blocks:
    """The blocks, if they do not overlap the head."""
    names = list(itertools.chain(*blocks))
    if clash := [name for name in names if matches(name, head) or any(matches(h, [name]) for h in head)]:
        raise AnatomyError(
            f"The blocks {', '.join(clash[:3])} overlap the head {', '.join(head)}. {children_of(model)}. "
            'Set head="..." to a module outside the blocks, or blocks=r"..." to match fewer modules.'
        )
    return blocks


def _match(model: nn.Module, pattern: str) -> Run:
    """The outermost modules whose full name matches; for a list of blocks, the blocks themselves."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise AnatomyError(f"blocks={pattern!r} is not a regular expression: {error}.") from error
    hits = [name for name, _ in model.named_modules() if name and regex.fullmatch(name)]
    holders = {holder for name in hits for holder in hits if name.startswith(holder + ".")}
    lists = {n for n in holders if isinstance(model.get_submodule(n), (nn.Sequential, nn.ModuleList))}
    names: Run = []
    for name in hits:
        if name not in lists and not matches(name, names[-1:]):
            names.append(name)
    return names
