"""Models and data prepared for the contenders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn
from transformers.utils import logging

from hf_ft.comparison.folds import Folds
from hf_ft.core.context import Samples
from hf_ft.core.head_rate import HeadFit, fit_head
from hf_ft.data.classifier import load_classifier, load_ensemble
from hf_ft.data.in_memory import Held
from hf_ft.data.info import DataInfo
from hf_ft.data.rows import read_rows
from hf_ft.data.task import Data, process
from hf_ft.engine.checkpoint import digests
from hf_ft.errors import AnatomyError, OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.source_head import drop_source_head
from hf_ft.zoo.sources import has_head

logger = logging.get_logger(__name__)
LOOKED_AT = 64  # number of samples hashed to identify a data set that is not held in memory
Loader = Callable[[int, bool], tuple[nn.Module, Any]]


class Benches:
    """Prepared models and data, one bench for each set of source models.

    Args:
        model: as in :func:`compare`.
        data: the data.
        image_size, revision: settings of the model.
        folds: how the labelled samples are divided, if parts of them take turns as validation.
    """

    def __init__(
        self,
        model: str | Loader,
        data: Data,
        image_size: int | None,
        revision: str | None,
        folds: Folds | None = None,
    ) -> None:
        self.model, self.data, self.image_size, self.revision = model, data, image_size, revision
        self.folds = folds
        self._made: dict[tuple[str, ...], Bench] = {}
        self._fits: dict[tuple[str, str | None], HeadFit | None] = {}

    def get(self, sources: tuple[str, ...]) -> Bench:
        if sources not in self._made:
            self._made[sources] = self._make(sources)
        return self._made[sources]

    def _make(self, sources: tuple[str, ...]) -> Bench:
        model, processor = self._load(sources, 0, False)
        whole = self.data if self.folds is None else self.folds.pooled(self.data)
        data = process(whole, model, processor, in_memory=True)
        folds = [(data.splits, data.plain, self.data.groups)]
        if (parts := self.folds) is not None:
            numbers = range(len(parts.parts))
            folds = [(*parts.select(data, fold), parts.groups(self.data, fold)) for fold in numbers]
        splits, plain, groups = folds[0]
        same_each_time = dict(splits) if plain is None else {**splits, "train": plain}
        seen = [(name, digest(split)) for name, split in same_each_time.items()]
        seen += [] if groups is None else [("groups", hashlib.sha256(groups.tobytes()).hexdigest())]
        seen.append(("source", "" if data.source is None or plain is not None else digest(data.source)))
        weights = sorted(digests(model).items())
        first = Bench(
            lambda seed, keep: self._load(sources, seed, keep)[0],
            splits,
            data.collate,
            hashlib.sha256(repr([seen, weights, self.data.augment]).encode()).hexdigest()[:16],
            processor,
            data.source,
            plain,
            groups,
            self.data.info,
        )
        others = [replace(first, data=data, plain=plain, groups=groups) for data, plain, groups in folds[1:]]
        return replace(first, others=tuple(others))

    def head_fit(self, bench: Bench, head: str | None) -> HeadFit | None:
        """What determines the learning rate of the head; None if the head is not found, or has no weights."""
        key = (bench.fingerprint, head)
        if key not in self._fits:
            model: Any = bench.load(0, False)
            data = bench.data["train"] if bench.plain is None else bench.plain
            samples = Samples(len(data), lambda rows: dict(bench.collate(read_rows(data, rows))))
            try:
                self._fits[key] = fit_head(model, anatomy(model, head=head), samples)
            except (AnatomyError, OptionError) as error:
                logger.info(f"no learning rate can be fitted to the head: {error}")
                self._fits[key] = None
        return self._fits[key]

    @cached_property
    def _has_head(self) -> bool:
        return isinstance(self.model, str) and has_head(self.model, None, self.revision)

    def _load(self, sources: tuple[str, ...], seed: int, keep: bool) -> tuple[nn.Module, Any]:
        """A new model and its processor; see :attr:`Bench.load`."""
        columns, settings = self.data.columns, (self.image_size, self.revision)
        if sources:
            return load_ensemble(sources, columns, seed, *settings)
        if not isinstance(self.model, str):
            model, processor = self.model(seed, keep)
            config: Any = model.config
            config.problem_type = columns.problem_type
            return model, processor
        # All contenders start from the same new head, including those that also keep the pretrained one: if the
        # checkpoint has a head, it is always kept at first.
        keeps = keep or self._has_head
        model, processor = load_classifier(self.model, columns, seed, *settings, keep_source_head=keeps)
        return (model if keep else drop_source_head(model)), processor


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
        groups: the numbers of the training samples' groups, if there are any.
        info: what the model card says about the data.
        others: the same with other parts of the labelled samples as validation.
    """

    load: Callable[[int, bool], nn.Module]
    data: Mapping[str, Any]
    collate: Callable[[list[Any]], Any]
    fingerprint: str = ""
    processor: Any = None
    source: Any = None
    plain: Any = None
    groups: np.ndarray | None = None
    info: DataInfo | None = None
    others: tuple[Bench, ...] = ()

    @property
    def folds(self) -> tuple[Bench, ...]:
        """This one, followed by the others."""
        return (self, *self.others)
