"""Parses a request to ``hf-ft train``: flags and a YAML file are merged, then converted to configs and arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from hf_ft.cli.checks import check_flags
from hf_ft.cli.flags import BUDGET, BUDGETED, DEFAULTS, EVALUATIONS, DataFlags, MethodFlags, StreamFlags
from hf_ft.core.compose import recommended_arguments, sources_of
from hf_ft.core.config import BASELINE, FTConfig, config_class, strategies
from hf_ft.core.options import annotation, options, parse
from hf_ft.core.recommended import Recommended
from hf_ft.data.mixing import Mixing
from hf_ft.errors import OptionError, did_you_mean


@dataclass(frozen=True)
class Request:
    """A request to ``hf-ft train``, parsed and checked as far as possible without model and data.

    Attributes:
        configs: the strategies.
        given: training arguments set by the user.
        flags: all flags set by the user.
    """

    data: DataFlags
    method: MethodFlags
    configs: tuple[FTConfig, ...]
    given: Mapping[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    stream: StreamFlags = field(default_factory=StreamFlags)

    @property
    def output_dir(self) -> Path:
        return Path(str(self.given.get("output_dir") or DEFAULTS["output_dir"]))

    @property
    def mixing(self) -> Mixing:
        """How the images of a batch are mixed."""
        return Mixing(self.method.mixup, self.method.cutmix)

    @property
    def sources(self) -> tuple[str, ...]:
        """The source models given by a strategy, used instead of ``--model``."""
        return sources_of(self.configs)

    @property
    def resume(self) -> str | bool | None:
        """The folder of a checkpoint, True for the latest one, or None."""
        wanted = str(self.given.get("resume_from_checkpoint") or "")
        return {"": None, "false": None, "none": None, "true": True}.get(wanted.lower(), wanted)

    def recommended(self, model: nn.Module | None = None) -> dict[str, Recommended]:
        """The arguments that the strategies recommend and the user did not set; some depend on the model."""
        wanted = recommended_arguments(self.configs, self.given.get("optim"), model)
        return {name: value for name, value in wanted.items() if name not in self.given}

    def training_arguments(self) -> dict[str, Any]:
        """In order of precedence: the user's values, the strategies' recommendations, the defaults of this command."""
        recommended = {name: wanted.value for name, wanted in self.recommended().items()}
        values = DEFAULTS | self._by_steps() | recommended | dict(self.given)
        evaluates, chosen = str(values["eval_strategy"]), set(self.given)
        if "save_strategy" not in chosen and evaluates != "no":
            values["save_strategy"] = evaluates  # loading the best model requires both to be equal
            if "save_steps" not in chosen and "eval_steps" in chosen:
                values["save_steps"] = values["eval_steps"]
        if "load_best_model_at_end" not in chosen:
            values["load_best_model_at_end"] = evaluates != "no" and values["save_strategy"] in (evaluates, "best")
        return values | {"output_dir": str(self.output_dir), "resume_from_checkpoint": None}

    def _by_steps(self) -> dict[str, Any]:
        """Defaults of a training run on a stream, which has no epochs."""
        if not self.stream.streaming:
            return {}
        every = max(1, round(int(self.given.get("max_steps") or 0) / EVALUATIONS))
        return {f"{what}_{name}": value for what in ("eval", "save", "logging")
                for name, value in (("strategy", "steps"), ("steps", every))}  # fmt: skip


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


Kinds = tuple[type, ...]  # dataclasses whose fields are flags
TRAIN: Kinds = (DataFlags, StreamFlags, MethodFlags, TrainingArguments)


def make_parser(kinds: Kinds = TRAIN) -> argparse.ArgumentParser:
    """A parser for all flags; flags that are not given are None, to distinguish them from defaults."""
    parser = _Parser(list[Any](kinds), add_help=False, allow_abbrev=False)
    for name in _strategy_flags():
        parser.add_argument(f"--{name}")
    parser.add_argument("--config")
    parser.set_defaults(**dict.fromkeys(_plain_flags(kinds)))
    return parser


def _plain_flags(kinds: Kinds) -> list[str]:
    return [f.name for kind in kinds for f in fields(kind) if f.init]


def _strategy_flags() -> list[str]:
    return [f"{name}.{option.name}" for name, config in strategies().items() for option in options(config)]


def read(argv: Sequence[str], kinds: Kinds = TRAIN) -> Request:
    """Parse a request to ``hf-ft train``, or to a command with more flags.

    Raises:
        OptionError: naming the unknown flag, key, strategy or option, or the invalid value.
    """
    values = read_values(argv, kinds)
    method = MethodFlags(**taken(values, MethodFlags))
    chosen = method.strategy or [BASELINE]
    configs = configured(chosen, values | _budget(method.budget, chosen))
    given = taken(values, TrainingArguments)
    data, stream = DataFlags(**taken(values, DataFlags)), StreamFlags(**taken(values, StreamFlags))
    return Request(data, method, configs, given, values, stream)


def _budget(wanted: str | None, chosen: Sequence[str]) -> dict[str, str]:
    """What ``--budget`` sets: the option of that name in the strategies that have one.

    Raises:
        OptionError: if none of them has it.
    """
    if wanted is None:
        return {}
    takers = [name for name in chosen if name in BUDGETED]
    if not takers:
        raise OptionError(
            f"--budget {wanted} has no effect on {', '.join(chosen)}: add --strategy {' or '.join(BUDGETED)}."
        )
    return {f"{name}.{BUDGET}": wanted for name in takers}


def read_values(argv: Sequence[str], kinds: Kinds = TRAIN, command: str = "train") -> dict[str, Any]:
    """Parse the command line and its YAML file, if any; flags take precedence. Returns only values that were given.

    Raises:
        OptionError: naming the unknown flag or key, the invalid value, or the flag without effect.
    """
    parser = make_parser(kinds)
    values, files = _parse(parser, argv, kinds, command)
    file = values.pop("config", None)
    files = [*([file] if file else []), *files]
    if len(files) > 1:
        raise OptionError(f"at most one YAML file can be read, not {', '.join(files)}")
    if files:
        values = _from_yaml(parser, Path(files[0]), values.get("strategy"), kinds, command) | values
    check_flags(values)
    return values


def with_defaults(arguments: Sequence[str], defaults: Mapping[str, str]) -> list[str]:
    """The command line with a flag for each default that it does not set."""
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments if word.startswith("--")}
    return [*(f"--{name}={value}" for name, value in defaults.items() if name not in given), *arguments]


def taken(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The values that are fields of a dataclass."""
    return {f.name: values[f.name] for f in fields(kind) if f.init and f.name in values}


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], kinds: Kinds, command: str
) -> tuple[dict[str, Any], list[str]]:
    """Values by flag, and the remaining arguments."""
    namespace, rest = parser.parse_known_args(list(argv))
    for word in rest:
        if word.startswith("--"):
            _unknown(word.partition("=")[0][2:].replace("-", "_"), "--", kinds, command)
    return {key: value for key, value in vars(namespace).items() if value is not None}, rest


