"""A plan: what a strategy does to a model, as an immutable value. Plans compose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from hf_ft.errors import OptionError
from hf_ft.models.names import EVERYTHING, Names, covered

if TYPE_CHECKING:
    from hf_ft.core.view import View

NormMode = Literal["auto", "eval", "train"]


@dataclass(frozen=True)
class Rate:
    """The learning rate of some parameters in a stage.

    ``names`` are names of modules or parameters; the longest match decides. The rate is ``lr`` where that is
    given, else ``args.learning_rate * scale``.
    """

    names: Names
    scale: float = 1.0
    lr: float | None = None


@dataclass(frozen=True)
class Stage:
    """A part of the run in which one set of parameters trains.

    Attributes:
        name: as logged and shown.
        trains: names of modules or parameters (a module stands for all that is in it; ``""`` for everything).
            What was frozen before training stays frozen.
        duration: the stage's share of all optimizer steps; the shares of a plan sum to 1.
        rates: learning rates where they differ from ``args.learning_rate``.
        norm_mode: which normalisation layers with running statistics use and move batch statistics.
            ``auto``: those whose own parameters train. ``eval``: none. ``train``: all, frozen ones too.
    """

    name: str
    trains: Names = EVERYTHING
    duration: float = 1.0
    rates: tuple[Rate, ...] = ()
    norm_mode: NormMode = "auto"


@dataclass(frozen=True)
class Stream:
    """A second stream of data: endless, shuffled where that can be, and read only while a term of weight > 0 uses it.

    Attributes:
        name: the data that the Trainer was given under this name; ``"source"`` is its ``source_dataset``.
        ratio: samples of it for each sample of the target data; every batch of it has as many, since its loss and
            the target's are means.
        forward: ``"joint"`` runs it and the target's batch concatenated, the head seeing the target's rows alone:
            normalisation layers take their statistics from both. ``"separate"`` runs it by itself after the target's.
        prepare: called with the data set before training, refuses it, or returns what each of its batches, on the
            CPU, is to be passed through.
    """

    name: str
    ratio: float = 1.0
    forward: Literal["joint", "separate"] = "joint"
    prepare: Callable[[Any], Callable[[dict[str, Any]], dict[str, Any]]] | None = None

    def batch_size(self, target: int) -> int:
        """Samples in a batch of it beside one of so many target samples.

        Raises:
            OptionError: it would hold none.
        """
        size = round(self.ratio * target)
        if size < 1:
            raise OptionError(
                f"{self.name}_ratio={self.ratio:g} of per_device_train_batch_size={target} gives batches without a "
                f"sample: set at least {1 / target:g}, or use larger batches."
            )
        return size


@dataclass(frozen=True)
class Term:
    r"""A summand of the training loss: :math:`\text{weight} \cdot \text{schedule}(t) \cdot \text{fn}(\text{view})`.

    Attributes:
        name: the key under which it is logged, ``loss/<name>``.
        fn: :class:`~hf_ft.core.view.View` -> scalar; a micro-batch mean where it depends on the batch. It
            runs in float32, outside autocast. Where it is an ``nn.Module``, its
            parameters train in every stage at ``args.learning_rate`` and are saved with each checkpoint.
        weight: a constant factor.
        schedule: a further factor, a function of the progress of the whole run in [0, 1].
        anchors: names whose values at the start are kept for ``view.starts``.
        needs: what else the view must hold; ``"features"`` is what goes into the head, ``"inputs"`` the batch
            (then nothing frozen can be left out), ``"reference"`` what ``layers`` give in the model as it was at
            the start.
        layers: what ``view.states`` holds: names of modules, for their outputs, or ``"input:<module>"``. In a stage
            in which none of them can change, the term is a constant and is left out.
        stream: the name of the stream whose batch, and ``layers`` of it, ``view.streams`` holds.
        replaces_decay: names of parameters that the optimizer must not decay, since the term does.
        couples_batch: whether it depends on the batch as a whole, so that splitting a batch changes it.
        starts_at_zero: whether it is exactly 0 before the first step, with the model in eval mode.
        zero_means: what is wrong where it is exactly 0 all the time between two logs; said once.
    """

    name: str
    fn: Callable[[View], Tensor]
    weight: float = 1.0
    schedule: Callable[[float], float] | None = None
    anchors: Names = ()
    needs: frozenset[Literal["features", "inputs", "reference"]] = frozenset()
    layers: Names = ()
    stream: str | None = None
    replaces_decay: Names = ()
    couples_batch: bool = False
    starts_at_zero: bool = False
    zero_means: str = ""


Surgery = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Plan:
    """What to do: change the model, train it in stages under a sum of terms, change it back.

    Attributes:
        surgery: applied in order before training; each takes the model and returns it or its replacement.
        terms: summands beside the task's loss.
        stages: one after the other; none means one stage that trains everything.
        streams: data beside the target's, for terms that name them.
        finalise: applied in order after training and after the best model was loaded.
        owner: the strategy that set the stages, for the error when two do.
    """

    surgery: tuple[Surgery, ...] = ()
    terms: tuple[Term, ...] = ()
    stages: tuple[Stage, ...] = ()
    streams: tuple[Stream, ...] = ()
    finalise: tuple[Surgery, ...] = ()
    owner: str | None = field(default=None, compare=False)

    @property
    def term_modules(self) -> nn.ModuleDict:
        """What terms train beside the model, by the term's name."""
        return nn.ModuleDict({term.name: term.fn for term in self.terms if isinstance(term.fn, nn.Module)})


def trained_by(stage: Stage, model: nn.Module, trainable: Collection[str]) -> list[str]:
    """The parameters that a stage trains, in the model's order.

    Args:
        trainable: names of those that were not frozen before training; the others stay frozen.

    Raises:
        OptionError: one of ``stage.trains`` is no module or parameter, or all together hold no trainable one.
    """
    names = [name for name, _ in model.named_parameters()]
    known = {"", *names, *(name for name, _ in model.named_modules())}
    for prefix in stage.trains:
        if prefix not in known:
            tops = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
            shown = ", ".join([*tops[:6], "...", *tops[-2:]] if len(tops) > 8 else tops)
            raise OptionError(f"stage {stage.name!r}: {prefix!r} matches no parameter. There are: {shown}.")
    allowed, trains = set(trainable), set(stage.trains)
    found = [name for name in names if name in allowed and covered(name, trains)]
    if not found:
        raise OptionError(
            f"stage {stage.name!r}: {', '.join(stage.trains) or 'the model'} holds no parameter that is free to "
            "train: all were frozen before training (requires_grad=False). Let some of them train."
        )
    return found


def stage_index(progress_borders: Sequence[int], step: int) -> int:
    """The stage that optimizer step ``step`` (0-based) belongs to; past the end, the last one."""
    return min(sum(step >= border for border in progress_borders), len(progress_borders) - 1)


def stage_borders(stages: Sequence[Stage], total_steps: int) -> tuple[int, ...]:
    """The step at which each stage ends, the last being ``total_steps``.

    Raises:
        OptionError: a stage would get no step.
    """
    done, borders = 0.0, []
    for stage in stages:
        done += stage.duration
        borders.append(round(done * total_steps))
    borders[-1] = total_steps
    for stage, begin, end in zip(stages, [0, *borders], borders, strict=False):
        if end <= begin:
            raise OptionError(
                f"stage {stage.name!r} (share {stage.duration:g} of {total_steps} optimizer steps) gets no step. "
                "Train longer (num_train_epochs or max_steps) or give it a larger share."
            )
    return tuple(borders)
