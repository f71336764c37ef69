"""A plan: a strategy's changes to a model and its training, as an immutable value. Plans compose."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.models.names import EVERYTHING, Names, covered, parents

if TYPE_CHECKING:
    from hf_ft.core.view import View

NormMode = Literal["auto", "eval", "train"]
Need = Literal["features", "logit_inputs", "inputs", "second_view", "reference"]


@dataclass(frozen=True)
class Rate:
    """The learning rate of some parameters in a stage.

    ``names`` are names of modules or parameters; the longest match applies. The rate is ``lr`` if given, else
    ``args.learning_rate * scale``.
    """

    names: Names
    scale: float = 1.0
    lr: float | None = None


@dataclass(frozen=True)
class Stage:
    """A phase of the run that trains one set of parameters.

    Attributes:
        name: name in logs and messages.
        trains: names of modules or parameters (a module includes everything in it; ``""`` is the whole model).
            Parameters frozen before training stay frozen.
        duration: the stage's share of all optimizer steps; the shares of a plan sum to 1.
        rates: learning rates that differ from ``args.learning_rate``.
        norm_mode: which normalisation layers with running statistics use and update batch statistics.
            ``auto``: those whose own parameters train. ``eval``: none. ``train``: all, including frozen ones.
        dropout: whether dropout is active. If not, the model runs in eval mode, except for its moving norms and for
            modules with gradient checkpointing, which Transformers supports only in train mode.
        fresh_optimizer: whether the stage starts without the optimizer's state (momentum, moments) of earlier stages.
        redraws: names of modules whose weights are redrawn when the stage begins, as Transformers initialises them;
            the first stage of a run draws nothing.
        schedule: the factor of the stage's learning rates as a function of the progress within the stage, from 0 at
            its first step towards 1. It replaces the schedule and the warm-up of the training arguments.
        momentum: the optimizer's momentum (SGD's, or Adam's first beta) as a function of the same progress. In stages
            without one, the optimizer's own applies.
    """

    name: str
    trains: Names = EVERYTHING
    duration: float = 1.0
    rates: tuple[Rate, ...] = ()
    norm_mode: NormMode = "auto"
    dropout: bool = True
    fresh_optimizer: bool = False
    redraws: Names = ()
    schedule: Callable[[float], float] | None = None
    momentum: Callable[[float], float] | None = None


@dataclass(frozen=True)
class Stream:
    """A second data stream: endless, shuffled if possible, and read only while a term of weight > 0 uses it.

    Attributes:
        name: name of the data passed to the Trainer; ``"source"`` is its ``source_dataset``.
        ratio: number of stream samples per target sample; every batch has the same number, since its loss and the
            target's are means.
        forward: ``"joint"`` concatenates it to the target batch, and the head sees only the target's rows:
            normalisation layers compute their statistics over both. ``"separate"`` runs it on its own afterwards.
        prepare: called with the data set before training; rejects it, or returns a function that is applied to each
            of its batches on the CPU.
    """

    name: str
    ratio: float = 1.0
    forward: Literal["joint", "separate"] = "joint"
    prepare: Callable[[Any], Callable[[dict[str, Any]], dict[str, Any]]] | None = None

    def batch_size(self, target: int) -> int:
        """Batch size of the stream for a target batch of this size.

        Raises:
            OptionError: if it would be 0.
        """
        size = round(self.ratio * target)
        if size < 1:
            raise OptionError(
                f"{self.name}_ratio={self.ratio:g} of per_device_train_batch_size={target} gives batches without a "
                f"sample: set at least {1 / target:g}, or use larger batches."
            )
        return size


@runtime_checkable
class CopiesModel(Protocol):
    """A term's module that copies what it needs from the model, once, after all surgery and before training."""

    def begin(self, model: nn.Module) -> None: ...