def _from_yaml(
    parser: argparse.ArgumentParser, file: Path, chosen: list[str] | None, kinds: Kinds, command: str
) -> dict[str, Any]:
    """The values of a YAML file, parsed like the corresponding flags.

    Args:
        chosen: strategies from the command line; they replace those of the file together with their options.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read {str(file)!r}: {error.strerror}. Is it a flag without its --?") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{file}: expected keys and values, such as `model: microsoft/resnet-18`")
    words: list[str] = []
    nothing: dict[str, None] = {}  # YAML's null, which flags cannot express
    known = {*_plain_flags(kinds), *_strategy_flags()}
    for key, value in _flat(content).items():
        name = key.partition(".")[0]
        if key not in known:
            _unknown(key, f"{file}: ", kinds, command)
        if chosen is not None and (key == "strategy" or (name in strategies() and name not in chosen)):
            continue
        if value is None and "." not in key:
            nothing[key] = None
        else:
            words += _words(key, value)
    try:
        return _parse(parser, words, kinds, command)[0] | nothing
    except ValueError as error:
        raise OptionError(f"{file}: {error}") from error


def _flat(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Flatten nested options: ``l2_sp: {alpha: 0.1}`` becomes ``l2_sp.alpha: 0.1``; dashes in keys as in flags."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in strategies() and isinstance(value, Mapping):
            flat |= {f"{name}.{option}": v for option, v in value.items()}
        else:
            flat[name] = value
    return flat


def _words(key: str, value: Any) -> list[str]:
    """A key and its value as command-line arguments."""
    if isinstance(value, list) and "." in key:
        return [f"--{key}={','.join(map(str, value))}"]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def _unknown(key: str, where: str, kinds: Kinds, command: str) -> NoReturn:
    """Raise an error that names the unknown flag or key."""
    name, dot, option = key.partition(".")
    if dot:
        own = [o.name for o in options(config_class(name))]  # raises if the strategy is unknown
        hint = did_you_mean(option, own)
        raise OptionError(f"{where}{key}: {name} has no option {option!r}, only {', '.join(own)}.{hint}")
    hint = did_you_mean(key, [*_plain_flags(kinds), *strategies()])
    raise OptionError(f"{where}{key} is unknown.{hint} `hf-ft {command} --help-all` lists all.")


def configured(names: Sequence[str], values: Mapping[str, Any]) -> tuple[FTConfig, ...]:
    """The strategies with their options.

    Raises:
        OptionError: if a name is unknown or repeated, an option belongs to another strategy, or a value is invalid.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptionError(f"--strategy {twice[0]} is given twice.")
    classes = {name: config_class(name) for name in names}
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, text in values.items():
        name, dot, option = key.partition(".")
        if not dot:
            continue
        if name not in chosen:
            raise OptionError(f"--{key} is set, but the strategy {name} is not used: add --strategy {name}.")
        chosen[name][option] = parse(text, annotation(classes[name], option), f"--{key}")
    return tuple(classes[name](**chosen[name]) for name in names)


def read_own(argv: Sequence[str], kind: type, command: str) -> Any:
    """Parse the command line of a command that trains nothing, into the dataclass of its flags.

    Raises:
        OptionError: naming the unknown flag or the invalid value.
    """
    parser = _Parser(list[Any]([kind]), add_help=False, allow_abbrev=False)
    found, rest = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        name = rest[0].partition("=")[0].lstrip("-").replace("-", "_")
        guess = get_close_matches(name, [f.name for f in fields(kind)], n=1) if rest[0].startswith("--") else []
        hint = f" Did you mean --{guess[0]}?" if guess else ""
        raise OptionError(f"{rest[0]} is unknown.{hint} `hf-ft {command} --help` lists all flags.")
    return found
