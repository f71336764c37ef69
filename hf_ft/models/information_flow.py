"""Where information flows in a network: the modules whose output carries everything that determines the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_ft.models.feature_hooks import Batch, Taps, first_tensor
from hf_ft.models.names import Names
from hf_ft.models.preserve import random_states_kept, untouched
from hf_ft.models.probing import other_content
from hf_ft.models.tracing import _Call, _trace

TOLERANCE = 1e-3  # relative to the distance between the logits of the two inputs
Eligible = Callable[[str, Tensor], bool]


def last_on_the_way(model: nn.Module, batch: Batch, head: Names, eligible: Eligible) -> str | None:
    """The last module, in order of the ends of calls, through whose output all information passes to the logits.

    Each is tested by patching: with its output for other inputs, the logits are those of the other inputs. Modules that
    are called several times, and those whose output is changed in place afterwards, are skipped. Of modules that return
    the same tensor, the outermost that returns nothing but a tensor counts.

    Args:
        batch: a few samples.
        head: names of the head's modules.
        eligible: whether a module's output (its first tensor) is of the wanted kind.

    Returns:
        If none carries everything, the last one that changes the logits; None if there is none either.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with untouched(model):
        second = other_content(model, inputs)
        here, there = _seen(model, inputs, head), _seen(model, second, head)
        # A new head may give the same logits for all inputs; what enters it differs.
        place = next((i for i, (a, b) in enumerate(zip(here, there, strict=True)) if _distance(a, b) > 0), None)
        if place is None:
            return None
        least = TOLERANCE * _distance(here[place], there[place])
        partly = None
        for name, value in reversed(_candidates(model, inputs, eligible)):
            patched = _seen(model, second, head, (name, value))
            if _distance(patched[place], here[place]) <= least:
                return name
            if partly is None and _distance(patched[place], there[place]) > least:
                partly = name
    return partly


def _candidates(model: nn.Module, batch: Batch, eligible: Eligible) -> list[tuple[str, Tensor]]:
    """The tensors that eligible modules return, each once with a module, in the order in which the calls end."""
    with random_states_kept(0):
        calls = sorted(_trace(model, batch), key=lambda call: call.end)
    times = Counter(call.name for call in calls)
    groups: dict[Hashable, list[_Call]] = {}
    for call in reversed(calls):
        tensor = call.first
        # An output that is changed in place afterwards is not the one that later modules see.
        stays = tensor is not None and tensor._version == call.version
        if tensor is not None and stays and times[call.name] == 1 and eligible(call.name, tensor):
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(call)
    chosen = (next((call for call in group if isinstance(call.output, Tensor)), group[-1]) for group in groups.values())
    return [(call.name, call.first) for call in chosen if call.first is not None][::-1]


def _seen(
    model: nn.Module, batch: Mapping[str, Any], head: Names, patch: tuple[str, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """The logits and the input of the head, with the output of one module replaced."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        place = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        assert patch is not None
        leaves[place] = patch[1].clone()
        return tree_unflatten(leaves, structure)

    handles = [] if patch is None else [model.get_submodule(patch[0]).register_forward_hook(replace)]
    try:
        # The same random numbers in each pass, for networks that also draw some in evaluation.
        with random_states_kept(0), Taps(model, head=head) as taps:
            outputs = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    logits = outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else first_tensor(outputs)
    return tuple(tensor.cpu().double() for tensor in (logits, taps.features) if tensor is not None)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm()) if one.shape == other.shape else torch.inf
