"""Find where a frozen prefix can be cut: trace the model once, and verify each cut before using it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from hf_ft.engine.frozen.prefix import FrozenPrefix, Placeholder
from hf_ft.models.feature_hooks import Batch, run, run_to
from hf_ft.models.names import covers
from hf_ft.models.parts import Chain
from hf_ft.models.preserve import evaluating, random_states, random_states_kept
from hf_ft.models.tracing import _Call, _trace

SAMPLED = 4096  # values of a layer's input that are compared
TRIES = 8  # last borders of a chain tried before giving up; the first works in nearly all architectures


def find_prefix(
    model: nn.Module, live: Sequence[Chain], first: Batch, second: Batch, varying: Iterable[str] = ()
) -> FrozenPrefix | None:
    """Find the longest prefix that can be skipped.

    Args:
        live: for each chain of the model, the parts that train or change; its borders are before the first of them.
        first: a batch to trace, on the model's device.
        second: a batch of other samples and another size, on which replaying is checked against the full forward
            before it is used.
        varying: columns whose rows differ in shape, so that they cannot be stored.

    Returns:
        None if no border reproduces the outputs of the full forward.
    """
    finder = PrefixFinder.of(model, first, second, varying)
    return None if finder is None else finder.find(live)


@dataclass(frozen=True)
class _Cut:
    """A cut in a chain: its recorded border calls, and the outermost calls that are skipped."""

    borders: tuple[_Call, ...]
    left_out: tuple[_Call, ...]


class PrefixFinder:
    """Finds prefixes of one model for any number of stages: traces it once and searches each chain's cut only once."""

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[_Call],
        first: Batch,
        second: Batch,
        samples: int,
        varying: frozenset[str],
    ) -> None:
        self.model, self.calls, self.second, self.samples, self.varying = model, calls, second, samples, varying
        self.columns = {k: v for k, v in first.items() if isinstance(v, Tensor) and v.dim() and len(v) == samples}
        self.constants = {name: value for name, value in first.items() if name not in self.columns}
        # Inputs that a prefix is meant to replace. All others are small, and masks may be needed later on.
        pixels = (name for name, column in self.columns.items() if column.is_floating_point() and column.dim() > 2)
        self.pixels = frozenset(pixels) - varying
        names = [call.name for call in calls]
        self.called = set(names)
        self.once = {name for name, times in Counter(names).items() if times == 1}
        self.full, self.inputs = _observed(model, lambda: run(model, second))
        self._known: dict[tuple[Chain, bool], _Cut | None] = {}

    @classmethod
    def of(cls, model: nn.Module, first: Batch, second: Batch, varying: Iterable[str] = ()) -> PrefixFinder | None:
        """Prepare :func:`find_prefix`; None unless every batch tensor has one entry per sample."""
        samples = _samples(first)
        if samples is None or _samples(second) is None:
            return None
        return cls(model, _trace(model, first), first, second, samples, frozenset(varying))

    def find(self, live: Sequence[Chain]) -> FrozenPrefix | None:
        """See :func:`find_prefix`."""
        alone = len(live) == 1
        cuts = [cut for chain in live if (cut := self._memorised(chain, alone)) is not None]
        if not cuts:
            return None
        if alone:
            return self.prefix(cuts, frozenset())  # already verified
        # Several chains may read one column, and not all of them may have a border: find the needed ones by trial.
        for number in range(len(self.pixels) + 1):
            for pixels in itertools.combinations(sorted(self.pixels), number):
                prefix = self.prefix(cuts, frozenset(pixels))
                if self.same(prefix):
                    return prefix
        return None

    def _memorised(self, chain: Chain, alone: bool) -> _Cut | None:
        key = Chain(chain.name, chain.parts[:1]), alone  # later parts do not matter
        if key not in self._known:
            self._known[key] = self.cut(chain, alone)
        return self._known[key]

    def cut(self, chain: Chain, alone: bool) -> _Cut | None:
        """The latest cut of a chain, or None.

        Args:
            alone: whether it is the only chain, so that no pixels are needed in addition to its borders.
        """
        mine = [call for call in self.calls if covers(chain.name, call.name)]
        units = [name for part in chain.parts for name in part.modules]
        live = [call for call in mine if any(covers(unit, call.name) for unit in units)]
        if not live:
            return None
        # What is read without a call (a bare parameter, Mamba's convolution) may be read at any time while the module
        # that holds it runs.
        holders = {self._holder(unit) for unit in chain.parts[0].modules}
        if "" in holders:
            return None
        live += [call for call in self.calls if call.name in holders]
        start = min(call.begin for call in live)
        around = [call for call in mine if call.begin < start < call.end]
        earlier = sorted((call for call in mine if call.end < start), key=lambda call: -call.end)
        usable = [call for call in earlier if call.name in self.once and _is_activation(call.output, self.samples)]
        pixels = frozenset() if alone else self.pixels
        for border in usable[:TRIES]:
            for borders in _with_inputs(border, around, usable):
                cut = self._cut(borders, mine)
                if cut is not None and self.works([cut], pixels) and self._steady(cut):
                    return cut
        return None

    def _holder(self, unit: str) -> str:
        """The nearest module around a unit that is called, or the unit if it or anything in it is; "" for the model."""
        if any(covers(unit, name) for name in self.called):
            return unit
        return next((parent for parent in _parents(unit) if parent in self.called), "")

    def _cut(self, borders: tuple[_Call, ...], mine: Sequence[_Call]) -> _Cut | None:
        """Skip everything up to the last border; None if one of the skipped modules is called again later."""
        end = max(border.end for border in borders)
        calls = [call for call in mine if call.end <= end]
        inner = {border.name for border in borders}
        # A border inside a larger finished call does not replace that call: the enclosing module must run.
        outermost = [c for c in calls if not any(o.begin < c.begin and c.end < o.end for o in calls)]
        later = {call.name for call in self.calls if call.end > end}
        if later & {call.name for call in outermost} or not inner <= {call.name for call in outermost}:
            return None
        return _Cut(borders, tuple(outermost))

    def _steady(self, cut: _Cut) -> bool:
        """Whether the modules around the skipped ones behave the same in training mode.

        Skipped modules run in eval mode. An enclosing module may not, if something in it trains, and it may apply
        dropout or skip layers by itself, which activations recorded in evaluation mode would lack. A rare event may
        not show in the outputs of one pass, so these modules must also draw no more random numbers than in eval mode.
        """
        prefix = self.prefix([cut], self.pixels)
        names = {parent for name in prefix.left_out for parent in _parents(name)}
        with evaluating(self.model), torch.no_grad():
            with random_states_kept(0):
                still, drawn = prefix.record(self.second), random_states()
            for name in names:
                self.model.get_submodule(name).training = True
            with random_states_kept(0):
                outputs = run_to(self.model, prefix.borders, self.second, may_skip=True)
                same_draws = random_states() == drawn
        called = all(border in outputs for border in prefix.borders)
        return same_draws and called and _equal((outputs[border] for border in prefix.borders), still)

    def prefix(self, cuts: Sequence[_Cut], needed: frozenset[str]) -> FrozenPrefix:
        """Combine cuts, one per chain, into a prefix that keeps these pixel columns."""
        left_out = {name for name in self.columns if name in self.varying or name in self.pixels - needed}
        return FrozenPrefix(
            self.model,
            tuple(border.name for cut in cuts for border in cut.borders),
            tuple(name for name in self.columns if name not in left_out),
            {n: Placeholder(tuple(c.shape[1:]), c.dtype, c.device) for n, c in self.columns.items() if n in left_out},
            self.constants,
            {call.name: _template(call.output, self.samples) for cut in cuts for call in cut.left_out},
        )

    def works(self, cuts: Sequence[_Cut], needed: frozenset[str]) -> bool:
        return self.same(self.prefix(cuts, needed))

    def same(self, prefix: FrozenPrefix) -> bool:
        """Whether replaying reproduces the outputs of the full forward and the inputs of every layer after the borders.

        Comparing outputs is not enough: an adapter's input, for example, has no effect before the first step.
        """
        rows = {name: self.second[name] for name in prefix.kept}
        try:
            at_borders = prefix.record(self.second)
            outputs, inputs = _observed(self.model, lambda: prefix(at_borders, rows))
        except Exception:  # code between two modules may fail on a placeholder in any way
            return False
        behind = [name for name in inputs if not any(covers(module, name) for module in prefix.left_out)]
        return _equal(outputs, self.full) and all(_equal(inputs[name], self.inputs.get(name, [])) for name in behind)


