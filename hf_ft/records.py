"""Dataclasses restored from the JSON that we wrote, checked against their type hints."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from hf_ft.errors import CheckpointError, Error

T = TypeVar("T")
DEEPEST = 100  # deepest nesting that is read: traversing deeper content exceeds Python's recursion limit


def read_json(file: Path) -> Any:
    """The content of a JSON file that we wrote.

    Raises:
        CheckpointError: if it is missing or not JSON; the message names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if _deeper(content, DEEPEST):
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        return content
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing. Restore it, or use another one.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}). Restore it, or use another one.") from error


def restored(kind: type[T], content: Any, what: str, *, null: float | None = None, complete: bool = False) -> T:
    """A dataclass from its JSON content; keys that are not fields are ignored.

    Args:
        what: what the content should be, for the message, such as ``block scores``.
        null: what null means where a float is expected, if it is allowed there.
        complete: whether fields with a default are also required; not for files of versions that lacked them.

    Raises:
        CheckpointError: if a field is missing, of another type, or rejected by the dataclass; the message names it.
    """
    try:
        return _Reader(null, complete).value(kind, content, "")
    except (Error, _OtherShape) as error:
        raise CheckpointError(f"these are not {what}: {str(error).rstrip('.')}. Use another file.") from error


def stored(record: Any) -> Any:
    """A dataclass as content for JSON: like :func:`dataclasses.asdict`, but without copying what cannot change."""
    if dataclasses.is_dataclass(record):
        return {field.name: stored(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {key: stored(value) for key, value in record.items()}
    if isinstance(record, tuple) and set(map(type, record)) <= {int, float, str}:  # thousands of predictions
        return record
    return type(record)(map(stored, record)) if isinstance(record, list | tuple) else record


class _OtherShape(Exception):
    """A value that does not fit its type hint."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Converts values to type hints: objects become dataclasses, and lists tuples."""

    null: float | None
    complete: bool

    def value(self, kind: Any, value: Any, place: str) -> Any:
        origin = typing.get_origin(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            new: Any = kind
            return new(**self.fields(kind, _required(kind), value, place))
        if typing.is_typeddict(kind):
            return {**_object(value, place), **self.fields(kind, kind.__required_keys__, value, place)}
        if origin in (Union, types.UnionType):
            return self.one_of(typing.get_args(kind), value, place)
        if origin is tuple:
            return self.tuple(typing.get_args(kind), value, place)
        if origin is not None and origin is not Literal:  # a mapping
            inner = typing.get_args(kind)[1]
            return {key: self.value(inner, item, f"{place}[{key!r}]") for key, item in _object(value, place).items()}
        if kind is float and value is None and self.null is not None:
            return self.null
        if not _fits(kind, value):
            raise _OtherShape(f"{place or 'the whole'} is {_shown(value)}")
        return value

    def fields(self, kind: Any, required: Collection[str], value: Any, place: str) -> dict[str, Any]:
        content, hints = _object(value, place), _hints(kind)
        prefix = f"{place}." if place else ""
        for name in hints:
            if name not in content and (self.complete or name in required):
                raise _OtherShape(f"{prefix + name!r} is missing")
        return {name: self.value(hints[name], content[name], f"{prefix}{name}") for name in hints if name in content}

    def one_of(self, kinds: tuple[Any, ...], value: Any, place: str) -> Any:
        reason = _OtherShape()
        for kind in reversed(kinds):  # None, usually last, gives the least informative message about another value
            try:
                return self.value(kind, value, place)
            except _OtherShape as error:
                reason = error
        raise reason

    def tuple(self, kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _OtherShape(f"{place or 'the whole'} is {_shown(value)}, not a list")
        kind = kinds[0]
        if kind in (int, float, str) and set(map(type, value)) <= {kind}:  # predictions are thousands of numbers
            return tuple(value)
        return tuple(self.value(kind, item, f"{place}[{index}]") for index, item in enumerate(value))


def _required(kind: Any) -> set[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing}


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _OtherShape(f"{place or 'the whole'} is {_shown(value)}, not an object")
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
    hints = typing.get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if fields is None or name in fields}


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 50 else f"{text[:40]}... ({type(value).__name__})"


def _deeper(content: Any, depth: int) -> bool:
    """Whether content is nested more than this many levels deep."""
    level = [content]
    for _ in range(depth):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
