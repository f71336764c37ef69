"""Scores of a trained classifier on labelled data, and the page that shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_ft.data.inputs import Reading, read_inputs
from hf_ft.documents.confusion import Confusion
from hf_ft.documents.document import Document, Section, Table, Text
from hf_ft.documents.files import write_whole
from hf_ft.documents.html import html
from hf_ft.documents.markdown import markdown
from hf_ft.documents.public import shareable_name, shareable_text
from hf_ft.documents.text import code, metric_name, score
from hf_ft.errors import DataError, OptionError
from hf_ft.inference.calibration import Bin, Calibration
from hf_ft.inference.calibration_page import calibration_section
from hf_ft.inference.checkpoint import Trained, weights_digest
from hf_ft.inference.predictor import Options, Source, logits, predictions, sources_of, trained_of
from hf_ft.inference.scores import Scorer
from hf_ft.metrics import Scores
from hf_ft.records import stored

NAME = "evaluation"
FILES = tuple(f"{NAME}{suffix}" for suffix in (".json", ".html", ".md"))
COMMAND = "hf-ft evaluate"
_ABOUT = ("Evaluation of a classifier", COMMAND, f"{NAME}.json", f"{NAME}.md")
LISTED = 100  # unreadable samples on the page


@dataclass(frozen=True)
class Evaluation:
    """Scores on labelled data.

    Attributes:
        model: Hub id, or the last part of the folder.
        data: name of the data.
        scores: by metric.
        rows: number of samples that were scored.
        unreadable: row or file, and the reason, of each sample that could not be read.
        confusion: true and predicted classes; None unless there is one class per sample.
        bins: accuracy by confidence, likewise.
        calibration: that of the checkpoint, if it was used.
        options: batch size and so on.
    """

    model: str
    data: str
    scores: Scores
    rows: int
    unreadable: tuple[tuple[str, str], ...] = ()
    confusion: Confusion | None = None
    bins: tuple[Bin, ...] = ()
    calibration: Calibration | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without local folders."""
        confusion = None
        if self.confusion is not None:
            confusion = {
                "classes": list(self.confusion.classes),
                "counts": [list(row) for row in self.confusion.counts],
            }
        unreadable = [
            {"sample": "/".join(Path(name).parts[-2:]), "error": shareable_text(why)} for name, why in self.unreadable
        ]
        return {
            "model": self.model,
            "data": self.data,
            "rows": self.rows,
            "scores": dict(self.scores),
            "options": dict(self.options),
            "unreadable": unreadable,
            "confusion": confusion,
            "reliability": stored(self.bins),
            "calibration": stored(self.calibration),
        }

    def document(self) -> Document:
        """The page."""
        rows = tuple((metric_name(name), score(value)) for name, value in self.scores.items())
        told = [Text(f"{code(self.model)} on {code(self.data)}: {self.rows:,} samples{_unread(len(self.unreadable))}.")]
        told += [Text("Each image was predicted as it is and mirrored.")] if self.options.get("tta") else []
        sections = [Section("scores", "Scores", (*told, Table("Scores", ("metric", "value"), rows)))]
        if self.confusion is not None:
            sections.append(
                Section("errors", "Errors", (Text(_capital(self.confusion.summary())), *self.confusion.tables()))
            )
        if self.bins:
            sections.append(calibration_section(self.bins, self.scores["ece"], self.calibration))
        if self.unreadable:
            sections.append(_unreadable(self.unreadable))
        return Document(
            f"{self.model} on {self.data}", f"Evaluation on {self.rows:,} samples", tuple(sections), *_ABOUT
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``evaluation.json``, ``evaluation.html`` and ``evaluation.md``; returns their paths."""
        page = self.document()
        texts = (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", html(page), markdown(page))
        Path(folder).mkdir(parents=True, exist_ok=True)
        written = [Path(folder) / name for name in FILES]
        for file, text in zip(written, texts, strict=True):
            write_whole(file, text)
        return written


def is_ours(file: Path) -> bool:
    """Whether :meth:`Evaluation.save` wrote this one of its files, so that it may be replaced."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            return {"model", "data", "rows", "scores", "confusion"} <= set(json.loads(text))
    except (OSError, TypeError, ValueError):
        return False
    if file.suffix == ".html":
        return f"Made by <code>{COMMAND}</code>" in text
    return re.match(r"# .*\n\nEvaluation on [\d,]+ samples\.\n", text) is not None


def evaluate(
    model: Any,
    data: Source,
    *,
    processor: Any = None,
    reading: Reading | None = None,
    revision: str | None = None,
    threshold: float = 0.5,
    **options: Any,
) -> Evaluation:
    """Score a trained classifier on labelled data, as a Trainer's evaluation would.

    Classes are matched by name with those of the model. Damaged samples are listed and not scored.

    Args:
        model: Hub id or folder of a checkpoint, or a model.
        data: as for :func:`~hf_ft.inference.predict`; a folder of files has a folder for each class.
        threshold: probability above which one of several labels is predicted.
        options: like ``processor``, ``reading`` and ``revision``, as for :func:`~hf_ft.inference.predict`.

    Raises:
        DataError: if labels are missing, or a class is unknown to the model.
        OptionError: as for :func:`~hf_ft.inference.predict`.
        CheckpointError: likewise.
    """
    trained = trained_of(model, processor, revision)
    inputs = read_inputs(sources_of(data), trained.wanted, reading, labelled=True)
    settings = Options(**options)
    scorer = Scorer(trained.wanted, threshold)
    for _ in scorer.watch(predictions(trained, inputs, settings)):
        pass
    return evaluation(trained, scorer, data_name(data), settings)


def evaluation(trained: Trained, scorer: Scorer, data: str, options: Options) -> Evaluation:
    """The results that a scorer collected.

    Raises:
        DataError: if no sample could be scored.
    """
    if not scorer.scored:
        why = f"; the first: {scorer.unreadable[0][1]}" if scorer.unreadable else ""
        raise DataError(f"none of the {scorer.rows:,} samples could be read{why}.")
    return Evaluation(
        model=shareable_name(trained.name) if trained.name else type(trained.model).__name__,
        data=data,
        scores=scorer.scores(),
        rows=scorer.scored,
        unreadable=tuple(scorer.unreadable),
        confusion=scorer.confusion(data),
        bins=tuple(scorer.bins()),
        calibration=trained.calibration if options.calibrated else None,
        options={"batch_size": options.batch_size, "tta": options.tta},
    )


def calibrate(
    trained: Trained, data: Source, reading: Reading | None = None, options: Options | None = None
) -> Trained:
    """The classifier with a temperature that is fitted on labelled data; keep it with ``calibration.save(folder)``.

    Args:
        data: samples that it was not trained on, such as validation data.

    Raises:
        OptionError: if it does not choose one class per sample.
        DataError: as for :func:`evaluate`.
    """
    if trained.wanted.problem_type != "single_label_classification":
        raise OptionError("a temperature is for models that choose one class per sample: do not calibrate it.")
    inputs = read_inputs(sources_of(data), trained.wanted, reading, labelled=True)
    found = list(logits(trained, inputs, replace(options or Options(), tta=False)))
    known = inputs.labels or []
    labels = torch.tensor([known[row] for row, _ in found])
    if not found:
        raise DataError(f"none of the {len(known):,} samples to calibrate on could be read.")
    outputs = torch.stack([one for _, one in found])
    weights = weights_digest(trained.model)
    return replace(trained, calibration=Calibration.fitted(outputs, labels, data_name(data), weights))


def data_name(data: Source) -> str:
    """A name to show."""
    if isinstance(data, Dataset):
        return "data"
    return ", ".join(shareable_name(str(source)) for source in sources_of(data))


def _unread(number: int) -> str:
    return f"; {number:,} more could not be read" if number else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _unreadable(samples: tuple[tuple[str, str], ...]) -> Section:
    rows = tuple(("/".join(Path(name).parts[-2:]), shareable_text(why)) for name, why in samples[:LISTED])
    more = f", the first {LISTED}" if len(samples) > LISTED else ""
    table = Table(f"Samples that could not be read{more}", ("sample", "reason"), rows, folded=len(rows) > 10)
    return Section("unreadable", "Samples that could not be read", (table,))
