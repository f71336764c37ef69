"""Batches of samples for a trained model: damaged ones are skipped and reported, and padding changes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_ft.data.columns import ROW
from hf_ft.data.inputs import Inputs
from hf_ft.data.prepare import collate, image_transform, text_transform, usual_length
from hf_ft.data.sounds import SECONDS, sound_transform
from hf_ft.errors import OptionError
from hf_ft.inference.checkpoint import Trained

Row = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Some consecutive samples.

    Attributes:
        rows: their numbers.
        files: their paths, if they are files.
        views: for the samples as they are, and mirrored if requested: batches for the model with the numbers of their
            samples.
        errors: why a sample cannot be read, by its number.
    """

    rows: tuple[int, ...]
    files: tuple[str | None, ...]
    views: tuple[tuple[tuple[tuple[int, ...], Mapping[str, Any]], ...], ...]
    errors: Mapping[int, str]


class Batches(torch.utils.data.Dataset[Batch]):
    """All samples of some inputs, read and processed batch by batch.

    Args:
        mirrored: whether images are also read mirrored.
        max_length: maximum text length in tokens; by default that of the model, at most 512.
        seconds: length to which sounds are cut.

    Attributes:
        rows: the samples as they are stored.
        input: the column of their files or texts.

    Raises:
        OptionError: if the batch size is less than 1, or something other than images would be mirrored.
    """

    def __init__(
        self,
        trained: Trained,
        inputs: Inputs,
        batch_size: int,
        mirrored: bool = False,
        max_length: int | None = None,
        seconds: float = SECONDS,
    ) -> None:
        task, columns, processor = trained.wanted.task, inputs.columns, trained.processor
        if batch_size < 1:
            raise OptionError(f"batch_size={batch_size}: set it to at least 1.")
        if mirrored and task != "image":
            raise OptionError(f"tta mirrors images, but these data are {task}: leave it out.")
        self.rows, self.batch_size, self.input = inputs.rows, batch_size, columns.inputs[0]
        self.max_length = max_length or usual_length(trained.model, processor)
        self.seconds = seconds
        self._views: list[Callable[[dict[str, Any]], dict[str, Any]]]
        if task == "image":
            self._views = [image_transform(processor, columns, mirrored=way) for way in (False, True)[: 1 + mirrored]]
        elif task == "audio":
            self._views = [sound_transform(processor, columns, seconds)]
        else:
            self._views = [text_transform(processor, columns, self.max_length)]
        self._collate = collate(processor)
        self._names = accepted_names(trained.model)
        # A model that sees which tokens are padding ignores them. Padding of sounds is normalised with the samples.
        self._pads = task == "text" and "attention_mask" in self._names

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch_size
        batch = dict(self.rows[first : first + self.batch_size])
        numbers = tuple(range(first, first + len(next(iter(batch.values())))))
        readable, errors = numbers, dict[int, str]()
        try:
            views = self._processed(batch, numbers)
        except ValueError:  # from one of them: reading them one by one shows which
            views, readable, errors = self._one_by_one(batch, numbers)
        files = tuple(map(_file, batch[self.input]))
        return Batch(numbers, files, tuple(self._batches(readable, rows) for rows in views), errors)

    def alone(self, row: int) -> list[Mapping[str, Any]]:
        """One sample as a batch for the model, for each view; empty if it cannot be read."""
        batch = self.rows[row : row + 1]
        try:
            views = self._processed(batch, [row])
        except ValueError:
            return []
        return [dict(self._collate(view)) for view in views]

    def _processed(self, batch: Mapping[str, list[Any]], numbers: Sequence[int]) -> list[list[Row]]:
        """The samples of each view."""
        views = [dict(view({**batch, ROW: list(numbers)})) for view in self._views]
        views = [{name: column for name, column in view.items() if name in self._names} for view in views]
        places = range(len(numbers))
        return [[{name: column[place] for name, column in view.items()} for place in places] for view in views]

    def _one_by_one(
        self, batch: Mapping[str, list[Any]], numbers: Sequence[int]
    ) -> tuple[list[list[Row]], tuple[int, ...], dict[int, str]]:
        views: list[list[Row]] = [[] for _ in self._views]
        readable, errors = [], {}
        for place, number in enumerate(numbers):
            try:
                found = self._processed({name: values[place : place + 1] for name, values in batch.items()}, [number])
            except ValueError as error:
                errors[number] = " ".join(str(error).split())
            else:
                readable.append(number)
                for view, rows in zip(views, found, strict=True):
                    view += rows
        return views, tuple(readable), errors

    def _batches(
        self, numbers: Sequence[int], rows: Sequence[Row]
    ) -> tuple[tuple[tuple[int, ...], Mapping[str, Any]], ...]:
        """One batch if padding changes no prediction, otherwise one for each shape."""
        groups: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(() if self._pads else _shapes(row), []).append(place)
        return tuple(
            (tuple(numbers[place] for place in places), dict(self._collate([rows[place] for place in places])))
            for places in groups.values()
        )


def accepted_names(model: Any) -> set[str]:
    """The names of the tensors that a model's forward takes; a tokenizer may return more."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {*inspect.signature(plain.forward).parameters, *getattr(plain, "input_names", ())} - {"labels"}


def _shapes(row: Row) -> Any:
    return tuple((name, getattr(value, "shape", None) or len(value)) for name, value in sorted(row.items()))


def _file(value: Any) -> str | None:
    """The path of an unopened file; None for texts, and for what is within the data."""
    return value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
