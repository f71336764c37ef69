"""Options of a strategy: a single declaration feeds validation, ``--help``, ``hf-ft describe`` and the docs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from peft import PeftConfig

from hf_ft.errors import OptionError

UNKNOWN = object()


def option(
    default: Any,
    help: str,
    *,
    range: str | None = None,
    source: str = "ours",
    formerly: Any = UNKNOWN,
    local: bool = False,
) -> Any:
    """Declare one option of a config.

    Args:
        default: default value.
        help: one sentence, shown in ``--help``, in ``hf-ft describe`` and in the docs.
        range: an interval such as ``"[0, 1)"`` or ``"(0, inf)"``, for numbers.
        source: origin of the default: ``code`` (the authors' code), ``paper``, or ``ours``.
        formerly: for an option added later, the value that corresponds to the earlier behaviour; see
            :meth:`FTConfig.identity`.
        local: whether it only says where something is on this machine; it is not saved, and not read from a file.
    """
    metadata = {"help": help, "range": range, "source": source, "formerly": formerly, "local": local}
    return dataclasses.field(default=default, metadata=metadata)


def options(config_class: type) -> list[dataclasses.Field]:
    """All options of a config class; those that the class itself declares come first."""
    fields = [f for f in dataclasses.fields(config_class) if "help" in f.metadata]
    own = getattr(config_class, "__annotations__", {})
    return sorted(fields, key=lambda f: f.name not in own)


def local_options(config_class: type) -> frozenset[str]:
    """Names of the options that only say where something is on this machine."""
    return frozenset(f.name for f in options(config_class) if f.metadata["local"])


def annotation(config_class: type, name: str) -> Any:
    """The type of an option, with string annotations resolved."""
    return _annotations(config_class)[name]


@functools.cache
def _annotations(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def in_range(value: float, interval: str) -> bool:
    low, high = (float(x) for x in interval.strip()[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def validate(config: Any) -> None:
    """Check every option of a config against its type and its range.

    Raises:
        OptionError: if one is invalid; the message names the field, the value and the allowed values.
    """
    for field in options(type(config)):
        value, kind = getattr(config, field.name), annotation(type(config), field.name)
        name = f"{type(config).__name__}.{field.name}"
        if not _fits(value, kind):
            raise OptionError(f"{name}={value!r} is not {describe_type(kind)}. Default: {field.default!r}.")
        interval = field.metadata["range"]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if interval and is_number and not (math.isfinite(value) and in_range(value, interval)):
            raise OptionError(f"{name}={value!r} lies outside {interval}. Default: {field.default!r}.")


def describe_type(kind: Any) -> str:
    """A type in readable form: ``float or None``, ``"auto" or "keep"``."""
    if kind is type(None):
        return "None"
    if _is_union(kind):
        return " or ".join(describe_type(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {describe_type(typing.get_args(kind)[0])}"
    return "a dictionary" if kind is dict else getattr(kind, "__name__", str(kind))


def parse(text: str, kind: Any, name: str) -> Any:
    """Parse a command-line value of the given type.

    Raises:
        OptionError: if it is invalid; the message names the option, the text and the allowed values.
    """
    # "none" is also a string, and a list of one: types that accept any text are tried last.
    takes_any = {str: 2}
    candidates = [kind]
    if _is_union(kind):
        candidates = sorted(typing.get_args(kind), key=lambda k: takes_any.get(k, int(typing.get_origin(k) is tuple)))
    for candidate in candidates:
        try:
            return _parse_one(text, candidate)
        except (ValueError, KeyError, StopIteration):
            continue
    raise OptionError(f"{name}={text!r} is not {describe_type(kind)}.")


def to_json(value: Any) -> Any:
    """Convert an option's value to JSON."""
    if isinstance(value, PeftConfig):
        return tuner_to_json(value)
    return list(value) if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """Inverse of :func:`to_json`."""
    if isinstance(value, dict) and "peft_type" in value:
        return tuner_from_json(value)
    return tuple(value) if isinstance(value, list) else value


def describe_value(value: Any) -> str:
    """Format an option's value as in source code; for a PEFT config, only fields that differ from their default."""
    if not isinstance(value, PeftConfig):
        return str(value)
    usual = type(value)().to_dict()
    changes = {key: v for key, v in value.to_dict().items() if v != usual[key] and key != "base_model_name_or_path"}
    return f"{type(value).__name__}({', '.join(f'{key}={v!r}' for key, v in changes.items())})"


def tuner_to_json(tuner: PeftConfig) -> dict[str, Any]:
    """Convert a PEFT config to JSON: sets become sorted lists, and None values are omitted."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))

    content = {key: value for key, value in tuner.to_dict().items() if value is not None}
    return json.loads(json.dumps(content, default=plain))


def tuner_from_json(content: Mapping[str, Any]) -> PeftConfig:
    """Inverse of :func:`tuner_to_json`.

    Raises:
        OptionError: if ``peft_type`` is missing or unknown, or if PEFT rejects a value.
    """
    try:
        return PeftConfig.from_peft_type(**content)
    except (TypeError, KeyError, ValueError) as error:
        raise OptionError(
            f"tuner={dict(content)!r} is not a PEFT config ({error}): give its fields with 'peft_type', such as "
            '{"peft_type": "LORA", "r": 8}.'
        ) from error


def _parse_one(text: str, kind: Any) -> Any:
    if kind is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError(text)
    if kind is PeftConfig:
        return tuner_from_json(json.loads(text))
    if kind is dict:
        return _dictionary(text)
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if typing.get_origin(kind) is Literal:
        return next(v for v in typing.get_args(kind) if str(v) == text)
    if typing.get_origin(kind) is tuple:
        return tuple(_parse_one(part, typing.get_args(kind)[0]) for part in text.split(","))
    return kind(text)


def _dictionary(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(text)
    return content


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _fits(value: Any, kind: Any) -> bool:
    if _is_union(kind):
        return any(_fits(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind) and not isinstance(value, bool)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
