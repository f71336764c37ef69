"""Child-Tuning: update only a part of the network, redrawn in each step (F) or chosen by Fisher information (D)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_ft.core import (
    NORM_MODES,
    USUAL_RATE,
    Context,
    FTConfig,
    GradientChange,
    Needs,
    OptionError,
    Paper,
    Plan,
    State,
    advising,
    check_tensor,
    option,
    register,
)
from hf_ft.engine.gradients import looking, mean_gradients, update_batches
from hf_ft.models.names import covered
from hf_ft.models.preserve import evaluating

DRAWN_AT_ONCE = 2**24  # entries; bounds the memory for masks
BITS = 16  # of a random number, for each entry: drawing numbers one by one takes several times as long


@dataclass(frozen=True)
class RandomMask:
    """Multiplies gradients by Bernoulli(p) / p, entry by entry."""

    p: float

    def __call__(self, names: Sequence[str], gradients: Sequence[Tensor], seed: int) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for some in _chunks(gradients):
            device = some[0].device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            sizes = [gradient.numel() for gradient in some]
            drawn = coins(sum(sizes), self.p, generators[device])
            masks = [mask.view_as(gradient) for mask, gradient in zip(drawn.split(sizes), some, strict=True)]
            torch._foreach_mul_(some, masks)
            torch._foreach_mul_(some, 1 / exact(self.p))


def exact(p: float) -> float:
    """The nearest probability that 16 bits can represent, other than 0 and 1."""
    return min(max(round(p * 2**BITS), 1), 2**BITS - 1) / 2**BITS


def coins(count: int, p: float, generator: torch.Generator) -> Tensor:
    """Independent booleans that are true with probability :func:`exact`, (count,), four from each random number."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count] < round(exact(p) * 2**BITS) - 2 ** (BITS - 1)


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one kind, as many as may be drawn at once."""
    some: list[Tensor] = []
    for tensor in tensors:
        same = some and (some[0].dtype, some[0].device) == (tensor.dtype, tensor.device)
        if some and (not same or sum(t.numel() for t in some) + tensor.numel() > DRAWN_AT_ONCE):
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


@dataclass(frozen=True)
class FixedMask:
    """Sets gradients to 0 where they are masked."""

    # Packed bits by name. Excluded from comparison: the truth value of a tensor is ambiguous.
    packed: Mapping[str, Tensor] = field(compare=False, repr=False)
    _masks: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, names: Sequence[str], gradients: Sequence[Tensor], seed: int) -> None:
        for name, gradient in zip(names, gradients, strict=True):
            if name not in self._masks:
                self._masks[name] = unpacked(self.packed[name], gradient.shape).to(gradient.device)
        torch._foreach_mul_(list(gradients), [self._masks[name] for name in names])


def packed(mask: Tensor) -> Tensor:
    """A boolean mask as bits, uint8 (entries / 8,)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The boolean mask of these bits."""
    entries = np.unpackbits(bits.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(entries.astype(bool)).reshape(shape)


def fisher_masks(fisher: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    """The entries whose Fisher information reaches the (1 - p) quantile of all tensors together."""
    threshold = np.percentile(np.concatenate([f.cpu().numpy().reshape(-1) for f in fisher.values()]), 100 * (1 - p))
    return {name: values >= float(threshold) for name, values in fisher.items()}


def fisher_information(model: nn.Module, names: Sequence[str], context: Context) -> dict[str, Tensor]:
    """Mean over the training batches of the squared gradient of their mean loss, each gradient clipped by its norm.

    Batches have as many samples as an update, so that they are the same for any number of processes, which divide them
    up.
    """
    found, recipe, parameters = context.samples, context.recipe, dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    fisher, count = [torch.zeros_like(p, dtype=torch.float32) for p in chosen], torch.zeros(1, device=context.device)
    rows = update_batches(found, recipe, context.ranks, context.generator)
    with evaluating(model), looking(model):  # which restores the modes on exit
        model.train()
        for some in rows[context.rank :: context.ranks]:
            gradients = mean_gradients(model, chosen, found, recipe, some)
            if gradients is not None:
                gradients = [gradient.float() for gradient in gradients]
                clip_each(gradients, recipe.max_grad_norm)
                torch._foreach_addcmul_(fisher, gradients, gradients)
                count += 1
    total = context.reduce(count)
    return {name: context.reduce(values) / total for name, values in zip(names, fisher, strict=True)}


def clip_each(gradients: Sequence[Tensor], most: float) -> None:
    """Clip the norm of each gradient separately, in place; 0 clips nothing."""
    if most:
        factors = [(most / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(list(gradients))]
        torch._foreach_mul_(list(gradients), factors)


@register("child_tuning")
@dataclass(frozen=True, kw_only=True)
class ChildTuningConfig(FTConfig):
    r"""Update only a part of the weights, the child network.

    Before each update, after clipping, every gradient :math:`g` becomes

    .. math::
        \text{F: } g \odot m / p, \quad m \sim \mathrm{Bernoulli}(p) \text{ in each step}, \qquad
        \text{D: } g \odot m, \quad m = \left[ F \ge q_{1-p}(F) \right]

    where :math:`F = \operatorname{mean}_b \, (\partial L_b / \partial w)^2` is the Fisher information of the pretrained
    weights, over the training batches, and :math:`q_{1-p}` its quantile over all weights of the blocks.
    """

    paper = Paper(
        "Xu, Luo, Zhang, Tan, Chang, Huang, Huang",
        "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
        "EMNLP 2021",
        "https://arxiv.org/abs/2109.05687",
    )
    formula = "F: g <- g m / p, m ~ Bernoulli(p) in each step;  D: g <- g [F >= its (1 - p) quantile], F = mean of g^2"
    recommended = USUAL_RATE
    tuned = NORM_MODES
    cost = advising.WITH_A_PASS_BEFORE
    advice = {advising.VERY_FEW_SAMPLES: 1, advising.FEW_SAMPLES_PER_WEIGHT: 1}

    mode: Literal["D", "F"] = option(
        "D",
        "'D' (task-driven): the weights of the blocks with the largest Fisher information, measured in a pass over the "
        "training data, and everything outside the blocks. 'F' (task-free): any weights, redrawn in each step.",
    )
    p: float = option(
        0.2, "Fraction of the weights in the child network; 1 for full fine-tuning.", range="(0, 1]", source="code"
    )

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def measures(self) -> bool:
        return self.mode == "D" and self.p < 1

    def measure(self, model: nn.Module, context: Context) -> State:
        masks = fisher_masks(fisher_information(model, self._masked(model), context), self.p)
        kept = {name: float(mask.float().mean()) for name, mask in masks.items()}
        return State({name: packed(mask) for name, mask in masks.items()}, {"kept": kept})

    def check_state(self, model: nn.Module, state: State) -> None:
        super().check_state(model, state)
        parameters = dict(model.named_parameters())
        for name in self._masked(model) if state.tensors else ():
            if name in state.tensors:
                if state.tensors[name].dtype != torch.uint8:
                    raise OptionError(f"{name!r} has dtype {state.tensors[name].dtype}, but bits are torch.uint8.")
                check_tensor(name, state.tensors[name], (-(-parameters[name].numel() // 8),))

    def learned(self, state: State) -> str:
        kept: dict[str, float] = state.info.get("kept", {})
        if not kept:
            return ""
        low, high = min(kept, key=lambda name: kept[name]), max(kept, key=lambda name: kept[name])
        return f"Weights that train: from {kept[low]:.0%} of `{low}` to {kept[high]:.0%} of `{high}`."

    def plan(self, model: nn.Module, state: State) -> Plan:
        if self.p == 1:
            return Plan()
        if self.mode == "F":
            return Plan(gradients=(GradientChange("child_tuning", RandomMask(self.p)),))
        names = self._masked(model)
        missing = [name for name in names if name not in state.tensors]
        if missing:
            raise OptionError(
                f"child_tuning: no Fisher information was measured for {missing[0]!r}. Measure first (pass a context "
                "to set_up), or set mode='F'."
            )
        masks = FixedMask({name: state.tensors[name] for name in names})
        return Plan(gradients=(GradientChange("child_tuning", masks, on=names),))

    def example_plan(self, model: nn.Module) -> Plan:
        if not self.measures():
            return super().example_plan(model)
        return Plan(gradients=(GradientChange("child_tuning", RandomMask(self.p), on=self._masked(model)),))

    def _masked(self, model: nn.Module) -> tuple[str, ...]:
        """The parameters of the blocks that may train."""
        blocks = {name for block in self.anatomy(model).blocks for name in block.modules}
        return tuple(n for n, p in model.named_parameters() if p.requires_grad and covered(n, blocks))
