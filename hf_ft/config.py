"""The config of a strategy: options in PEFT's manner, and two methods, ``measure`` and ``plan``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging
from transformers.utils.hub import PushToHubMixin, cached_file

from hf_ft.errors import OptionError
from hf_ft.fields import from_json, option, options, to_json, validate
from hf_ft.models.anatomy import anatomy
from hf_ft.models.norms import batch_norms, tensorflow_momentum
from hf_ft.models.parts import Anatomy
from hf_ft.plan import Plan, compose
from hf_ft.registry import config_class, strategies
from hf_ft.space import Space
from hf_ft.version import __version__

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hf_ft.fit import Recipe
    from hf_ft.recordings import Samples
    from hf_ft.row_cache import FrozenCache

logger = logging.get_logger(__name__)
CONFIG_NAME = "ft_config.json"


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    venue: str
    url: str = ""

    def __str__(self) -> str:
        return f"{self.authors}. {self.title}. {self.venue}." + (f" {self.url}" if self.url else "")


@dataclass(frozen=True)
class Recommended:
    """A training argument that a method wants, from where (code, paper, ours), and why, where that is not plain."""

    value: Any
    source: str = "ours"
    why: str = field(default="", repr=False)


@dataclass(frozen=True)
class State:
    """What a strategy learned by looking at the data once. Saved with the model; JSON and tensors only."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """The source data.

    Attributes:
        dataset: as the user gave it.
        batches: up to so many of its samples, the same on every process, as keyword arguments on the device.
    """

    dataset: Any
    batches: Callable[[int], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Context:
    """What ``measure`` may use: capabilities, never the Trainer.

    Attributes:
        batches: a fresh pass over this process's share of the training data, each sample exactly once over all
            processes, as keyword arguments of the model, on its device. Batches of the size on each device are
            dealt out whole, in shuffled order: the same ones on any number of processes.
        reduce: sums a tensor over all processes.
        device: where the model is.
        generator: a CPU generator, seeded alike on every process.
        samples: the training samples by number, without augmentation where the user gave such.
        labels: their classes, (samples,), where they can be told without reading the inputs.
        recipe: how training will be done, for short trainings of one's own.
        described: what the recipe was made of, to tell whether results belong to it.
        frozen_cache: whether and where what is frozen may be kept.
        source: the source data, where there are such.
        folder: where intermediate results may be kept.
        progress: whether to show progress bars.
        rank, ranks: which process this is, of how many.
    """

    batches: Callable[[], Iterator[dict[str, Any]]]
    reduce: Callable[[Tensor], Tensor]
    device: torch.device
    generator: torch.Generator
    samples: Samples
    labels: np.ndarray | None
    recipe: Recipe
    described: Mapping[str, Any]
    frozen_cache: FrozenCache
    source: Source | None = None
    folder: Path | None = None
    progress: bool = True
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class SetBatchNormMomentum:
    """Surgery: the momentum of the named BatchNorm layers."""

    names: tuple[str, ...]
    momentum: float

    def __call__(self, model: nn.Module) -> nn.Module:
        for name in self.names:
            model.get_submodule(name).momentum = self.momentum  # type: ignore[assignment]
        return model


@dataclass(frozen=True, kw_only=True)
class FTConfig(PushToHubMixin):
    """Base of all strategies. A subclass is a frozen dataclass, registered, that defines :meth:`plan`.

    Raises:
        OptionError: an option's value is of the wrong type or out of its range.
    """

    ft_type: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    formula: ClassVar[str] = ""
    recommended: ClassVar[Mapping[str, Recommended]] = {}
    takes_source_data: ClassVar[bool] = False  # whether it can use a source data set that it does not require
    several_members: ClassVar[bool] = False  # whether it also fits a model of several members side by side
    without_source_data: ClassVar[str] = ""  # what else can be done, at the end of a sentence that asks for one
    tuned: ClassVar[Space] = {}  # options, beside the learning rate, that a fair comparison tunes; none changes measure

    batch_norm_momentum: float | Literal["auto", "keep"] = option(
        "auto",
        "PyTorch momentum of BatchNorm layers. 'auto' sets 0.1 where a model family carries TensorFlow's decay "
        "(0.99, 0.997) in its place, with which the statistics are those of about the last batch.",
        range="(0, 1]",
    )
    head: str | None = option(None, "Name of the head module, where it cannot be found by itself.")
    blocks: str | None = option(
        None, "Regular expression of the blocks' module names, where they cannot be found by themselves."
    )

    def __post_init__(self) -> None:
        validate(self)

    def check_arguments(self, args: TrainingArguments) -> None:
        """Refuse training arguments under which the strategy can never work.

        Raises:
            OptionError: naming the argument, its value and the fix.
        """

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the options do not fit, as far as can be told without looking at the data.

        Raises:
            OptionError: naming the option, its value and the fix.
        """

    def measure(self, model: nn.Module, context: Context) -> State:
        """Look at the data once, before training. The model comes back as it was."""
        return State()

    def requires(self) -> frozenset[Literal["source_head", "source_data"]]:
        """What it needs beside model and data: the pretrained head, the data of the pretraining."""
        return frozenset()

    def source_free(self) -> FTConfig | None:
        """The same strategy without source data, where it has such a form; None where it has not."""
        return None

    def within(self, epochs: float, model: nn.Module) -> FTConfig:
        """The same with a search that trains for so many epochs in all at most, as far as it can be made so short."""
        return self

    def measures(self) -> bool:
        """Whether this strategy looks at the data first."""
        return type(self).measure is not FTConfig.measure

    def plan(self, model: nn.Module, state: State) -> Plan:
        """What to do. Cheap, repeatable, and without any effect on the model."""
        raise NotImplementedError(f"{type(self).__name__} defines no plan().")

    def learned(self, state: State) -> str:
        """A sentence for people, in the model card, on what was measured; empty where there is nothing to say."""
        return ""

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Stem, blocks, neck and head of the model, as ``head`` and ``blocks`` say where they are set."""
        return anatomy(model, head=self.head, blocks=self.blocks)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: to_json(getattr(self, f.name)) for f in options(type(self))}
        return {"ft_type": self.ft_type, **values}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> FTConfig:
        """A config from its dictionary; ``ft_type`` says which. Unknown keys are warned about and dropped.

        Raises:
            OptionError: no or an unknown ``ft_type``, or a value that cannot be.
        """
        if not isinstance(data, Mapping) or "ft_type" not in data:
            raise OptionError(f"no 'ft_type' in {data!r}; one of {', '.join(strategies())} is needed.")
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
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @staticmethod
    def from_pretrained(name_or_path: str | Path, **hub_options: Any) -> FTConfig:
        """The config saved in a folder or a Hub repository.

        Raises:
            OptionError: there is none, it is damaged, or it holds several (see :func:`load_configs`).
        """
        configs = load_configs(name_or_path, **hub_options)
        if len(configs) > 1:
            names = ", ".join(c.ft_type for c in configs)
            raise OptionError(f"{name_or_path} holds {len(configs)} strategies ({names}): use hf_ft.load_configs.")
        return configs[0]


def write_configs(folder: Path, configs: Iterable[FTConfig], **extra: Any) -> None:
    """Write ``ft_config.json`` for one or more strategies, and what else belongs beside them."""
    content = {"hf_ft_version": __version__, "strategies": [c.to_dict() for c in configs], **extra}
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config_file(name_or_path: str | Path, **hub_options: Any) -> dict[str, Any]:
    """The content of ``ft_config.json``.

    Raises:
        OptionError: missing or damaged; the message names the file.
    """
    folder = Path(name_or_path)
    file = folder / CONFIG_NAME
    if not folder.is_dir():
        try:
            file = Path(str(cached_file(str(name_or_path), CONFIG_NAME, **hub_options)))
        except OSError as error:
            raise OptionError(f"{name_or_path}: no such folder, and no {CONFIG_NAME} on the Hub: {error}") from error
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionError(f"{folder} holds no {CONFIG_NAME}: it was not written by hf_ft.") from error
    except ValueError as error:
        raise OptionError(f"{file} is damaged ({error}). Restore it, or take another checkpoint.") from error
    if not isinstance(content, dict) or not isinstance(content.get("strategies"), list) or not content["strategies"]:
        raise OptionError(f"{file} is damaged: it lists no strategies. Restore it, or take another checkpoint.")
    return content


def load_configs(name_or_path: str | Path, **hub_options: Any) -> tuple[FTConfig, ...]:
    """All strategies saved in a folder or a Hub repository."""
    content = read_config_file(name_or_path, **hub_options)
    return tuple(FTConfig.from_dict(item) for item in content["strategies"])


def resolve(strategy: FTConfig | str | Iterable[FTConfig | str]) -> tuple[FTConfig, ...]:
    """A config, a registered name, or a list of either, as a tuple of configs.

    Raises:
        OptionError: something else, nothing, or an unknown name.
    """
    several = isinstance(strategy, Iterable) and not isinstance(strategy, str)
    items = tuple(strategy) if several else (strategy,)  # type: ignore[arg-type]
    configs = tuple(config_class(item)() if isinstance(item, str) else item for item in items)
    wrong = [item for item in configs if not isinstance(item, FTConfig)]
    if wrong or not configs:
        hint = f" Call it: {wrong[0].__name__}()." if wrong and isinstance(wrong[0], type) else ""
        raise OptionError(
            f"strategy={strategy!r} is not a strategy.{hint} Pass a config such as L2SPConfig(), a registered name "
            f"({', '.join(strategies())}), or a list of them."
        )
    return configs  # type: ignore[return-value]


def shared_option(configs: Iterable[FTConfig], name: str) -> Any:
    """The value of an option that all strategies of a run have in common; the default gives way.

    Raises:
        OptionError: two strategies say different things; both are named.
    """
    default = next(f.default for f in options(FTConfig) if f.name == name)
    said = {getattr(c, name): c.ft_type for c in configs if getattr(c, name) != default}
    if len(said) > 1:
        (a, one), (b, other) = list(said.items())[:2]
        raise OptionError(f"{one}.{name}={a!r} and {other}.{name}={b!r} contradict each other.")
    return next(iter(said), default)


def build_plan(configs: Iterable[FTConfig], model: nn.Module, states: Mapping[str, State]) -> Plan:
    """The plans of all strategies as one, with what is common to all: the BatchNorm momentum."""
    configs = tuple(configs)
    plans = [
        dataclasses.replace(config.plan(model, states.get(config.ft_type, State())), owner=config.ft_type)
        for config in configs
    ]
    return compose([momentum_plan(shared_option(configs, "batch_norm_momentum"), model), *plans])


def momentum_plan(momentum: float | str, model: nn.Module) -> Plan:
    """Surgery that sets the momentum of BatchNorm layers as ``batch_norm_momentum`` says."""
    if momentum == "keep":
        return Plan()
    if momentum == "auto":
        names = tuple(tensorflow_momentum(model))
        if names:
            old = sorted({norm.momentum for name, norm in batch_norms(model) if name in names and norm.momentum})
            logger.warning_once(
                f"BatchNorm momentum {old} of {len(names)} layers is TensorFlow's decay: in training the running "
                "statistics would be about those of the last batch. Set to 0.1 (batch_norm_momentum='keep' leaves it)."
            )
        return Plan(surgery=(SetBatchNormMomentum(names, 0.1),)) if names else Plan()
    names = tuple(name for name, _ in batch_norms(model))
    return Plan(surgery=(SetBatchNormMomentum(names, float(momentum)),)) if names else Plan()


def recommended_arguments(configs: Iterable[FTConfig]) -> dict[str, Recommended]:
    """The training arguments that the strategies want; where two differ, the one named first decides."""
    merged: dict[str, Recommended] = {}
    for config in configs:
        for name, wanted in config.recommended.items():
            merged.setdefault(name, wanted)
    return merged
