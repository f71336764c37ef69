"""The config of a strategy: options in the style of PEFT, and two methods, ``measure`` and ``plan``."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import nn
from transformers.utils import logging
from transformers.utils.hub import PushToHubMixin

from hf_ft.core.advising import Rule
from hf_ft.core.config_files import CONFIG_NAME, read_config_file
from hf_ft.core.context import Context, State
from hf_ft.core.findings import Findings
from hf_ft.core.head_rate import HEAD_LR, LEAST, check_head_rate
from hf_ft.core.needs import Needs
from hf_ft.core.options import UNKNOWN, from_json, local_options, option, options, to_json, validate
from hf_ft.core.plan import NormMode, Plan
from hf_ft.core.recommended import Recommended
from hf_ft.core.search_space import Declared
from hf_ft.core.state_checks import check_tensor
from hf_ft.documents.public import shareable_name
from hf_ft.errors import OptionError, unknown
from hf_ft.models.anatomy import anatomy
from hf_ft.models.parts import Anatomy
from hf_ft.models.sharing import upload_of
from hf_ft.version import __version__

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.get_logger(__name__)
T = TypeVar("T", bound="FTConfig")


@dataclass(frozen=True)
class Paper:
    """The source of a method; ``note`` says which part of it comes from there."""

    authors: str
    title: str
    venue: str
    url: str = ""
    note: str = ""

    def __str__(self) -> str:
        parts = (f"{self.authors}. {self.title}. {self.venue}.", self.url, self.note and f"({self.note})")
        return " ".join(filter(None, parts))

    @property
    def short(self) -> str:
        """The citation in a table: ``Kumar et al., ICLR 2022``."""
        first, *others = self.authors.split(", ")
        authors = f"{first} et al." if len(others) > 1 else " and ".join([first, *others])
        return f"{authors}, {self.venue}"


@dataclass(frozen=True, kw_only=True)
class FTConfig(PushToHubMixin):
    """Base of all strategies. A subclass is a frozen, registered dataclass that defines :meth:`plan`.

    Raises:
        OptionError: if an option has the wrong type or lies outside its range.
    """

    ft_type: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    further_papers: ClassVar[tuple[Paper, ...]] = ()  # other works that the implementation follows
    formula: ClassVar[str] = ""
    recommended: ClassVar[Mapping[str, Recommended]] = {}
    sources_option: ClassVar[str] = ""  # the option that lists several source models, if any
    cost: ClassVar[float | None] = None  # relative cost of a training run, on the scale of hf_ft.core.advising
    advice: ClassVar[Mapping[Rule, float | None]] = {}  # points by rule; None: the strategy cannot run
    tuned: ClassVar[Declared] = {}  # options tuned with the learning rate; none affects measure
    averages: ClassVar[bool] = False  # whether it only averages weights that another strategy may train
    plain: ClassVar[bool] = True  # whether Transformers loads the trained model without this package
    kept: ClassVar[tuple[str, ...]] = ()  # files in the context's folder from which an interrupted measure resumes

    batch_norm_momentum: float | Literal["auto", "keep"] = option(
        "auto",
        "PyTorch momentum of BatchNorm layers. 'auto' sets 0.1 for model families that store TensorFlow's decay (0.99, "
        "0.997) instead, which would make the statistics track only the last batch.",
        range="(0, 1]",
    )
    norm_mode: NormMode = option(
        "auto",
        "Which normalisation layers with running statistics (BatchNorm) use and update batch statistics: those that "
        "train ('auto'), none ('eval'), or all, frozen ones included ('train').",
        formerly="auto",
    )
    head: str | None = option(None, "Name of the head module, if it is not detected automatically.")
    blocks: str | None = option(
        None, "Regular expression for the module names of the blocks, if they are not detected automatically."
    )

    def __post_init__(self) -> None:
        validate(self)

    def check_arguments(self, args: TrainingArguments) -> None:
        """Reject training arguments with which the strategy can never work.

        Raises:
            OptionError: naming the argument, its value and the fix.
        """

    def check_model(self, model: nn.Module) -> None:
        """Reject a model that does not suit the options, as far as this is known without the data.

        Raises:
            OptionError: naming the option, its value and the fix.
        """

    def check_beside(self, others: tuple[FTConfig, ...]) -> None:
        """Reject strategies that this one cannot be composed with, as far as this is known without model and data.

        Raises:
            OptionError: naming them and the fix.
        """

    def adds_adapters(self) -> bool:
        """Whether it adds adapters, which rename the layers and are saved without them."""
        return False

    def keeps_adapters(self) -> bool:
        """Whether the trained model is an adapter, rather than merged with its base."""
        return self.adds_adapters()

    def measure(self, model: nn.Module, context: Context) -> State:
        """Look at the data once, before training. The model is left unchanged."""
        return State()

    def needs(self) -> Needs:
        """Requirements beyond model and data."""
        return Needs()

    def sources(self) -> tuple[str, ...]:
        """Names of the source models to load in place of a single model; empty for most strategies."""
        return tuple(getattr(self, self.sources_option)) if self.sources_option else ()

    def adapted(self, model: nn.Module) -> FTConfig | None:
        """The form of the strategy that suits this model, usually itself; None if there is none."""
        return self

    def source_free(self) -> FTConfig | None:
        """The form of the strategy that needs no source data; None if there is none."""
        return None

    def within(self, epochs: float, model: nn.Module) -> FTConfig:
        """A copy whose search fits into ``epochs`` in total, as far as it can be shortened."""
        return self

    def measures(self) -> bool:
        """Whether this strategy measures the data before training."""
        return type(self).measure is not FTConfig.measure

    def needs_batch_statistics(self) -> bool:
        """Whether a part of it has no effect where BatchNorm keeps its statistics."""
        return False

    def searches(self) -> bool:
        """Whether its measurement trains candidates, which start from the model as other strategies change it."""
        return False

    def must_measure(self) -> bool:
        """Whether :meth:`plan` needs the measurement; if not, it works without one when there is no context."""
        return self.measures()

    def check_state(self, model: nn.Module, state: State) -> None:
        """Reject a state that was not measured on such a model, or has been damaged since.

        Called before :meth:`plan`, whether the state was measured, read from a file, or passed in. Empty states, from a
        strategy that has not measured anything, are left to :meth:`plan`.

        Raises:
            OptionError: naming the entry.
        """
        for name, tensor in state.tensors.items():
            check_tensor(name, tensor)
        if getattr(self, "head_lr", None) == "auto":
            check_head_rate(state)

    def with_head_rate(self, rate: float) -> FTConfig:
        """A copy with this rate in place of "auto", if its head's rate is to be fitted in this way."""
        fitted: dict[str, Any] = {"head_lr": rate} if getattr(self, "head_lr", None) == "auto" else {}
        return dataclasses.replace(self, **fitted)

    def plan(self, model: nn.Module, state: State) -> Plan:
        """Build the plan. Cheap, deterministic, and without side effects on the model."""
        raise NotImplementedError(f"{type(self).__name__} does not define plan().")

    def example_plan(self, model: nn.Module) -> Plan:
        """A plan like that of :meth:`plan` before anything is measured, in which conflicts with others show early."""
        return Plan() if self.must_measure() else self.plan(model, State(info={HEAD_LR: LEAST}))

    def learned(self, state: State) -> str:
        """A sentence on the measurement for the model card; empty if there is nothing to say."""
        return ""

    def findings(self, state: State) -> Findings:
        """Findings of the measurement, for the report, the model card and the command line.

        Uses ``state.info`` only: the results of a comparison contain no tensors.
        """
        return Findings(summary=self.learned(state))

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Stem, blocks, neck and head of the model; the options ``head`` and ``blocks`` take precedence."""
        return anatomy(model, head=self.head, blocks=self.blocks)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: to_json(getattr(self, f.name)) for f in options(type(self))}
        return {"ft_type": self.ft_type, **values}

    def identity(self) -> dict[str, Any]:
        """The key of a training run with these options: an option added later is left out if it changes nothing.

        Runs made before the option existed are thus found again.
        """
        new = {f.name for f in options(type(self)) if f.metadata["formerly"] == getattr(self, f.name)}
        return {name: value for name, value in self.to_dict().items() if name not in new}

    def shareable(self) -> dict[str, Any]:
        """This config in a form that can be published: no local options, and names instead of local paths."""
        values = {name: v for name, v in self.to_dict().items() if name not in local_options(type(self))}
        if self.sources_option:
            values[self.sources_option] = [shareable_name(name) for name in values[self.sources_option]]
        return values

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FTConfig:
        """Build a config from its dictionary; ``ft_type`` selects the class. Unknown keys are dropped with a warning.

        Raises:
            OptionError: if ``ft_type`` is missing or unknown, or a value is invalid.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("ft_type"), str):
            raise OptionError(f"no 'ft_type' in {data!r}: set it to one of {', '.join(strategies())}.")
        kind = config_class(data["ft_type"])
        known = {f.name for f in options(kind)}
        unknown = sorted(set(data) - known - {"ft_type"})
        if unknown:
            logger.warning(f"{data['ft_type']}: dropped options unknown to this version of hf_ft: {unknown}.")
        return kind(**{key: from_json(value) for key, value in data.items() if key in known})

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``ft_config.json``; with ``push_to_hub=True`` upload it as PEFT does."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_configs(folder, [self])
        if push_to_hub:
            with upload_of(folder, repo := kwargs.pop("repo_id", folder.name)):
                self.push_to_hub(repo, **kwargs)

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **hub_options: Any) -> FTConfig:
        """Load the config saved in a folder or a Hub repository.

        Raises:
            OptionError: if it is missing or damaged, or contains several configs (see :func:`load_configs`).
        """
        configs = load_configs(name_or_path, **hub_options)
        if len(configs) > 1:
            names = ", ".join(c.ft_type for c in configs)
            raise OptionError(f"{name_or_path} holds {len(configs)} strategies ({names}): use hf_ft.load_configs.")
        return configs[0]


