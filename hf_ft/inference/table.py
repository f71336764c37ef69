"""Predictions as rows of csv or as lines of JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_ft.data.inputs import Wanted
from hf_ft.errors import OptionError
from hf_ft.inference.predictor import Prediction

Format = Literal["csv", "jsonl"]
SAMPLE, ERROR, TRUE = ("file", "row"), "error", "true_label"
SEVERAL = ["labels", "probabilities"]
JOIN = ";"  # between the labels of a sample in csv


@dataclass(frozen=True)
class Layout:
    """How predictions are written.

    Attributes:
        top_k: number of classes to report.
        threshold: probability above which one of several labels is reported.
        labelled: whether labels are known, at least for some samples.
    """

    wanted: Wanted
    format: Format = "csv"
    top_k: int = 1
    threshold: float = 0.5
    labelled: bool = False

    def __post_init__(self) -> None:
        classes = len(self.wanted.names)
        single = self.wanted.problem_type == "single_label_classification"
        if self.top_k != 1 and not single:
            raise OptionError(
                f"top_k={self.top_k} has no effect: the model does not choose one class. Leave it out.",
                arguments=("top_k",),
            )
        if not 1 <= self.top_k <= classes:
            raise OptionError(
                f"top_k={self.top_k}: the model has {classes} classes, so set it between 1 and {classes}.",
                arguments=("top_k",),
            )
        if not 0 < self.threshold < 1:
            raise OptionError(f"threshold={self.threshold}: set it between 0 and 1.", arguments=("threshold",))

    def lines(self, predictions: Iterable[Prediction]) -> Iterator[str]:
        """The text of each line, with its end; the first of csv names the columns."""
        names: list[str] = []
        sample = ""
        for prediction in predictions:
            if not sample:
                sample = "row" if prediction.file is None else "file"
                names = [sample, *self._columns(), *([TRUE] if self.labelled else []), ERROR]
                if self.format == "csv":
                    yield _csv(names)
            values: dict[str, Any] = {sample: prediction.row if sample == "row" else prediction.file or prediction.row}
            values |= self._answer(prediction.outputs) if prediction.outputs is not None else {}
            values |= {TRUE: self._true(prediction.label)} if prediction.label is not None else {}
            values |= {ERROR: prediction.error} if prediction.error else {}
            yield _csv([_cell(values.get(name)) for name in names]) if self.format == "csv" else _json(values)

    def _columns(self) -> list[str]:
        kind = self.wanted.problem_type
        if kind == "multi_label_classification":
            return SEVERAL
        if kind == "regression":
            return _value_names(len(self.wanted.names))
        return [name for place in range(1, self.top_k + 1) for name in _pair(place)]

    def _answer(self, outputs: np.ndarray) -> dict[str, Any]:
        names, kind = self.wanted.names, self.wanted.problem_type
        if kind == "regression":
            return dict(zip(_value_names(len(outputs)), map(_rounded, outputs), strict=True))
        order = np.argsort(-outputs, kind="stable")
        if kind == "multi_label_classification":
            chosen = [number for number in order if outputs[number] > self.threshold]
            return {"labels": [names[n] for n in chosen], "probabilities": [_rounded(outputs[n]) for n in chosen]}
        answer: dict[str, Any] = {}
        for place, number in enumerate(order[: self.top_k], 1):
            answer |= zip(_pair(place), (names[number], _rounded(outputs[number])), strict=True)
        return answer

    def _true(self, label: Any) -> Any:
        kind = self.wanted.problem_type
        if kind == "single_label_classification":
            return self.wanted.names[label]
        if kind == "multi_label_classification":
            return [name for name, there in zip(self.wanted.names, label, strict=True) if there]
        return label


def _pair(place: int) -> tuple[str, str]:
    """The columns of the class at a place, from 1."""
    return ("label", "probability") if place == 1 else (f"label_{place}", f"probability_{place}")


def _value_names(count: int) -> list[str]:
    return ["value"] if count == 1 else [f"value_{number}" for number in range(1, count + 1)]


def _rounded(value: Any) -> float:
    return float(f"{value:.6g}")


def _cell(value: Any) -> Any:
    return JOIN.join(map(str, value)) if isinstance(value, list) else value


def _csv(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def is_ours(file: Path) -> bool:
    """Whether a file begins as :meth:`Layout.lines` would, so that it may be replaced."""
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            first = opened.readline()
    except (OSError, UnicodeDecodeError):
        return False
    if not first:
        return True
    if first.startswith("{"):
        try:
            return _as_written(list(json.loads(first)))
        except ValueError:
            return False
    keys = next(csv.reader([first]), [])
    return keys[-1:] == [ERROR] and _as_written(keys)


def _as_written(names: list[str]) -> bool:
    """Whether these are the names of :meth:`Layout.lines`, in order: those of a table of the user may be similar."""
    sample, answer = names[:1], names[1:]
    failed = answer[-1:] == [ERROR]
    answer = answer[:-1] if failed else answer
    answer = answer[:-1] if answer[-1:] == [TRUE] else answer
    classes = [name for place in range(1, len(answer) // 2 + 1) for name in _pair(place)]
    known = answer in (classes, SEVERAL, _value_names(len(answer))) if answer else failed
    return sample in ([SAMPLE[0]], [SAMPLE[1]]) and known
