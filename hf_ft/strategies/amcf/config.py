"""AMCF: several source models fine-tuned together; a swarm chooses how many layers of each stay frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from hf_ft.core import (
    USUAL_RATE,
    Context,
    Findings,
    FTConfig,
    LogRange,
    Names,
    Needs,
    NormMode,
    OptionError,
    Paper,
    Plan,
    Recommended,
    Stage,
    State,
    Term,
    View,
    advising,
    functional,
    option,
    register,
)
from hf_ft.core.compose import with_common_options
from hf_ft.core.plan import Surgery
from hf_ft.engine.run import Run
from hf_ft.engine.set_up import start
from hf_ft.metrics import LOCAL_METRICS
from hf_ft.models import Layer, batch_norms, covered, main_path_layers, members_of
from hf_ft.models.anatomy import anatomy, names_of_members, unwrap
from hf_ft.strategies.amcf.findings import swarm_findings
from hf_ft.strategies.amcf.scores import SwarmScores
from hf_ft.strategies.amcf.search import STORAGE, SwarmSearch

Frozen = tuple[int, ...]


SEVERAL_SOURCES = advising.Rule(
    (("members", ">=", 2),), "{members:.0f} source models are available", "Feng et al., 2024"
)
ONE_SOURCE = advising.Rule(
    (("members", "<", 2),), "{members:.0f} source model is available: there is nothing to collaborate with", source=""
)


@register("amcf")
@dataclass(frozen=True, kw_only=True)
class AMCFConfig(FTConfig):
    r"""Fine-tune several source models together, each from a layer chosen by a particle swarm.

    Each of the :math:`N` members has its own head and trains on its own cross-entropy; a consistency term keeps their
    logits :math:`z_j` close together:

    .. math:: \sum_j \mathrm{CE}(z_j, y) + \lambda \, \mathrm{mean}_b \, \tfrac1N \sum_j \lVert z_j - \bar z \rVert_2

    :math:`\lambda` is ``consistency``. The first :math:`k_j` layers of member :math:`j` stay frozen. The model is a
    :class:`~hf_ft.CollaborativeModel` from :func:`hf_ft.load_sources`; any other model counts as a single member.
    """

    paper = Paper(
        "Feng, Yang, Tan, Zeng, Tang, Li, Niu, Feng",
        "Adaptive multi-source domain collaborative fine-tuning for transfer learning",
        "PeerJ Computer Science 10:e2107, 2024",
        "https://doi.org/10.7717/peerj-cs.2107",
    )
    formula = (
        "sum_j CE(z_j, y) + consistency * mean_batch( 1/N sum_j ||z_j - mean_i z_i||_2 )\n"
        "member j trains from its layer k_j on; (k_1, ..., k_N) from a particle swarm\n"
        "prediction: argmax sum_j z_j"
    )
    recommended = {
        # Those of full fine-tuning, except for the authors' own: under SGD, with statistics that move.
        "learning_rate": dataclasses.replace(USUAL_RATE["learning_rate"], sgd=0.01),
        "weight_decay": Recommended(5e-4, "code"),
        "lr_scheduler_type": Recommended("cosine", "ours"),  # Transformers has no schedule like the authors' steps
        "max_grad_norm": Recommended(0.0, "ours", "clipping the global gradient norm couples the members"),
    }
    tuned = {"consistency": LogRange(0.01, 1.0)}
    kept = (STORAGE,)
    sources_option = "source_models"
    cost = advising.SEVERAL_MODELS
    advice = {SEVERAL_SOURCES: 3, ONE_SOURCE: None}

    source_models: tuple[str, ...] = option(
        (),
        "Source models: Hub ids, local folders or short names, loaded by hf_ft.load_sources and on the command line.",
    )
    consistency: float = option(0.2, "Weight of the consistency term.", range="[0, inf)", source="code")
    frozen: tuple[int, ...] | Literal["search"] = option(
        "search",
        "Number of layers to freeze in each member, counted from the input, such as [12, 30]; 'search' finds it by "
        "particle swarm optimisation.",
        source="code",
    )
    prediction: Literal["sum", "mean_probability"] = option(
        "sum", "How to combine the members' logits: their sum, or the log of the mean probability.", source="code"
    )
    norm_mode: NormMode = option(
        "eval",
        "Mode of the normalisation layers: 'eval' keeps their pretrained statistics, 'auto' updates those of layers "
        "that train, 'train' those of all, as in the authors' code.",
        formerly="auto",
    )
    freeze_norm_statistics: bool = option(True, "False is the same as norm_mode='train'.")
    particles: int = option(10, "Number of particles in the swarm.", range="[1, inf)", source="code")
    iterations: int = option(5, "Number of swarm iterations.", range="[1, inf)", source="code")
    search_epochs: int = option(5, "Epochs per training run of the search.", range="[1, inf)", source="code")
    search_schedule: Literal["run", "constant"] = option(
        "run",
        "Learning-rate schedule within each training run of the search: that of the run itself, or 'constant', as in "
        "the authors' code.",
        formerly="run",
    )
    search_budget: int | None = option(
        None, "Maximum number of distinct positions to train; None for no limit.", range="[1, inf)"
    )
    patience: int | None = option(
        None,
        "Stop the search after this many iterations without a better score; None to run all of them.",
        range="[1, inf)",
    )
    halving: bool = option(
        False, "Prune poor positions early (successive halving); False trains all of them to the end."
    )
    validation: float = option(
        0.25, "Fraction of the training samples held out to score the positions.", range="(0, 1)"
    )
    metric: str = option(
        "accuracy",
        f"Metric of the ensemble to score positions by: loss, {', '.join(LOCAL_METRICS)} (losses and errors are "
        "minimised).",
    )
    search_seed: int = option(0, "Seed of the swarm and of its training runs.", range="[0, inf)")
    storage: str | None = option(
        None,
        "Where to store the trials: a file *.db (SQLite) or *.log, an Optuna URL, or 'memory'; None for "
        "swarm_search.db in the output folder. Processes that share a storage share the search.",
        local=True,
    )

    def __post_init__(self) -> None:
        for name in ("source_models", "frozen"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if not self.freeze_norm_statistics:
            object.__setattr__(self, "norm_mode", "train")
        super().__post_init__()
        if self.metric != "loss" and self.metric not in LOCAL_METRICS:
            raise OptionError(f"AMCFConfig.metric={self.metric!r} is unknown: choose loss, {', '.join(LOCAL_METRICS)}.")

    # --- before training -----------------------------------------------------------------------------------

    def needs(self) -> Needs:
        return Needs(several_members=True)

    def check_model(self, model: nn.Module) -> None:
        members = self.members(model)
        if self.source_models and len(self.source_models) != len(members):
            raise OptionError(
                f"AMCFConfig.source_models names {len(self.source_models)} models, but the model has {len(members)} "
                "members: load it with hf_ft.load_sources(config.source_models, num_labels=...)."
            )
        layers = self.layers(model)
        if self.frozen != "search":
            self._check_frozen(self.frozen, layers)
        without = [name or type(member).__name__ for name, member in members if not batch_norms(member)]
        if without and not self.freeze_norm_statistics:
            raise OptionError(
                f"AMCFConfig.freeze_norm_statistics=False: {without[0]} has no BatchNorm statistics to update. Set it "
                "to True."
            )

    def _check_frozen(self, frozen: Frozen, layers: Sequence[int]) -> None:
        if len(frozen) != len(layers):
            raise OptionError(
                f"AMCFConfig.frozen={list(frozen)!r} has {len(frozen)} values for {len(layers)} members: give one per "
                "member."
            )
        for j, (k, count) in enumerate(zip(frozen, layers, strict=True)):
            if not 0 <= k < count:
                raise OptionError(
                    f"AMCFConfig.frozen={list(frozen)!r}: member {j} has {count} layers, so 0 to {count - 1} of them "
                    f"can be frozen, not {k}."
                )

    def within(self, epochs: float, model: nn.Module) -> AMCFConfig:
        """A copy whose search fits into ``epochs``; trials are cut to two epochs if fewer than three moves fit."""
        each = self.search_epochs if epochs >= 3 * self.search_epochs * self.particles else min(2, self.search_epochs)
        room = max(1, int(epochs / each))
        return dataclasses.replace(self, search_epochs=each, search_budget=min(room, self.search_budget or room))

    def measures(self) -> bool:
        return self.frozen == "search"

    def searches(self) -> bool:
        return self.measures()

    def measure(self, model: nn.Module, context: Context) -> State:
        scores = SwarmSearch(model, self, context).run()
        return State(info={"swarm": scores.to_dict(), "frozen": list(scores.best.position)})

    # --- the plan ------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, state: State) -> Plan:
        return self._plan(model, self._members(model), self.chosen(state))

    def example_plan(self, model: nn.Module) -> Plan:
        members = self._members(model)
        return self._plan(model, members, (0,) * len(members) if self.frozen == "search" else self.frozen)

    def chosen(self, state: State) -> Frozen:
        """Number of frozen layers of each member.

        Raises:
            OptionError: if they are to be searched for, but the search has not run.
        """
        if self.frozen != "search":
            return self.frozen
        if "frozen" not in state.info:
            raise OptionError("AMCFConfig(frozen='search') has no search result yet: pass a context, or states.")
        return tuple(state.info["frozen"])

    def scores(self, state: State) -> SwarmScores:
        """Every position visited by ``frozen="search"``, with its score."""
        return SwarmScores.from_dict(state.info["swarm"])

    def learned(self, state: State) -> str:
        return self.scores(state).verdict() if "swarm" in state.info else ""

    def findings(self, state: State) -> Findings:
        return swarm_findings(self.scores(state)) if "swarm" in state.info else Findings()

    def start(self, model: nn.Module, plan: Plan) -> Run:
        """Prepare a model for training one position of the search."""
        return start((self,), model, plan, {})

    def planner(self, model: nn.Module) -> Callable[[Frozen], Plan]:
        """The complete plan for training a position of the search; the layers are found once for all positions."""
        members = self._members(model)
        return lambda frozen: with_common_options((self,), [self._plan(model, members, frozen)], model)

    def _plan(self, model: nn.Module, members: Sequence[_Member], frozen: Frozen) -> Plan:
        self._check_frozen(frozen, [len(member.layers) for member in members])
        trains = tuple(name for member, k in zip(members, frozen, strict=True) for name in member.after(k))
        surgery: tuple[Surgery, ...] = ()
        terms: tuple[Term, ...] = ()
        if members_of(unwrap(model)[0]):
            surgery = (SetPrediction(self.prediction),)
        if len(members) > 1:
            terms = (Term("consistency", _disagreement, weight=self.consistency),)
        stage = Stage("collaborative", trains, norm_mode=self.norm_mode)
        return Plan(surgery=surgery, terms=terms, stages=(stage,))

    # --- members -------------------------------------------------------------------------------------------

    def members(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Members by module name; a model without members is its own only member."""
        base, prefix = unwrap(model)
        members = members_of(base)
        return [(f"{prefix}{name}", member) for name, member in members] if members else [("", model)]

    def layers(self, model: nn.Module) -> tuple[int, ...]:
        """Number of layers of each member, counted along the main path."""
        return tuple(len(member.layers) for member in self._members(model))

    def _members(self, model: nn.Module) -> list[_Member]:
        members = self.members(model)
        names_by_member = names_of_members(members, self.head, self.blocks)
        return [
            _Member(prefix, member, main_path_layers(member, *names), anatomy(member, *names).stem.modules)
            for (prefix, member), names in zip(members, names_by_member, strict=True)
        ]


@dataclass(frozen=True)
class _Member:
    """A member with its name in the full model, and its layers and stem by their names within the member."""

    prefix: str
    model: nn.Module
    layers: tuple[Layer, ...]
    stem: Names

    def after(self, frozen: int) -> Names:
        """What trains, by names in the full model: everything except the given number of first layers."""
        if not frozen:
            return (self.prefix,)
        still = {module for layer in self.layers[:frozen] for module in layer.modules}
        inside = {module for layer in self.layers for module in layer.modules}
        # Stem parameters outside any layer (a class token) come before the first layer.
        names = [
            name
            for name, _ in self.model.named_parameters()
            if not covered(name, still) and (covered(name, inside) or not covered(name, set(self.stem)))
        ]
        return tuple(f"{self.prefix}.{name}" if self.prefix else name for name in names)


@dataclass(frozen=True)
class SetPrediction:
    """Surgery: set how the members' logits are combined."""

    prediction: str

    def __call__(self, model: nn.Module) -> nn.Module:
        base: Any = unwrap(model)[0]
        base.config.prediction = self.prediction
        return model


def _disagreement(view: View) -> Tensor:
    return functional.disagreement([functional.wide(logits) for logits in view.outputs["member_logits"]])