def write_configs(folder: Path, configs: Iterable[FTConfig], **extra: Any) -> None:
    """Write ``ft_config.json`` for one or more strategies in a form that can be shared, with any extra entries."""
    content = {"hf_ft_version": __version__, "strategies": [c.shareable() for c in configs], **extra}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_configs(name_or_path: str | Path, **hub_options: Any) -> tuple[FTConfig, ...]:
    """Load all strategies saved in a folder or a Hub repository, without options that are local to a machine."""
    content = read_config_file(name_or_path, **hub_options)
    return tuple(FTConfig.from_dict(_completed(item)) for item in content["strategies"])


def configured_from(data: Mapping[str, Any]) -> FTConfig:
    """The config that another one saved within its state; as if from a file, without local options."""
    return FTConfig.from_dict(_completed(data))


def as_saved(config: T) -> T:
    """The config as :func:`load_configs` would read it again."""
    values = {name: from_json(value) for name, value in config.shareable().items() if name != "ft_type"}
    return type(config)(**values)


def _completed(data: Any) -> Any:
    """A saved config as it is read: options added later get their former behaviour, local options are dropped."""
    kind = _registered().get(str(data.get("ft_type"))) if isinstance(data, Mapping) else None
    if kind is None:
        return data
    # A file from elsewhere must not decide what is opened here.
    data = {name: value for name, value in data.items() if name not in local_options(kind)}
    before = {f.name: to_json(f.metadata["formerly"]) for f in options(kind) if f.metadata["formerly"] is not UNKNOWN}
    return before | dict(data)


