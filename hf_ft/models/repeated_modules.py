"""Repeated modules, in the order in which a forward pass calls them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_ft.models.find_head import has_parameters, size_of
from hf_ft.models.names import matches
from hf_ft.models.norms import _is_norm
from hf_ft.models.tracing import Order, Untraceable, forward_order

Run = list[str]
Blocks = list[list[str]]  # the names of each block's modules, in forward order

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


class Search:
    """Search a model for repeated modules."""

    def __init__(self, model: nn.Module, head: Sequence[str]) -> None:
        self.model, self.head = model, head
        self.modules = dict(model.named_modules())
        self.order: Order | None = None
        self.reason = ""

    def trace(self) -> None:
        """Find the order in which the model runs, or the reason why that is unknown."""
        try:
            self.order = forward_order(self.model)
        except Untraceable as error:
            self.reason = str(error)

    def size(self, run: Iterable[str]) -> int:
        return sum(size_of(self.modules[name]) for name in run)

    def holds_half(self, run: Run) -> bool:
        """Whether a run holds most of the weights that the backbone uses: otherwise it is a detail, whatever its name.

        Embeddings do not count, nor does the largest other layer: the patch embedding of a small encoder, or the last
        convolution of a small network, may hold more than all of its blocks.
        """
        rest = [size for name, size in self.layers.items() if not matches(name, [*self.apart, *self.head, *run])]
        return bool(run) and self.size(run) > sum(rest) - max(rest, default=0)

    @cached_property
    def layers(self) -> dict[str, int]:
        """The size of what each module that runs holds itself, in the order in which they run."""
        own = {n: sum(p.numel() for p in m.parameters(recurse=False)) for n, m in self.modules.items() if n}
        return {name: own[name] for name in self.in_order([name for name in own if own[name] and self.runs_in(name)])}

    @cached_property
    def apart(self) -> Run:
        return [name for name, module in self.modules.items() if isinstance(module, nn.Embedding)]

    def runs_in(self, name: str) -> bool:
        """Whether the logits depend on a module."""
        return self.order is None or name in self.order.fruitful

    def in_order(self, run: Run) -> Run:
        """The run in the order of the first calls; what is not called keeps its place at the end."""
        order = self.order
        return run if order is None else sorted(run, key=lambda name: order.begins.get(name, len(order.begins) ** 2))

    def find(self) -> Blocks:
        """The outermost repeated modules that hold most of the weights; empty if there are none.

        1. The members of a list, all of one class, together with those of other lists of their kind (an encoder's and
           a decoder's);
        2. the members of several lists that are called in turn, joined by their index (XLM's attentions and
           feed-forward layers);
        3. the members of a list of several classes (Jamba's attention and Mamba layers, MobileViT's stages);
        4. the modules that one module calls, without a list (Inception's);
        5. the members of all lists (SelecSLS);
        6. the layers themselves, where each continues the one before (VGG's).

        All but the first need the order in which the model runs.
        """
        for found in self._ways():
            if found and self.holds_half(list(itertools.chain(*found))):
                return found
        return []

    def _ways(self) -> Iterator[Blocks]:
        runs = self.runs(several_classes=False)
        deep = [run for run in runs if layers_in(self.modules[run[0]]) > 1]
        best = max(deep or runs, key=self.size, default=[])  # the outermost among equals
        # XLM keeps attentions and feed-forward layers in two lists and calls them alternately: neither is a block.
        twins = [run for run in deep or runs if len(run) == len(best) and _holder(run) == _holder(best)]
        whole = [[name] for name in self.in_order([*best, *self._kin(best)])] if len(twins) == 1 else []
        if self.order is None:
            yield whole
            return
        if deep:
            yield whole
        yield self._in_turn(twins)
        mixed = self.runs(several_classes=True)
        best = max(mixed, key=self.size, default=[])
        yield [[name] for name in self.in_order([*best, *self._kin(best)])]
        yield [[name] for name in self._steps()]
        yield whole  # single layers may be branches of a block (Inception), so they come late
        yield [[name] for name in self.in_order(self._outermost([*runs, *mixed]))]
        yield self._chain()

    def _outermost(self, runs: list[Run]) -> Run:
        """All members of some lists that are not inside another member."""
        names: Run = []
        for name in self.modules:
            if any(name in run for run in runs) and not matches(name, names):
                names.append(name)
        return names

    # --- lists --------------------------------------------------------------------------------------------

    def runs(self, several_classes: bool) -> list[Run]:
        """The members of lists, if there are two or more; parallel lists (layer1, layer2, ...) form one run.

        Args:
            several_classes: also take lists of several classes; members with a single layer are then left out.
        """
        runs: dict[tuple[str, frozenset[type]], Run] = {}
        for name, module in self.modules.items():
            if matches(name, self.head) or not isinstance(module, _LISTS):
                continue
            children = dict(module.named_children())
            if several_classes:
                children = {child: inner for child, inner in children.items() if layers_in(inner) > 1}
            kinds = frozenset(type(child) for child in children.values())
            nested = any(next(child.children(), None) is not None for child in children.values())
            if nested and (several_classes or len(kinds) == 1) and not kinds & {nn.ModuleList, nn.ModuleDict}:
                members = [f"{name}.{child}" for child in children]
                if any(map(self.runs_in, members)):
                    runs.setdefault((parent_of(name), kinds), []).extend(members)
        long = [run for run in runs.values() if len(run) > 1]
        alone = [run for run in runs.values() if len(run) == 1 and self.holds_half(run)] if several_classes else []
        return long or alone

    def _kin(self, best: Run) -> Run:
        """Members of other lists that are also blocks: of the same class, with similar layers, or as large.

        There are none if they would far outweigh the best: then all are details of larger blocks.
        """
        kinds = {kind for name in best if (kind := type(self.modules[name])) is not nn.Sequential}
        parts = set().union(*(_own_classes(self.modules[name]) for name in best)) if best else set()
        found: Run = []
        for name, module in self.modules.items():
            holder = self.modules[parent_of(name)] if name else module
            if not isinstance(holder, (nn.ModuleList, nn.Sequential)) or any(matches(b, [name]) for b in best):
                continue
            if matches(name, [*self.head, *best, *found]) or layers_in(module) < 2 or not self.runs_in(name):
                continue
            alike = parts & _own_classes(module) or 2 * _usual_size(holder) * len(best) > self.size(best)
            uniform = all(type(child) is type(module) for child in holder.children())
            if type(module) in kinds or (alike and uniform and len(holder) > 1):
                found.append(name)
        return found if self.size(found) <= 2 * self.size(best) else []

    def _in_turn(self, twins: list[Run]) -> Blocks:
        """Lists of one length and one holder, if their members with one index run before those with the next."""
        if len(twins) < 2 or self.order is None:
            return []
        holder = self.modules[_holder(twins[0])]
        dot = f"{_holder(twins[0])}." if _holder(twins[0]) else ""
        lists = [(f"{dot}{n}", c) for n, c in holder.named_children() if isinstance(c, nn.ModuleList)]
        alike = [[f"{name}.{i}" for i in range(len(twins[0]))] for name, c in lists if len(c) == len(twins[0])]
        begins = self.order.begins
        columns = [self.in_order([name for name in column if name in begins]) for column in zip(*alike, strict=True)]
        if not all(columns):
            return []
        turns = all(begins[a[-1]] < begins[b[0]] for a, b in itertools.pairwise(columns))
        return columns if turns else []

    # --- without lists ------------------------------------------------------------------------------------

    def _steps(self) -> Run:
        """The calls of the outermost module that calls two modules of one class which together hold most weights."""
        waiting = [""]
        while waiting:
            steps = list(self._calls_of(waiting.pop(0)))
            blocks = [name for name in steps if layers_in(self.modules[name]) > 1]
            classes = Counter(type(self.modules[name]) for name in blocks)
            if blocks and max(classes.values()) > 1 and self.holds_half(blocks):
                return self.in_order(blocks)
            waiting += steps
        return []

    def _calls_of(self, name: str) -> Iterator[str]:
        """The outermost modules below one that are called, lists apart."""
        for child, _ in self.modules[name].named_children():
            inner = f"{name}.{child}" if name else child
            if inner in self.head:
                continue
            called = self.order is not None and inner in self.order.called and self.runs_in(inner)
            if called and not isinstance(self.modules[inner], _LISTS):
                yield inner
            else:
                yield from self._calls_of(inner)

    def _chain(self) -> Blocks:
        """Convolutions and then linear layers, each with the norm that follows, if each takes the output of the last.

        Attention is not such a chain: its layers read the same input.
        """
        blocks: Blocks = []
        width = 0
        kind: type[nn.Module] = nn.Conv2d
        for name in self.layers:
            module = self.modules[name]
            sizes = _width(module)
            if matches(name, self.head):
                continue
            if sizes is None and blocks:
                blocks[-1].append(name)
            elif sizes is None or not isinstance(module, (kind, nn.Linear)) or (width and sizes[0] % width):
                return []
            else:
                blocks.append([name])
                width = sizes[1]
                kind = nn.Linear if isinstance(module, nn.Linear) else kind
        return blocks if sum(isinstance(self.modules[block[0]], nn.Conv2d) for block in blocks) > 1 else []


def _holder(run: Run) -> str:
    """The module that holds the list of a run."""
    return parent_of(parent_of(run[0])) if run else ""


def layers_in(module: nn.Module) -> int:
    """The number of layers with weights, besides norms and embeddings."""
    return sum(
        not (_is_norm(inner) or isinstance(inner, nn.Embedding))
        for inner in module.modules()
        if next(inner.parameters(recurse=False), None) is not None
    )


def _own_classes(module: nn.Module) -> set[type]:
    """Architecture-specific classes with weights in a module, such as its attention."""
    return {
        type(inner)
        for inner in module.modules()
        if not type(inner).__module__.startswith("torch.") and has_parameters(inner) and not _is_norm(inner)
    }


def _usual_size(holder: nn.Sequential | nn.ModuleList) -> float:
    """The mean size of the members of a list."""
    return sum(map(size_of, holder)) / len(holder)


def _width(layer: nn.Module) -> tuple[int, int] | None:
    """Numbers of channels in and out of a convolution or linear layer."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None
