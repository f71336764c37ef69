"""Model soups: several fine-tuned models averaged into one (Wortsman et al., ICML 2022, arXiv:2203.05482)."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_ft.errors import OptionError
from hf_ft.models.norm_statistics import renew_statistics
from hf_ft.models.norms import batch_norms
from hf_ft.models.preserve import forget_evaluation

Kind = Literal["uniform", "greedy"]
Renew = Callable[[nn.Module, Sequence[str]], None]
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Soup:
    """An average of several models.

    Attributes:
        model: the average, in eval mode.
        members: indices of the models that are in it; if greedy, in the order in which they were added.
        score: its score; None if it was not evaluated.
        tried: greedy: for each model that was tried after the first, the score of the average with it.
        left_out: why a model was not considered, by index.
    """

    model: PreTrainedModel
    members: tuple[int, ...]
    score: float | None = None
    tried: Mapping[int, float] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)


def soup(
    models: Sequence[PreTrainedModel | str | Path],
    kind: Kind = "greedy",
    evaluate: Callable[[Any], float] | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    greater_is_better: bool = True,
    scores: Sequence[float] | None = None,
) -> Soup:
    r"""Average the weights of models that were fine-tuned from the same ones.

    .. math:: \theta = \frac{1}{|S|} \sum_{i \in S} \theta_i

    A uniform soup takes all models. A greedy one goes through them from the best score to the worst, and keeps each
    with which the score of the average does not fall; so it scores at least as well as the best model.

    Models whose weights have other names or shapes than those of most models, or whose classes differ, are left out.
    The mean is taken in float64, with one model in memory at a time. If the running statistics of BatchNorm layers
    differ, those of the average are measured on the training data, in one pass in which these layers normalise each
    batch by its own statistics.

    Args:
        models: models, which are left unchanged, or folders of saved ones.
        evaluate: scores a model on validation data; for a greedy soup.
        batches: the training data, as keyword arguments of the model, if there are BatchNorm layers; can be iterated
            repeatedly.
        greater_is_better: whether higher scores are better.
        scores: the score of each model, if known; nan for a model that has none.

    Raises:
        OptionError: if there is nothing to average, or a greedy soup has nothing to evaluate with.
    """

    def renew(model: nn.Module, names: Sequence[str]) -> None:
        if batches is None:
            raise OptionError(
                f"soup: the statistics of {len(names)} BatchNorm layers do not fit an average: pass the training data "
                "as batches=..., such as a DataLoader."
            )
        renew_statistics(model, names, batches)

    return mix(models, kind, evaluate, renew, greater_is_better, scores)


def mix(
    models: Sequence[PreTrainedModel | str | Path],
    kind: Kind,
    evaluate: Callable[[Any], float] | None,
    renew: Renew,
    greater_is_better: bool = True,
    scores: Sequence[float] | None = None,
) -> Soup:
    """Like :func:`soup`, with a function that measures the statistics of BatchNorm layers, given by name."""
    if kind not in ("uniform", "greedy"):
        raise OptionError(f"soup: kind={kind!r} is unknown: choose 'uniform' or 'greedy'.")
    if scores is not None and len(scores) != len(models):
        raise OptionError(f"soup: there are {len(models)} models, but {len(scores)} scores.")
    alike, left_out = _alike(models)
    if not alike:
        raise OptionError(
            f"soup: there is no model to average{': ' + next(iter(left_out.values())) if left_out else '.'}"
        )
    model = copy.deepcopy(_loaded(models[alike[0]]))
    model.config.name_or_path = ""
    pot = _Pot(models, model, renew)
    if kind == "uniform":
        pot.put(alike)
        return Soup(pot.model, tuple(alike), None if evaluate is None else float(evaluate(pot.model)), {}, left_out)
    if evaluate is None:
        raise OptionError("soup: a greedy soup needs evaluate=..., which scores a model; or choose kind='uniform'.")
    sign = 1.0 if greater_is_better else -1.0

    def score(members: Sequence[int]) -> float:
        pot.put(members)
        return float(evaluate(pot.model))

    alone = {i: score([i]) if scores is None else float(scores[i]) for i in alike}
    order = sorted(alike, key=lambda i: (-sign * alone[i] if math.isfinite(alone[i]) else math.inf, i))
    members, best, tried = [order[0]], alone[order[0]], {}
    for index in order[1:]:
        tried[index] = score([*members, index])
        if sign * tried[index] >= sign * best:
            members, best = [*members, index], tried[index]
    pot.put(members)
    return Soup(pot.model, tuple(members), best, tried, left_out)


class _Pot:
    """One model, whose weights become averages of others.

    Args:
        model: changed in place.
        renew: measures the statistics of its BatchNorm layers, given by name.
    """

    def __init__(self, models: Sequence[Any], model: PreTrainedModel, renew: Renew) -> None:
        self._models, self._renew = models, renew
        self.model = model.eval()
        self._norms = [name for name, _ in batch_norms(model)]
        self._statistics: dict[int, list[Tensor]] = {}  # running mean and variance of each layer, by index of a model
        self._sums: dict[tuple[int, ...], dict[str, Tensor]] = {}

    @torch.no_grad()
    def put(self, members: Sequence[int]) -> None:
        """Set the model to the mean of these; a single one is left unchanged."""
        total = self._sum(tuple(members))
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(total[name] / len(members) if tensor.is_floating_point() else total[name])
        forget_evaluation(self.model)
        differing = [name for place, name in enumerate(self._norms) if self._differ(members, place)]
        if differing:
            self._renew(self.model, differing)
        self.model.eval()

    def _sum(self, members: tuple[int, ...]) -> dict[str, Tensor]:
        """The sum of their weights; that of all but the last is often known."""
        total = self._sums.get(members)
        if total is None:
            known = self._sums.get(members[:-1])
            total = {} if known is None else known
            for index in members if known is None else members[-1:]:
                state = _loaded(self._models[index]).state_dict()
                total = {name: _added(total.get(name), tensor) for name, tensor in state.items()}
                self._statistics[index] = [state[f"{n}.{b}"].cpu() for n in self._norms for b in STATISTICS]
        self._sums = {key: value for key, value in self._sums.items() if key == members[:-1]} | {members: total}
        return total

    def _differ(self, members: Sequence[int], place: int) -> bool:
        """Whether the statistics of a layer are not the same in all members."""
        first, *others = ([self._statistics[index][2 * place + k] for k in (0, 1)] for index in members)
        return any(not torch.equal(own, one) for other in others for own, one in zip(first, other, strict=True))


def _added(total: Tensor | None, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu() if total is None else total
    wide = tensor.detach().to("cpu", torch.float64, copy=True)
    return wide if total is None else total + wide


def mean_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of state dicts, taken in float64; integers are those of the first."""
    total: dict[str, Tensor] = {}
    for state in states:
        total = {name: _added(total.get(name), tensor) for name, tensor in state.items()}
    first = states[0]
    return {
        name: (value / len(states)).to(first[name]) if first[name].is_floating_point() else first[name]
        for name, value in total.items()
    }