@dataclass(frozen=True)
class Term:
    r"""A summand of the training loss: :math:`\text{weight} \cdot \text{schedule}(t) \cdot \text{fn}(\text{view})`.

    Attributes:
        name: logged under ``loss/<name>``.
        fn: :class:`~hf_ft.core.view.View` -> scalar; a micro-batch mean if it depends on the batch. It runs in
            float32, outside autocast. If it is an ``nn.Module``, its parameters train in every stage at
            ``args.learning_rate``, unless they require no gradient, and are saved with each checkpoint, as are its
            buffers; it may be a :class:`CopiesModel`.
        weight: a constant factor.
        schedule: a further factor, as a function of the progress of the whole run in [0, 1].
        anchors: names of parameters whose initial values are kept for ``view.starts``.
        needs: further contents of the view: ``"features"`` is the input of the head, ``"logit_inputs"`` that of its
            last layer, ``"inputs"`` the batch (no frozen prefix can be skipped then), ``"second_view"`` the same
            samples read a second time, so that augmentation draws other numbers (with ``"inputs"``), ``"reference"``
            the states of ``layers`` in the initial model.
        layers: keys of ``view.states``: module names, for their outputs, or ``"input:<module>"``; and ``SOURCE_LOGITS``
            for ``view.source_logits``. In a stage in which none of them can change, the term is constant and is
            omitted; so is a term without layers that needs ``"logit_inputs"``, if these cannot change.
        stream: name of the stream whose batch and ``layers`` are in ``view.streams``.
        replaces_decay: names of parameters that the optimizer must not decay, since the term does.
        couples_batch: whether it depends on the batch as a whole, so that splitting a batch changes its value.
        starts_at_zero: whether it is exactly 0 before the first step, with the model in eval mode.
        zero_means: the problem to report, once, if it is exactly 0 throughout a logging interval.
    """

    name: str
    fn: Callable[[View], Tensor]
    weight: float = 1.0
    schedule: Callable[[float], float] | None = None
    anchors: Names = ()
    needs: frozenset[Need] = frozenset()
    layers: Names = ()
    stream: str | None = None
    replaces_decay: Names = ()
    couples_batch: bool = False
    starts_at_zero: bool = False
    zero_means: str = ""


@dataclass(frozen=True)
class GradientChange:
    """A change of gradients, once per optimizer step: after unscaling and clipping, just before the update.

    Attributes:
        name: name in messages.
        fn: (names of the parameters, their gradients, seed) -> None; changes the gradients in place. The seed is the
            same on every process and after a resume, and differs in each step. A parameter without a gradient in this
            step is left out.
        on: names of the modules or parameters whose gradients it changes.
    """

    name: str
    fn: Callable[[Sequence[str], Sequence[Tensor], int], None]
    on: Names = EVERYTHING


@dataclass(frozen=True)
class TensorRates:
    """A factor of the learning rate of each tensor, determined at the beginning of each epoch on a few batches.

    Each batch has as many samples as an update. Its gradients are those of the task loss, with the model in train mode;
    data order, random states and running statistics are left unchanged.

    Attributes:
        name: name in messages.
        measure: (names, parameters, gradients of one batch) -> a number per parameter, (n,).
        factors: (names, means of these numbers over the batches) -> their factors, (n,).
        on: names of the modules or parameters; where they are trained, the rate is that of the stage times the factor.
            All others keep the rate of the stage.
        batches: number of batches.
        fresh_optimizer: whether each epoch starts without the optimizer's state (momentum, moments).
    """

    name: str
    measure: Callable[[Sequence[str], Sequence[Tensor], Sequence[Tensor]], Tensor]
    factors: Callable[[Sequence[str], Tensor], Tensor]
    on: Names = EVERYTHING
    batches: int = 5
    fresh_optimizer: bool = False


@dataclass(frozen=True)
class Selection:
    """A choice among final models, made on evaluation data after training, before ``finalise``.

    The model as trained is the best one of the run if the Trainer loads it. If a candidate's weights differ from it,
    BatchNorm layers whose running statistics moved in training get those of the training data under these weights.

    Attributes:
        name: the ``ft_type`` of the strategy that chooses: its state holds the choice and all scores.
        candidates: the values to choose from; ties go to the first. A single one needs no evaluation data.
        weights: a pure function of the initial values, the trained ones (both in float32 or wider, on the CPU) and a
            candidate, that returns the candidate's weights.
        anchors: names of the parameters that it may set; it sets those of them that any stage trains.
        optional: whether the first candidate is used if there are no evaluation data; otherwise the run is refused.
    """

    name: str
    candidates: tuple[float, ...]
    weights: Callable[[Sequence[Tensor], Sequence[Tensor], float], Sequence[Tensor]]
    anchors: Names = EVERYTHING
    optional: bool = False


@dataclass(frozen=True)
class Average:
    r"""A running average of the weights, used in their place to evaluate, save and finish the model.

    .. math:: \bar w \leftarrow d(t) \, \bar w + (1 - d(t)) \, w

    after every optimizer step, where :math:`t` counts the steps before and :math:`\bar w` begins at the initial
    weights. It covers the parameters that train. Buffers are those of the last step: BatchNorm's running statistics
    are averages already, and averaging them again would make them lag. A stage that redraws weights restarts the
    average, since the earlier weights belong to another model.

    Attributes:
        decay: :math:`d`, a function of the number of steps, with values in [0, 1].
    """

    decay: Callable[[int], float]


Surgery = Callable[[nn.Module], nn.Module]


def sets_weights(surgery: Surgery) -> set[str]:
    """The modules whose weights it sets to values of its own, if it names them in an attribute ``sets``."""
    return set(getattr(surgery, "sets", ()))


