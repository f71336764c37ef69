"""Models and data prepared for the contenders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from torch import nn

from hf_ft.data.columns import Columns
from hf_ft.data.in_memory import Held, held
from hf_ft.data.prepare import _collator, prepare, usual_length
from hf_ft.data.rows import read_rows
from hf_ft.engine.checkpoint import digests
from hf_ft.models.source_head import drop_source_head
from hf_ft.zoo.models import load_model
from hf_ft.zoo.sources import has_head, load_sources

LOOKED_AT = 64  # number of samples hashed to identify a data set that is not held in memory
Loader = Callable[[int, bool], tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Data:
    """The data of a comparison, before processing.

    Attributes:
        splits: ``train``, ``validation``, and optionally ``test`` and ``ood`` (out of distribution, same classes).
        columns: the columns to read.
        name: display name.
        augment: augmentation of training images, from ``hf_ft.data.AUGMENTATIONS``.
        max_length: maximum text length, in tokens.
        source: source data, for strategies that use them.
        source_columns: the columns to read from the source data.
        skipped: number of unreadable rows by split.
        notices: licences and sources, for the report.
        notes: remarks for the report, such as which splits were carved.
    """

    splits: DatasetDict
    columns: Columns
    name: str = "data"
    augment: str = "none"
    max_length: int | None = None
    source: Dataset | None = None
    source_columns: Columns | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Benches:
    """Prepared models and data, one bench for each set of source models.

    Args:
        model: as in :func:`compare`.
        data: the data.
        image_size, revision: settings of the model.
    """

    def __init__(self, model: str | Loader, data: Data, image_size: int | None, revision: str | None) -> None:
        self.model, self.data, self.image_size, self.revision = model, data, image_size, revision
        self._made: dict[tuple[str, ...], Bench] = {}

    def get(self, sources: tuple[str, ...]) -> Bench:
        if sources not in self._made:
            self._made[sources] = self._make(sources)
        return self._made[sources]

    def _make(self, sources: tuple[str, ...]) -> Bench:
        data, load = self.data, self._loader(sources)
        model, processor = load(0, False)
        length = data.max_length or usual_length(model, processor)
        ready = _ready(data.splits, processor, data.columns, data.augment, length)
        source, plain = None, None
        if data.augment != "none":
            train = DatasetDict({"train": data.splits["train"]})
            plain = _ready(train, processor, data.columns, "none", length)["train"]
        if data.source is not None and data.source_columns is not None:
            rows = DatasetDict({"train": data.source})
            source = _ready(rows, processor, data.source_columns, data.augment, length)["train"]
        same_each_time = {**ready, "train": ready["train"] if plain is None else plain}
        seen = [(name, digest(split)) for name, split in same_each_time.items()]
        seen.append(("source", "" if source is None or data.augment != "none" else digest(source)))
        weights = sorted(digests(model).items())
        return Bench(
            lambda seed, keep: load(seed, keep)[0],
            ready,
            _collator(processor, data.columns.task),
            hashlib.sha256(repr([seen, weights, data.augment]).encode()).hexdigest()[:16],
            processor,
            source,
            plain,
        )

    def _loader(self, sources: tuple[str, ...]) -> Loader:
        columns = self.data.columns
        labels: dict[str, Any] = {"id2label": columns.id2label} if columns.names else {"num_labels": 1}

        def load(seed: int, keep: bool) -> tuple[nn.Module, Any]:
            if sources:
                made: tuple[Any, Any] = load_sources(
                    sources, **labels, image_size=self.image_size, seed=seed, task=columns.task, revision=self.revision
                )
            elif isinstance(self.model, str):
                # All contenders start from the same new head, including those that also keep the pretrained one: if the
                # checkpoint has a head, it is always kept at first.
                made = load_model(
                    self.model,
                    **labels,
                    image_size=self.image_size,
                    seed=seed,
                    task=columns.task,
                    revision=self.revision,
                    keep_source_head=keep or has_head(self.model, None, self.revision),
                )
                made = made if keep else (drop_source_head(made[0]), made[1])
            else:
                made = self.model(seed, keep)
            config: Any = made[0].config
            config.problem_type = columns.problem_type
            return made

        return load


def _ready(
    splits: DatasetDict, processor: Any, columns: Columns, augment: str, max_length: int | None
) -> dict[str, Any]:
    """Splits as read by the trainer; samples that do not change between reads are read once and kept."""
    prepared = prepare(splits, processor, columns, augment, max_length)
    return {
        name: split if columns.task == "image" and augment != "none" and name == "train" else held(split)
        for name, split in prepared.items()
    }


def digest(data: Any) -> str:
    """A fingerprint of a data set: of all samples if they are held in memory, otherwise of some spread over it."""
    count = len(data) if isinstance(data, Held) else min(LOOKED_AT, len(data))
    rows = np.unique(np.linspace(0, len(data) - 1, count).round().astype(int)).tolist()
    found = hashlib.sha256(str(len(data)).encode())
    for start in range(0, len(rows), LOOKED_AT):
        for row in read_rows(data, rows[start : start + LOOKED_AT]):
            for name, value in sorted(row.items()):
                found.update(name.encode() + np.asarray(value).tobytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Bench:
    """The model and data that a contender trains with.

    Attributes:
        load: creates a model from the seed of the new head and whether to keep the pretrained head.
        data: ``train``, ``validation``, and optionally ``test`` and ``ood``: map-style, processed.
        collate: the collator.
        fingerprint: identifies models and data.
        processor: saved with the model.
        source: source data, if any.
        plain: the training samples without augmentation, if ``train`` is augmented.
    """

    load: Callable[[int, bool], nn.Module]
    data: Mapping[str, Any]
    collate: Callable[[list[Any]], Any]
    fingerprint: str = ""
    processor: Any = None
    source: Any = None
    plain: Any = None