def _alike(models: Sequence[Any]) -> tuple[list[int], dict[int, str]]:
    """The models that agree with the majority, and why the others are left out."""
    forms: dict[int, tuple[Any, ...]] = {}
    left_out: dict[int, str] = {}
    for index, model in enumerate(models):
        try:
            forms[index] = _form(_loaded(model))
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            left_out[index] = f"it cannot be loaded as a plain model: {str(error).strip().partition(chr(10))[0]}"
    most = Counter(forms.values()).most_common(1)  # among equals, the first
    for index, form in forms.items():
        if form != most[0][0]:
            left_out[index] = _difference(form, most[0][0])
    return [index for index, form in forms.items() if form == most[0][0]], dict(sorted(left_out.items()))


def _form(model: Any) -> tuple[Any, ...]:
    weights = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items())
    classes = tuple(sorted((int(number), str(name)) for number, name in (model.config.id2label or {}).items()))
    return type(model).__name__, classes, weights


def _difference(form: tuple[Any, ...], usual: tuple[Any, ...]) -> str:
    if form[0] != usual[0]:
        return f"it is a {form[0]}, and most are {usual[0]}"
    if form[1] != usual[1]:
        return "its classes have other names or another order"
    own, other = ({name: (shape, dtype) for name, shape, dtype in each[2]} for each in (form, usual))
    odd = next(name for name in {**other, **own} if own.get(name) != other.get(name))
    return f"its weights differ in {odd}: {_shown(own.get(odd))} instead of {_shown(other.get(odd))}"


def _shown(weight: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "none" if weight is None else f"{weight[0]} in {str(weight[1]).removeprefix('torch.')}"


def _loaded(model: PreTrainedModel | str | Path) -> Any:
    """The model itself, or a copy in memory of a saved one."""
    if not isinstance(model, str | Path):
        return model
    folder = Path(model)
    if not (folder / CONFIG_NAME).is_file():
        raise OSError(f"{folder.name} holds no {CONFIG_NAME}; is it an adapter that was not merged?")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind: Any = getattr(transformers, (config.architectures or ["PreTrainedModel"])[0])
    with torch.random.fork_rng(devices=[]):
        return kind.from_pretrained(folder, local_files_only=True)


__all__ = ["Kind", "Soup", "mean_weights", "mix", "soup"]
