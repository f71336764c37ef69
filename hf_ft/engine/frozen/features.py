"""Features of a frozen network's layer for all samples, computed once if they can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_ft.core.context import Context
from hf_ft.engine.frozen.record import batches_of, fill, record
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore
from hf_ft.models.border import SOURCE_LOGITS
from hf_ft.models.feature_hooks import activations
from hf_ft.models.layouts import PLAIN, Layout
from hf_ft.models.preserve import random_states_kept
from hf_ft.models.source_head import pretrained_logits

logger = logging.get_logger(__name__)


class RecordedFeatures:
    """Features, labels and token masks of samples by index.

    All are recorded in a single pass and then looked up. If rows differ in shape (text padded per batch) or exceed the
    frozen cache, they are recomputed on each read.

    Args:
        model: frozen model; runs in evaluation mode.
        layer: name of the module whose output is recorded, or ``SOURCE_LOGITS``.
        context: samples, and cache limits.
        layout: how the module lays out its output.
    """

    def __init__(self, model: nn.Module, layer: str, context: Context, layout: Layout = PLAIN) -> None:
        self.model, self.layer, self.layout, self.context = model, layer, layout, context
        self.count = context.samples.count
        self._store: RowStore | None = None
        if not self.count:
            context.samples.read([0])  # raises: a stream of samples cannot be indexed
        if context.frozen_cache.use == "never":
            return
        try:
            with tqdm(total=self.count, desc="Recording features", leave=False, disable=not context.progress) as bar:
                rows = record(batches_of(self.count), self._compute)
                self._store = fill(self.count, rows, context.frozen_cache, bar.update)
        except RowsDiffer as error:
            logger.warning(f"The features of {layer} are computed in every step: {error}.")

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features (B, C, H, W) or (B, T, C), labels (B,), and the mask (B, T) of valid tokens, if there is one.

        All on the model's device.
        """
        columns = self._compute(rows) if self._store is None else self._store.take(torch.tensor(rows))
        columns = {name: column.to(self.context.device) for name, column in columns.items()}
        return columns["features"], columns["labels"], columns.get("mask")

    def _compute(self, rows: Sequence[int]) -> Columns:
        with random_states_kept(), self.context.recipe.computing():
            batch: dict[str, Any] = self.context.samples.read(rows)
            features = self._states(batch)
        columns = {"features": features.cpu(), "labels": batch["labels"].cpu()}
        mask = self.layout.mask(batch, features)
        if mask is not None:
            columns["mask"] = mask.cpu()
        return columns

    def _states(self, batch: dict[str, Any]) -> Tensor:
        if self.layer == SOURCE_LOGITS:
            return pretrained_logits(self.model, batch)
        return self.layout.arranged(activations(self.model, [self.layer], batch)[self.layer])
