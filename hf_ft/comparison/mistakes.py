"""The winner's most and least confident mistakes, from the logits that were kept."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError

from hf_ft.comparison.outputs import Outputs
from hf_ft.comparison.results import Mistake, Mistakes
from hf_ft.comparison.runner import Runner
from hf_ft.comparison.settings import Settings
from hf_ft.data.columns import ROW, Columns
from hf_ft.data.images import open_rgb
from hf_ft.data.media import MEDIA
from hf_ft.data.task import Data
from hf_ft.errors import DataError, OptionError

SPLIT = "test"
MOST = 20  # mistakes in each list
SIDE = 64  # pixels of a thumbnail
LETTERS = 100  # shown from the beginning of a text


def check_thumbnails(settings: Settings, columns: Columns) -> None:
    """Reject thumbnails of data that cannot be shown as a picture or text.

    Raises:
        OptionError: if the data are sounds, or there is no single class per sample.
    """
    if not settings.thumbnails:
        return
    if columns.task == "audio":
        raise OptionError("thumbnails=True: these data are sounds, which have no thumbnails. Leave it out.")
    if columns.problem_type != "single_label_classification":
        raise OptionError(
            "thumbnails=True: they belong to the list of mistakes, which requires one class per sample. Leave it out."
        )


def find_mistakes(runner: Runner, data: Data) -> Mistakes | None:
    """The mistakes of the winner's saved run on test; None without a winner, its logits, or one class per sample."""
    found = runner.ledger.winner()
    if found is None or not found[1].logits:
        return None
    run = found[1]
    try:
        outputs = Outputs.load(runner.folder / run.logits)
    except (OSError, SafetensorError, KeyError):  # deleted or damaged: the report is complete without them
        return None
    if not outputs.single(SPLIT):
        return None
    logits, labels = outputs.tensors(SPLIT)
    probabilities, predicted = (logits / (run.temperature or 1.0)).softmax(1).max(1)
    wrong = np.flatnonzero((predicted != labels).numpy())
    order = wrong[np.argsort(-probabilities.numpy()[wrong], kind="stable")]
    surest = order[:MOST]
    least = order[MOST:][::-1][:MOST]

    def listed(rows: np.ndarray) -> tuple[Mistake, ...]:
        names, shown = samples(data.splits[SPLIT], data.columns, rows.tolist(), labels.tolist(), runner.settings)
        values = zip(rows.tolist(), names, shown, strict=True)
        return tuple(Mistake(n, int(labels[r]), int(predicted[r]), float(probabilities[r]), s) for r, n, s in values)

    return Mistakes(SPLIT, len(wrong), run.temperature is not None, listed(surest), listed(least))


def samples(
    split: Dataset, columns: Columns, rows: Sequence[int], labels: Sequence[int], settings: Settings
) -> tuple[list[str], list[str]]:
    """Names of samples, and what is shown for them."""
    chosen = split.with_format(None).select(rows)
    media = next((one for one in MEDIA if one.task == columns.task), None)
    numbers = chosen[ROW][:] if ROW in chosen.column_names else list(rows)
    if media is None:
        names = [f"row {number}" for number in numbers]
        texts = [" | ".join(map(str, parts)) for parts in zip(*(chosen[c][:] for c in columns.inputs), strict=True)]
        return names, [text[:LETTERS] if settings.thumbnails else "" for text in texts]
    values = chosen.cast_column(columns.inputs[0], media.unopened)[columns.inputs[0]][:]
    classes = [columns.names[labels[row]] if columns.names else "" for row in rows]
    names = [_name(*one) for one in zip(values, numbers, classes, strict=True)]
    return names, [thumbnail(v, n) if settings.thumbnails else "" for v, n in zip(values, numbers, strict=True)]


def _name(value: Any, number: int, true: str) -> str:
    """The name of a file, with its folder if that is its class: other folders may reveal where it was stored."""
    path = value.get("path") if isinstance(value, dict) else None
    if not path:
        return f"row {number}"
    file = Path(path)
    return f"{file.parent.name}/{file.name}" if file.parent.name == true else file.name


def thumbnail(value: Any, row: int) -> str:
    """A small JPEG of an image as a data URI; empty if it can no longer be read.

    Args:
        value: the unopened image.
        row: its row, for messages.
    """
    try:
        image = open_rgb(value, row, SIDE)
    except DataError:
        return ""
    image.thumbnail((SIDE, SIDE))
    written = BytesIO()
    image.save(written, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"
