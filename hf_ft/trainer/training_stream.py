"""Streamed training data: the Trainer's side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils import logging

from hf_ft.data.streams import Share, is_map_style
from hf_ft.data.training_stream import Place, Position, open_training_stream, readers_of
from hf_ft.engine.objective import Objective
from hf_ft.errors import CheckpointError
from hf_ft.trainer.mixing_checks import classes_of
from hf_ft.trainer.protocols import ForTrainingStream
from hf_ft.trainer.training_batches import StreamedBatches

logger = logging.get_logger(__name__)


class TrainingStream:
    """Batches of a training data set that is read in order, during one training attempt.

    They are always full, pass after pass, and independent of where the run is interrupted: each rank's position is
    saved with every checkpoint.

    Attributes:
        skip: number of batches that the Trainer will skip after resuming, because it has trained on them.
        position: where this rank continues.
    """

    def __init__(self, trainer: ForTrainingStream, objective: Objective) -> None:
        self._trainer, self._args, self._objective = trainer, trainer.args, objective
        self.skip = 0
        self.position = Position()

    @property
    def used(self) -> bool:
        """Whether training data are read in this way: unlike steps, epochs end with a pass."""
        return is_stream(self._trainer.train_dataset) and self._args.max_steps > 0

    def begin(self, resuming: Path | None) -> None:
        """Start from the beginning, or from the position in a checkpoint.

        Raises:
            CheckpointError: if that is missing or damaged, or was saved by another number of processes.
        """
        args = self._args
        if not self.used:
            return
        readers = readers_of(self._trainer.train_dataset, args.world_size, args.dataloader_num_workers)
        self.position = Position(places=(Place(),) * readers)
        if resuming is not None and not args.ignore_data_skip:
            self.position = self._saved(resuming, readers)

    def loader(self, batch_size: int) -> DataLoader:
        """A loader for the Trainer that neither splits these batches among ranks nor reads ahead."""
        batches = _Batches(self, batch_size)
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())

    def batches(self, batch_size: int) -> Iterator[tuple[Position, Any]]:
        """Endless batches, each with the position after it."""
        trainer, args = self._trainer, self._args
        seed = args.seed if args.data_seed is None else args.data_seed
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
        plan = self._objective.plan
        return open_training_stream(
            trainer.train_dataset,
            StreamedBatches(collate, seed, plan.second_view, trainer.mixing, classes_of(trainer.model)),
            Share(batch_size, seed, args.process_index, args.world_size),
            trainer.shuffle_buffer,
            self.position,
            workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )

    def save(self, folder: Path) -> None:
        """Save the position of this rank."""
        if not self.used:
            return
        saved = dataclasses.asdict(self.position) | {"ranks": self._args.world_size}
        try:
            text = json.dumps(saved)
        except TypeError:  # a data set of another kind, whose state is not JSON: its samples will be read again
            for place in saved["places"]:
                place["state"] = None
            text = json.dumps(saved)
        _file(folder, self._args.process_index).write_text(text, encoding="utf-8")

    def _saved(self, folder: Path, readers: int) -> Position:
        file = _file(folder, self._args.process_index)
        try:
            saved = json.loads((file if file.exists() else _file(folder, 0)).read_text(encoding="utf-8"))
            places = tuple(Place(**place) for place in saved["places"])
            position, ranks = Position(int(saved["batches"]), places), int(saved["ranks"])
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{file} is missing: {folder} is incomplete, or its run did not stream. Use another checkpoint, or set "
                "ignore_data_skip=True to read train_dataset from the beginning."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Restore it, or use another checkpoint.") from error
        if (ranks, len(places)) != (self._args.world_size, readers):
            raise CheckpointError(
                f"{folder}: its samples were read by {ranks} process(es) with {len(places)} reader(s) each, not "
                f"{self._args.world_size} with {readers}. Resume with that many processes and the same "
                "dataloader_num_workers, or set ignore_data_skip=True to read train_dataset from the beginning."
            )
        return position


class _Batches(IterableDataset):
    """The batches from the stream's position on; the position is kept up to date."""

    def __init__(self, stream: TrainingStream, batch_size: int) -> None:
        self.stream, self.batch_size = stream, batch_size

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.stream.skip):
            yield None
        for position, batch in self.stream.batches(self.batch_size):
            self.stream.position = position
            yield batch


def is_stream(dataset: Any) -> bool:
    """Whether it is a data set whose rows cannot be read by index."""
    return dataset is not None and not is_map_style(dataset)


def _as_it_is(batch: Any) -> Any:
    return batch


def _file(folder: Path, rank: int) -> Path:
    return folder / f"ft_data_{rank}.json"
