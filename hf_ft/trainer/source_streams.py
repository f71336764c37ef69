"""Additional data streams during training, such as source data: the Trainer's side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_ft.core.plan import Stream
from hf_ft.data.streams import Position, Share, first_rows, is_map_style, open_stream
from hf_ft.engine.batch import STREAM, leading, rows_of
from hf_ft.engine.forward import check_columns, concatenate
from hf_ft.engine.objective import Objective
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.trainer.context import source_collator
from hf_ft.trainer.protocols import ForStreams

logger = logging.get_logger(__name__)
SOURCE = "source"


def data_of(stream: Stream, source_dataset: Any) -> Any:
    """The data set behind a stream that a strategy requests.

    Raises:
        OptionError: if the Trainer has no data set of that name.
    """
    if stream.name != SOURCE or source_dataset is None:
        raise OptionError(
            f"a strategy requests the stream {stream.name!r}, but a Trainer only provides {SOURCE!r}: pass "
            "source_dataset=... for that one."
        )
    return source_dataset


class SourceStreams:
    """Adds a batch of every active stream to each target batch, during one training attempt.

    A stream is opened when a term of weight > 0 first uses it, and closed together with its worker processes once no
    term uses it. Its position is saved with every checkpoint, separately for each rank.
    """

    def __init__(self, trainer: ForStreams, objective: Objective) -> None:
        self._trainer, self._args, self._objective = trainer, trainer.args, objective
        self._streams = {stream.name: stream for stream in objective.plan.streams}
        self._opened: dict[str, Iterator[tuple[Position, dict[str, Any]]]] = {}
        self._positions: dict[str, Position] = {}
        self._prepared: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}

    # --- before training -----------------------------------------------------------------------------------

    def begin(self, batch_size: int, resuming: Path | None) -> None:
        """Start every stream from the beginning or from its position in a checkpoint, and check that it fits.

        Raises:
            OptionError: if its share of a batch is too small, or labels or sample shapes do not fit.
        """
        if self._streams and resuming is not None:
            self._positions = self._saved_positions(resuming)
        for stream in self._streams.values():
            dataset = data_of(stream, self._trainer.source_dataset)
            rows = first_rows(dataset, stream.batch_size(batch_size), f"{stream.name}_dataset")
            self._prepared[stream.name] = stream.prepare(dataset) if stream.prepare else dict
            batch = self._prepared[stream.name](source_collator(self._trainer)(rows))
            if is_map_style(self._trainer.train_dataset):  # otherwise the check would consume samples
                self._check_fit(stream, batch, batch_size)

    def _check_fit(self, stream: Stream, batch: dict[str, Any], batch_size: int) -> None:
        trainer = self._trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="looked at")
        target = collate(first_rows(trainer.train_dataset, batch_size, "train_dataset"))
        check_columns(target, {stream.name: batch})
        if stream.forward == "joint":
            concatenate(target, {stream.name: batch})

    # --- in training ---------------------------------------------------------------------------------------

    def add(self, inputs: dict[str, Any], missing: int = 0) -> dict[str, Any]:
        """Add one batch of every stream that the current step uses, with ``ratio`` samples for each of the target's.

        Args:
            missing: number of micro-batches that the last update of an epoch lacks, after this one. Their samples are
                skipped, so that the streams do not depend on the number of micro-batches in an update.
        """
        if not self._objective.training:
            return inputs
        live = self._objective.live_streams
        for name in set(self._opened) - set(live):
            del self._opened[name]  # this shuts down its worker processes
        rows = rows_of(inputs)
        return {**inputs, **{f"{STREAM}{name}": self._next_of(name, rows, missing) for name in live}}

    def _next_of(self, name: str, rows: int, missing: int) -> dict[str, Any]:
        stream = self._streams[name]
        if name not in self._opened:
            self._opened[name] = self._open(stream)
        self._positions[name], batch = next(self._opened[name])
        for _ in range(missing):
            self._positions[name], _ = next(self._opened[name])
        if rows < self._trainer._train_batch_size:
            batch = leading(batch, max(1, round(stream.ratio * rows)))
        return self._trainer._prepare_inputs(self._prepared[name](batch))

    def _open(self, stream: Stream) -> Iterator[tuple[Position, dict[str, Any]]]:
        args = self._args
        share = Share(
            stream.batch_size(self._trainer._train_batch_size),
            args.seed if args.data_seed is None else args.data_seed,
            args.process_index,
            args.world_size,
        )
        return open_stream(
            data_of(stream, self._trainer.source_dataset),
            source_collator(self._trainer),
            share,
            self._positions.get(stream.name, (0, 0)),
            workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )

    def close(self) -> None:
        """Shut down all worker processes."""
        self._opened = {}

    # --- saving and loading --------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Save the position of this rank in each stream."""
        if self._streams:
            _file(folder, self._args.process_index).write_text(json.dumps(self._positions), encoding="utf-8")

    def _saved_positions(self, folder: Path) -> dict[str, Position]:
        """Load the positions that this rank saved.

        Raises:
            CheckpointError: if the file is missing or damaged.
        """
        file = _file(folder, self._args.process_index)
        if not file.exists() and _file(folder, 0).exists():
            logger.warning(f"{folder} was written by fewer processes: source samples will come in a different order.")
            file = _file(folder, 0)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            return {name: (int(passes), int(samples)) for name, (passes, samples) in saved.items()}
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing: {folder} is incomplete. Use another checkpoint.") from error
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Restore it, or use another checkpoint.") from error


def _file(folder: Path, rank: int) -> Path:
    return folder / f"ft_streams_{rank}.json"