@dataclass(frozen=True)
class Plan:
    """Change the model, train it in stages under a sum of terms, and change it back.

    Attributes:
        surgery: functions applied in order before training; each takes the model and returns it or a replacement.
        terms: summands added to the task loss.
        stages: consecutive stages; empty means a single stage that trains everything.
        rates: learning rates in every stage, in addition to those of the stage itself.
        streams: additional data for terms that name them.
        select: choices among final models, made in order after training, once the best model is loaded.
        finalise: functions applied in order after that.
        gradients: changes of the gradients before each update, in order.
        tensor_rates: factors of the learning rates of single tensors.
        learning_rate: the base rate in place of ``args.learning_rate``, from a strategy that chose it itself because
            the user set none.
        average: how the weights are averaged over the steps; None to use the weights themselves.
        draws: whether training draws random numbers for each sample, so that splitting a batch changes them.
        owner: the strategy that set the stages, for the error message if two do.
    """

    surgery: tuple[Surgery, ...] = ()
    terms: tuple[Term, ...] = ()
    stages: tuple[Stage, ...] = ()
    rates: tuple[Rate, ...] = ()
    streams: tuple[Stream, ...] = ()
    select: tuple[Selection, ...] = ()
    finalise: tuple[Surgery, ...] = ()
    gradients: tuple[GradientChange, ...] = ()
    tensor_rates: TensorRates | None = None
    learning_rate: float | None = None
    average: Average | None = None
    draws: bool = False
    owner: str | None = field(default=None, compare=False)

    @property
    def term_modules(self) -> nn.ModuleDict:
        """The trainable modules of terms, by term name."""
        return nn.ModuleDict({term.name: term.fn for term in self.terms if isinstance(term.fn, nn.Module)})

    @property
    def second_view(self) -> bool:
        """Whether a term needs each sample twice."""
        return any("second_view" in term.needs for term in self.terms)


def trained_by(stage: Stage, model: nn.Module, trainable: Collection[str]) -> list[str]:
    """Names of the parameters that a stage trains, in the model's order.

    Args:
        trainable: names of the parameters that were not frozen before training; the others stay frozen.

    Raises:
        OptionError: if an entry of ``stage.trains`` matches no module, parameter or buffer, or if none of them is
            trainable.
    """
    names = tuple(name for name, _ in model.named_parameters())
    parameters, others = _covered(tuple(stage.trains), names, tuple(trainable))
    if others:  # a part may hold no parameter, or a lone buffer
        valid = {name for name, _ in itertools.chain(model.named_buffers(), model.named_modules())}
        for prefix in others:
            if prefix not in valid:
                tops = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
                examples = ", ".join([*tops[:6], "...", *tops[-2:]] if len(tops) > 8 else tops)
                raise OptionError(
                    f"stage {stage.name!r}: {prefix!r} matches no parameter. Parameters include {examples}."
                )
    if not parameters:
        raise OptionError(
            f"stage {stage.name!r}: {', '.join(stage.trains) or 'the model'} has no trainable parameters: all were "
            "frozen before training (requires_grad=False). Unfreeze some of them."
        )
    return list(parameters)


@functools.lru_cache(maxsize=128)
def _covered(trains: Names, names: Names, trainable: Names) -> tuple[Names, Names]:
    """The trainable parameters that ``trains`` covers, and the entries that cover none; cached, as runs ask often."""
    valid = {parent for name in names for parent in parents(name)} | {""}
    candidates, prefixes = set(trainable), set(trains)
    parameters = tuple(name for name in names if name in candidates and covered(name, prefixes))
    return parameters, tuple(prefix for prefix in trains if prefix not in valid)


def stage_index(progress_borders: Sequence[int], step: int) -> int:
    """The index of the stage that contains optimizer step ``step`` (0-based); past the end, the last stage."""
    return min(sum(step >= border for border in progress_borders), len(progress_borders) - 1)


def stage_borders(stages: Sequence[Stage], total_steps: int) -> tuple[int, ...]:
    """The step at which each stage ends; the last is ``total_steps``.

    Raises:
        OptionError: if a stage would get no step.
    """
    progress, borders = 0.0, []
    for stage in stages:
        progress += stage.duration
        borders.append(round(progress * total_steps))
    borders[-1] = total_steps
    for stage, begin, end in zip(stages, [0, *borders], borders, strict=False):
        if end <= begin:
            raise OptionError(
                f"stage {stage.name!r} (share {stage.duration:g} of {total_steps} optimizer steps) gets no step. "
                "Train longer (num_train_epochs or max_steps) or give it a larger share."
            )
    return tuple(borders)
