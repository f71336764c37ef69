"""Caching of frozen prefixes and reference states over a stage: the Trainer's side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from hf_ft.data.rows import drawn_rows, read_rows, same_each_time
from hf_ft.data.streams import is_map_style
from hf_ft.engine.batch import REFERENCE, ROW, as_columns, recorded_states, starts_at_borders
from hf_ft.engine.frozen.find_prefix import find_prefix
from hf_ft.engine.frozen.prefix import FrozenPrefix
from hf_ft.engine.frozen.record import batches_of, fill, record_shared, share
from hf_ft.engine.frozen.row_store import Columns, RowsDiffer, RowStore
from hf_ft.engine.frozen.staged_rows import StagedCollator, StagedRows
from hf_ft.engine.objective import Objective
from hf_ft.trainer.protocols import ForCache

logger = logging.get_logger(__name__)
CHECKED = 8  # number of rows read several times to detect random inputs


class StageCache:
    """Computes the frozen part of the model once per sample, during one training attempt.

    If the first parts of a stage are frozen, the data loader yields recorded activations and the objective runs only
    the remaining parts. If terms compare with the initial model, its recorded states are added to the inputs. The
    form of a batch does not affect the training step: a batch fetched before a stage change is converted to the
    form of the current stage.

    Attributes:
        objective: the module being trained.
        rows: rows of the training data; None before the first loader, or if nothing can be recorded.
    """

    def __init__(self, trainer: ForCache, objective: Objective) -> None:
        self._trainer, self._args, self._settings = trainer, trainer.args, trainer.frozen_cache
        self.objective = objective
        self.rows: StagedRows | None = None
        self._eval_rows: dict[int, tuple[Any, StagedRows | None]] | None = None

    # --- data ----------------------------------------------------------------------------------------------

    def rows_for(self, dataset: Any, description: str, is_training: bool) -> StagedRows | None:
        """The data set that a loader should read in place of this one; None to keep this one."""
        if self._settings.use == "never" or not is_map_style(dataset):
            return None
        if is_training:
            chained = bool(self.objective.chains)
            if self._trainer.mixing:
                logger.info(f"Batches are mixed ({self._trainer.mixing}): the frozen part is computed in every step.")
                chained = False
            self.rows = StagedRows(self._used_columns(dataset, description)) if chained else None
            return self.rows
        if self._eval_rows is None or "inputs" in self._args.include_for_metrics:
            return None
        if id(dataset) not in self._eval_rows:  # keep a reference to the data set: an id can be reused after deletion
            self._eval_rows[id(dataset)] = dataset, self._recorded_evaluation(dataset, description)
        return self._eval_rows[id(dataset)][1]

    def collator_for(self, rows: Any, description: str) -> Callable[[list[Any]], Any]:
        """The collator that builds batches of these rows."""
        collate = self._trainer.data_collator
        cleaned = self._trainer._get_collator_with_removed_columns(collate, description=description)
        return StagedCollator(cleaned, rows) if isinstance(rows, StagedRows) else cleaned

    def _used_columns(self, dataset: Any, description: str) -> Any:
        if isinstance(dataset, datasets.Dataset):
            return self._trainer._remove_unused_columns(dataset, description=description)
        return dataset

    def _reader(self, dataset: Any) -> Callable[[list[int]], dict[str, Any]]:
        """A function that reads rows by index and returns them as a batch on the model's device."""
        collate = self._collator()
        return lambda rows: self._trainer._prepare_inputs(collate(read_rows(dataset, rows)))

    def _collator(self) -> Callable[[list[Any]], Any]:
        return self._trainer._get_collator_with_removed_columns(self._trainer.data_collator, description="recorded")

    def present_form(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Convert a batch to the form of the current stage; activations of an earlier stage are read again."""
        name = next((name for name in inputs if name.startswith(ROW)), None)
        if name is None:
            return inputs
        rows = inputs.pop(name)
        staged = self.rows
        if not self.objective.training:
            return inputs
        assert staged is not None
        if staged.stored and staged.store is not None and name == f"{ROW}{staged.store.number}":
            return inputs
        if starts_at_borders(inputs):
            return self._reader(staged.dataset)(rows.tolist())
        recorded_states(inputs)  # discarded: the reference model recomputes what this stage needs
        return inputs

    # --- recording -----------------------------------------------------------------------------------------

    def start(self, steps: int) -> None:
        """At the start of a stage of ``steps`` steps, record the repeated computations if that saves time."""
        rows, objective = self.rows, self.objective
        self.forget()
        if rows is None or not self._pays(rows, steps):
            return
        if objective.reference_layers:
            rows.activate(self._record_reference(rows.dataset), beside=True)
        elif objective.alive.has_prefix and not objective.wants_inputs:
            recorded = self._record(rows.dataset)
            if recorded is not None:
                objective.prefix, store = recorded
                rows.activate(store)
                average = objective.average
                if average is None or not average.moved(objective.alive.resting):
                    self._eval_rows = {}  # else evaluation runs the average of what is recorded here

    def leave_out_unused(self) -> None:
        """Stop reading reference states once no term of weight > 0 uses them."""
        if self.rows is not None and self.rows.beside and not self.objective.uses_reference:
            self.rows.activate(None)

    def forget(self) -> None:
        """Drop all recordings and read the original rows again."""
        if self._eval_rows:
            vars(self._trainer).pop("_eval_dataloaders", None)  # the Trainer keeps them with persistent workers
        self._eval_rows = None
        if self.rows is not None:
            self.rows.activate(None)
        self.objective.prefix = None

    def _pays(self, rows: StagedRows, steps: int) -> bool:
        """Whether the stage passes over the data more than once."""
        if getattr(self._args, "torch_compile", False):
            return False
        per_step = self._args.train_batch_size * self._args.gradient_accumulation_steps * self._args.world_size
        return steps * per_step > (0 if self._settings.use == "always" else len(rows))

    def _differs(self, read: Callable[[list[int]], dict[str, Any]], rows: list[int]) -> bool:
        """Whether samples change between reads, e.g. by augmentation, so that nothing can be recorded."""
        if self._settings.use == "always" or same_each_time(lambda: read(rows)):
            return False
        logger.info("Training samples differ each time they are read: the frozen part is computed in every step.")
        return True

    def _record_reference(self, dataset: Any) -> RowStore | None:
        """Record the reference states of all rows; logs a message and returns None if they cannot be stored."""
        assert self.objective.reference is not None
        reference, layers = self.objective.reference, self.objective.reference_layers
        read, some = self._reader(dataset), drawn_rows(len(dataset), CHECKED)
        if self._differs(read, some):
            return None
        alone = [{name: _row_shape(column) for name, column in read([row]).items()} for row in some]
        if any(shapes != alone[0] for shapes in alone) and not self._pooled(read(some[:1])):
            logger.warning("The reference model runs in every step: samples differ in shape (padded per batch).")
            return None

        def record(batch: dict[str, Any]) -> Columns:
            found = reference.states(layers, batch, self._args.device)
            return {f"{REFERENCE}{name}": state for name, state in found.items()}

        try:
            return self._fill(record, dataset, "Recording reference states")
        except RowsDiffer as error:
            logger.warning(f"The reference model runs in every step: {error}.")
            return None

    def _pooled(self, batch: dict[str, Any]) -> bool:
        """Whether the reference states are one vector per sample, independent of padding."""
        assert self.objective.reference is not None
        found = self.objective.reference.states(self.objective.reference_layers, batch, self._args.device)
        return all(state.dim() == 2 for state in found.values())

    def _record(self, dataset: Any) -> tuple[FrozenPrefix, RowStore] | None:
        """Longest prefix of the current stage and its activations for all rows; None, with a log message, if none."""
        read, samples = self._reader(dataset), len(dataset)
        some = drawn_rows(samples, CHECKED)
        if samples < 4 or self._differs(read, some):
            return None
        small = read(list(range(2))), read(some[:1] + some[-2:])
        varying = {name for name in small[0] if _row_shape(small[0][name]) != _row_shape(small[1].get(name))}
        for _ in range(len(small[0]) + 1):
            with self._computing():
                prefix = find_prefix(self.objective.model, self.objective.alive.chains, *small, varying)
            if prefix is None:
                reason = "no module's output can stand in for all before it"
                break
            try:
                return prefix, self._fill_prefix(prefix, dataset)
            except RowsDiffer as error:
                reason = str(error)
                if error.column not in prefix.kept:
                    break
                varying.add(error.column)
        logger.warning(f"The frozen part of the model is computed in every step: {reason}.")
        return None

    def _recorded_evaluation(self, dataset: Any, description: str) -> StagedRows | None:
        """Recorded activations of an evaluation data set for the prefix of the current stage."""
        prefix, rows = self.objective.prefix, StagedRows(self._used_columns(dataset, description))
        if prefix is None or not len(rows):
            return None
        try:
            rows.activate(self._fill_prefix(prefix, rows.dataset))
        except (RowsDiffer, KeyError) as error:
            logger.warning(f"Evaluation runs the whole model: {error}.")
            return None
        return rows

    def _fill_prefix(self, prefix: FrozenPrefix, dataset: Any) -> RowStore:
        def record(batch: dict[str, Any]) -> Columns:
            return {**as_columns(prefix.record(batch)), **{name: batch[name] for name in prefix.kept}}

        return self._fill(record, dataset, "Recording frozen activations")

    def _fill(self, record: Callable[[dict[str, Any]], Columns], dataset: Any, title: str) -> RowStore:
        """Record columns of all rows on every rank; each rank computes its share of the batches."""
        size = max(self._args.eval_batch_size, 2 * self._args.train_batch_size)  # gradients need no memory here
        batches = list(batches_of(len(dataset), size))
        rows = record_shared(batches, self._recorded(record, dataset, batches), self._trainer.accelerator)
        hidden = self._args.disable_tqdm or self._args.process_index > 0
        with tqdm(total=len(dataset), desc=title, leave=False, disable=hidden) as bar:
            return fill(len(dataset), rows, self._settings, bar.update, self._trainer.accelerator)

    def _recorded(
        self, record: Callable[[dict[str, Any]], Columns], dataset: Any, batches: list[list[int]]
    ) -> Iterator[Columns]:
        """The columns of this rank's share of the batches."""
        loader = DataLoader(
            dataset,
            batch_sampler=share(batches, self._args.world_size, self._args.process_index),
            collate_fn=self._collator(),
            num_workers=self._args.dataloader_num_workers,
            multiprocessing_context=getattr(self._args, "dataloader_multiprocessing_context", None),
            generator=torch.Generator(),  # otherwise iterating draws from the global one
        )
        for batch in loader:
            with self._computing():
                columns = record(self._trainer._prepare_inputs(batch))
            yield columns

    def _computing(self) -> AbstractContextManager[Any]:
        return self._trainer.accelerator.autocast()


def _row_shape(column: Any) -> tuple[int, ...] | None:
    return tuple(column.shape[1:]) if isinstance(column, Tensor) else None