# The baseline of comparisons, and what runs if no strategy is chosen: the only method known here by name.
BASELINE = "full"

C = TypeVar("C", bound="type[FTConfig]")
_CONFIGS: dict[str, type[FTConfig]] = {}
_OWN = "hf_ft.strategies"  # by name: its modules import this one


def _registered() -> dict[str, type[FTConfig]]:
    """All strategies; those of this package come first, and are registered on first access."""
    importlib.import_module(_OWN)
    return _CONFIGS


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a config known under ``name``, which becomes its ``ft_type``.

    Raises:
        OptionError: the name is taken by another class.
    """

    def add(config_class: C) -> C:
        own = config_class.__module__.startswith(f"{_OWN}.")
        known = (_CONFIGS if own else _registered()).get(name)
        if known is not None and known.__qualname__ != config_class.__qualname__:
            raise OptionError(
                f"strategy name {name!r} is already taken by {known.__module__}.{known.__qualname__}: choose another."
            )
        config_class.ft_type = name
        _CONFIGS[name] = config_class
        return config_class

    return add


def strategies() -> dict[str, type[FTConfig]]:
    """All registered strategies: those of this package by name, then others in the order of registration."""
    found = _registered()
    own = sorted(name for name, kind in found.items() if kind.__module__.startswith(f"{_OWN}."))
    return {name: found[name] for name in (*own, *(name for name in found if name not in own))}


def config_class(name: str) -> type[FTConfig]:
    """The config class of a registered name.

    Raises:
        OptionError: unknown name; the message lists the names there are.
    """
    known = _registered()
    if name in known:
        return known[name]
    raise OptionError(unknown("strategy", name, known))
