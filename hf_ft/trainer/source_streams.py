"""Steps that use other data beside the target's: the Trainer's side of streams."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_ft.core.plan import Plan, Stream
from hf_ft.data.rows import read_rows
from hf_ft.data.streams import Position, Share, first_rows, is_map_style, open_stream
from hf_ft.engine.batch import STREAM
from hf_ft.engine.forward import check_columns, concatenate
from hf_ft.errors import CheckpointError, OptionError
from hf_ft.models.preserve import random_states_kept

logger = logging.get_logger(__name__)
SOURCE = "source"
READ = 64  # source samples in a batch of a measuring pass


class StreamedSteps:
    """Mixin for a Trainer: adds a batch of every stream that is live to each batch of the target.

    A stream is opened when a term of weight > 0 first asks for it, and closed with its worker processes as soon as
    none does. How far it was consumed is saved with every checkpoint, by each rank for itself.
    """

    source_dataset: Any
    source_data_collator: Callable[[list[Any]], Any] | None
    # The Trainer's own.
    args: Any
    model: Any
    train_dataset: Any
    data_collator: Any
    _run: Any
    _objective: Any
    _resuming: Path | None
    _train_batch_size: int
    _prepare_inputs: Any
    _get_collator_with_removed_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._opened: dict[str, Iterator[tuple[Position, dict[str, Any]]]] = {}
        self._positions: dict[str, Position] = {}
        self._prepared: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        super().__init__(*args, **kwargs)

    # --- before training -----------------------------------------------------------------------------------

    def _check_source(self) -> None:
        """Tell what is missing, left over or of no use, as far as that needs no plan.

        Raises:
            OptionError: a strategy needs source data, and there are none; or they are no data set, or empty.
        """
        configs, dataset = self.configs, self.source_dataset  # type: ignore[attr-defined]
        if dataset is None:
            for config in configs:
                if config.needs().source_data == "required":
                    raise OptionError(
                        f"{config.ft_type} needs the data of the pretraining: pass source_dataset=... to FTTrainer "
                        f"(--source_dataset on the command line){config.needs().without_source_data}."
                    )
            return
        if all(config.needs().source_data == "no" for config in configs):
            names = ", ".join(config.ft_type for config in configs)
            logger.warning(f"source_dataset is not used: {names} takes no source data.")
        elif isinstance(dataset, (str, Mapping)):
            what = f"of the splits {list(dataset)}" if isinstance(dataset, Mapping) else repr(dataset)
            raise OptionError(f"source_dataset is a {type(dataset).__name__} {what}: pass one data set.")
        elif is_map_style(dataset) and not len(dataset):
            raise OptionError("source_dataset holds no sample: pass one that does.")

    def _begin_streams(self, plan: Plan, batch_size: int) -> None:
        """Start every stream anew, or where a checkpoint left it; refuse one that does not fit.

        Raises:
            OptionError: too small a share of a batch, labels that do not fit, or samples of another shape.
        """
        self._opened, self._prepared, self._positions = {}, {}, {}
        if plan.streams and self._resuming is not None:
            self._positions = self._saved_positions(self._resuming)
        for stream in plan.streams:
            dataset = self._data_of(stream)
            rows = first_rows(dataset, stream.batch_size(batch_size), f"{stream.name}_dataset")
            self._prepared[stream.name] = stream.prepare(dataset) if stream.prepare else dict
            batch = self._prepared[stream.name](self._collator_of_streams()(rows))
            if is_map_style(self.train_dataset):  # else a look would take samples away
                collate = self._get_collator_with_removed_columns(self.data_collator, description="looked at")
                target = collate(first_rows(self.train_dataset, batch_size, "train_dataset"))
                check_columns(target, {stream.name: batch})
                if stream.forward == "joint":
                    concatenate(target, {stream.name: batch})

    def _data_of(self, stream: Stream) -> Any:
        if stream.name != SOURCE or self.source_dataset is None:
            raise OptionError(
                f"a strategy wants the stream {stream.name!r}: pass source_dataset=... for {SOURCE!r}, the only one "
                "that a Trainer has."
            )
        return self.source_dataset

    def _collator_of_streams(self) -> Callable[[list[Any]], Any]:
        collate = self.source_data_collator or self.data_collator
        return self._get_collator_with_removed_columns(collate, description="source")

    # --- in training ---------------------------------------------------------------------------------------

    def _with_streams(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with one of every stream that the present step uses."""
        if not self._objective.training:
            return inputs
        live = self._objective.live_streams
        for name in set(self._opened) - set(live):
            del self._opened[name]  # its worker processes end
        return {**inputs, **{f"{STREAM}{name}": self._next_of(name) for name in live}} if live else inputs

    def _next_of(self, name: str) -> dict[str, Any]:
        if name not in self._opened:
            stream = next(stream for stream in self._run.plan.streams if stream.name == name)
            self._opened[name] = self._open(stream)
        self._positions[name], batch = next(self._opened[name])
        return self._prepare_inputs(self._prepared[name](batch))

    def _open(self, stream: Stream) -> Iterator[tuple[Position, dict[str, Any]]]:
        args = self.args
        share = Share(
            stream.batch_size(self._train_batch_size),
            args.seed if args.data_seed is None else args.data_seed,
            args.process_index,
            args.world_size,
        )
        return open_stream(
            self._data_of(stream),
            self._collator_of_streams(),
            share,
            self._positions.get(stream.name, (0, 0)),
            workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )

    def _close_streams(self) -> None:
        self._opened = {}

    # --- saving and loading --------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """As the Trainer's, by each rank; and how far the streams were consumed."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self._run.plan.streams:
            _file(Path(output_dir), self.args.process_index).write_text(json.dumps(self._positions), encoding="utf-8")

    def _saved_positions(self, folder: Path) -> dict[str, Position]:
        """The positions that this rank saved.

        Raises:
            CheckpointError: missing or damaged.
        """
        file = _file(folder, self.args.process_index)
        if not file.exists() and _file(folder, 0).exists():
            logger.warning(f"{folder} was written by fewer processes: source samples will follow in another order.")
            file = _file(folder, 0)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            return {name: (int(passes), int(samples)) for name, (passes, samples) in saved.items()}
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing: {folder} is incomplete. Take another checkpoint.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}). Restore it, or take another checkpoint.") from error

    # --- for measuring -------------------------------------------------------------------------------------

    def _source_batches(self, limit: int) -> Iterator[dict[str, Any]]:
        """Up to so many source samples, the same on every rank, as batches on the device."""
        dataset, collate = self.source_dataset, self._collator_of_streams()
        if is_map_style(dataset):
            rows = range(0, len(dataset), max(1, -(-len(dataset) // limit)))
            parts: Iterator[list[Any]] = (read_rows(dataset, rows[i : i + READ]) for i in range(0, len(rows), READ))
        else:
            samples = itertools.islice(iter(dataset), limit)
            parts = iter(lambda: list(itertools.islice(samples, READ)), [])
        for number in itertools.count():
            with random_states_kept(seed=self.args.seed + number):  # augmentation disturbs nothing
                part = next(parts, None)
                batch = None if part is None else collate(part)
            if batch is None:
                return
            yield self._prepare_inputs(batch)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"ft_streams_{rank}.json"