def _observed(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The outputs of a forward pass in evaluation mode, and the inputs of every leaf module."""
    inputs: dict[str, list[Tensor]] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: inputs.setdefault(name, []).extend(map(_sampled, _tensors((args, kwargs))))

    leaves = [(name, module) for name, module in model.named_modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_pre_hook(keeper(name), with_kwargs=True) for name, module in leaves]
    try:
        with evaluating(model), torch.no_grad():
            return _tensors(run()), inputs
    finally:
        for handle in hooks:
            handle.remove()


def _sampled(tensor: Tensor) -> Tensor:
    """A small, evenly spaced sample of a tensor's values, enough to tell two tensors apart."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)].clone()


def _equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    actual, expected = list(actual), list(expected)
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return False
    return all(_close(one.float(), other.float()) for one, other in zip(actual, expected, strict=True) if other.numel())


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, NaN included: the loss of samples without a label is one."""
    size = float(other.nan_to_num(posinf=torch.inf, neginf=-torch.inf).abs().amax())
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * (size + 1), equal_nan=True)


def _parents(name: str) -> Iterator[str]:
    """The modules that contain a module, from the innermost to the model itself."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _with_inputs(border: _Call, around: Sequence[_Call], usable: Sequence[_Call]) -> Iterator[tuple[_Call, ...]]:
    """A border alone, then with inputs of the modules around it, innermost first: shortcuts start there."""
    borders = [border]
    yield (border,)
    for call in sorted((c for c in around if c.begin < border.begin), key=lambda call: -call.begin):
        before = next((candidate for candidate in usable if candidate.end < call.begin), None)
        if before is not None and before not in borders:
            borders.append(before)
            yield tuple(borders)


def _samples(batch: Batch) -> int | None:
    """The number of samples, if all non-scalar tensors agree on it."""
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def _is_activation(output: Any, samples: int) -> bool:
    """Whether an output consists of a single tensor with one entry per sample."""
    tensors = _tensors(output)
    return len(tensors) == 1 and tensors[0].dim() > 1 and len(tensors[0]) == samples


def _template(output: Any, samples: int) -> tuple[list[Any], Any]:
    """Flatten an output; tensors with an entry per sample become placeholders, other values are kept."""
    leaves, structure = tree_flatten(output)
    template = [
        Placeholder(tuple(leaf.shape[1:]), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples
        else leaf
        for leaf in leaves
    ]
    return template, structure


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
