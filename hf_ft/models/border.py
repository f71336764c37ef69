"""The border between a model and its head: run the head alone, or another in its place, on earlier results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_ft.errors import OptionError
from hf_ft.models.names import Names, covers

SOURCE_LOGITS = "source_logits"  # a layer: what the pretrained head makes of the network's features


class _Reached(Exception):
    """Raised where the head begins, to skip the rest of the forward pass."""


class Border:
    """The outputs of all modules outside the head in a forward pass, and the arguments of the pass.

    From these, the model's own forward can run again (:meth:`forward`): every module before the head returns what it
    returned then, and only the head and the code between modules are computed. Pooling, projections and the choice of
    a token are therefore the model's own, and masks are available.

    Args:
        model: a classifier.
        head: names of the head's modules. Those without parameters are not part of it here: what they return is kept.
    """

    def __init__(self, model: nn.Module, head: Sequence[str]) -> None:
        self.model = model
        self.head = tuple(name for name in head if has_parameters(model, name))
        self.args: tuple[Any, ...] = ()
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[nn.Module, list[Any]] = {}
        self.reached = False
        self._versions: dict[nn.Module, int] = {}
        self._modified: nn.Module | None = None

    @contextlib.contextmanager
    def recording(self, stops: bool = False) -> Iterator[Border]:
        """Record the first forward pass within this context.

        Args:
            stops: end the pass where the head begins; its call then returns nothing.
        """
        handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for module in _outside(self.model, self.head):
            handles.append(module.register_forward_pre_hook(self._look))
            handles.append(module.register_forward_hook(self._keep))

        def reach(module: nn.Module, inputs: Any) -> None:
            if not self.reached:
                self._look()
            self.reached = True
            if stops:
                raise _Reached

        handles += [self.model.get_submodule(name).register_forward_pre_hook(reach) for name in self.head]
        try:
            with contextlib.suppress(_Reached):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not self.inputs and not self.args:
            self.args, self.inputs = args, {name: value for name, value in kwargs.items() if name != "labels"}

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.reached:  # what follows the head, or a part of it, depends on it
            self.outputs.setdefault(module, []).append(output)
            # What a module modifies in place (dropout, activations) is not modified again in a replay.
            self._versions = _versions(self.outputs)

    def _look(self, *call: Any) -> None:
        """Note whether code between two modules modifies a result in place: a replay would do so again."""
        if not self.reached:
            self._modified = self._modified or self._changed()

    def _changed(self) -> nn.Module | None:
        changed = (one for one, version in _versions(self.outputs).items() if version != self._versions[one])
        return next(changed, None)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that cross the border."""
        return [leaf for leaf in tree_leaves(list(self.outputs.values())) if isinstance(leaf, Tensor)]

    def rows(self, start: int, end: int, of: int) -> Border:
        """The border of some samples of the batch.

        Args:
            of: number of samples in the batch; tensors with another number of rows are kept whole.
        """

        def cut(value: Any) -> Any:
            return value[start:end] if isinstance(value, Tensor) and value.dim() and len(value) == of else value

        part = Border(self.model, self.head)
        part.reached, part.args = self.reached, tree_map(cut, self.args)
        part.inputs = {name: cut(value) for name, value in self.inputs.items()}
        part.outputs = {one: [tree_map(cut, output) for output in calls] for one, calls in self.outputs.items()}
        part._modified = self._modified
        part._versions = _versions(part.outputs)
        return part

    @contextlib.contextmanager
    def replaying(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Make the model's forward start at the border while the context is open.

        Args:
            dtype: floating-point tensors are converted to it.

        Raises:
            OptionError: if the forward pass never reached the head, or modified in place what enters it.
        """
        self._check()
        originals: list[tuple[nn.Module, Any]] = []
        try:
            for module, calls in self.outputs.items():
                originals.append((module, module.__dict__.get("forward")))
                module.forward = _Again(module.forward, calls, dtype)
            yield
        finally:
            for module, forward in originals:
                if forward is None:
                    del module.forward
                else:  # accelerate, or a frozen prefix, has replaced it
                    module.forward = forward

    def forward(self, replacing: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> Tensor:
        """The model's logits, with other modules in place of some.

        Args:
            replacing: modules by the names of those in whose place they stand.
            dtype: floating-point tensors at the border are converted to it.
        """
        with self.replaying(dtype), _replaced(self.model, replacing):
            return _logits(self.model(*self.args, **self.inputs))

    def pooled(self, into: Mapping[str, Tensor]) -> Tensor:
        """Pool, or pick, tokens as the model does with its per-token logits.

        Args:
            into: for each layer that gives the logits, its input (B, T, d) in this pass. It takes the logits' place.

        Returns:
            (B, d), where the model's logits are (B, C).
        """
        return self.forward({name: _Constant(value) for name, value in into.items()})

    def _check(self) -> None:
        if not self.reached:
            raise OptionError(
                f"the head's modules ({', '.join(self.head) or 'none has parameters'}) are not called in the forward "
                'pass, so what enters them is unknown. Name the modules that map features to logits with head="...".'
            )
        modified = self._modified or self._changed()
        if modified is not None:
            name = next(name for name, module in self.model.named_modules() if module is modified)
            raise OptionError(
                f"the output of {name!r} is modified in place on its way to the logits, so no other head can be "
                "run on it. Use a strategy that compares weights, such as L2SPConfig."
            )


def run_to_head(model: nn.Module, head: Sequence[str], batch: Mapping[str, Any]) -> Border:
    """Run a model up to its head.

    Args:
        head: names of the head's modules.
        batch: keyword arguments of the model.
    """
    border = Border(model, head)
    with border.recording(stops=True):
        model(**batch)
    return border


class _Again:
    """A forward that returns earlier results, one per call, and then computes as usual."""

    def __init__(self, forward: Any, calls: Sequence[Any], dtype: torch.dtype | None) -> None:
        self.forward, self.calls, self.dtype = forward, iter(calls), dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for output in self.calls:
            return tree_map(self._fit, output)
        return self.forward(*args, **kwargs)

    def _fit(self, value: Any) -> Any:
        return value.to(self.dtype) if self.dtype and isinstance(value, Tensor) and value.is_floating_point() else value


class _Constant(nn.Module):
    """Returns a fixed value, whatever it is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.value


@contextlib.contextmanager
def _replaced(model: nn.Module, replacing: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in place of others, wherever these are registered, while the context is open."""
    others = {model.get_submodule(name): module for name, module in replacing.items()}
    places = [(parent, child, module) for parent, child, module in _around(model, tuple(replacing)) if module in others]
    try:
        for parent, child, module in places:
            parent._modules[child] = others[module]
        yield
    finally:
        for parent, child, module in places:
            parent._modules[child] = module


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a module of the head permanently, under all the names that it has."""
    old = model.get_submodule(name)
    for parent, child, other in list(_around(model, (name,))):
        if other is old:
            parent._modules[child] = module


def _logits(outputs: Any) -> Tensor:
    """A model's logits; a dimension of size 1 between samples and classes is left out."""
    if isinstance(outputs, Mapping):
        logits = outputs["logits"]
    else:
        logits = next(value for value in outputs if isinstance(value, Tensor) and value.dim())
    return logits[:, 0] if logits.dim() == 3 and logits.shape[1] == 1 else logits


def _around(model: nn.Module, head: Names, prefix: str = "") -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The modules of the head and those next to it, outermost only: parent, name in the parent, module."""
    for child, module in model._modules.items():
        name = f"{prefix}{child}"
        if module is None:
            continue
        uncalled = type(module).forward is nn.Module.forward  # lists of modules
        if name not in head and (uncalled or any(covers(name, part) for part in head)):
            yield from _around(module, head, f"{name}.")
        else:
            yield model, child, module


def _outside(model: nn.Module, head: Names) -> list[nn.Module]:
    """The outermost modules that are called and are neither in the head nor contain a part of it."""
    inside = {model.get_submodule(name) for name in head}
    return list(dict.fromkeys(module for _, _, module in _around(model, head) if module not in inside))


def has_parameters(model: nn.Module, name: str) -> bool:
    """Whether this is a module with parameters, not a bare parameter or a dropout."""
    try:
        return next(model.get_submodule(name).parameters(), None) is not None
    except AttributeError:
        return False


def _versions(outputs: Mapping[nn.Module, Any]) -> dict[nn.Module, int]:
    """A number for each module that grows whenever one of its results is modified in place."""
    return {
        module: sum(leaf._version for leaf in tree_leaves(calls) if isinstance(leaf, Tensor))
        for module, calls in outputs.items()
    }
