"""``hf-ft train --streaming``: training rows that are read as they come."""

from __future__ import annotations

from typing import Any

from hf_ft.cli.checks import refuse
from hf_ft.cli.flags import BUFFER, LOOKED_AT, DataFlags, StreamFlags
from hf_ft.cli.request import Request
from hf_ft.core.context import FrozenCache
from hf_ft.data.prepare import collate, image_transform, prepare, text_transform, usual_length
from hf_ft.data.sounds import sound_transform
from hf_ft.data.streamed import RowCollator, Streamed, load_streamed, unaugmented
from hf_ft.data.task import Data, Processed
from hf_ft.errors import OptionError
from hf_ft.trainer.stream_checks import check_streamable

# They need rows by index.
WITHOUT = ("max_train_samples", "on_corrupt", "on_duplicates", "group_column", "source_dataset")


def check_streaming(request: Request) -> None:
    """Reject what a stream cannot do, before anything is loaded.

    Raises:
        OptionError: naming the flag and the fix.
    """
    if not request.stream.streaming:
        return
    given, steps = request.given, int(request.given.get("max_steps") or 0)
    if steps <= 0:
        raise OptionError("--streaming needs --max_steps: a stream has no length, so a number of epochs means nothing.")
    refuse(given, ["num_train_epochs"], "with --streaming, --max_steps sets the length")
    refuse({name: getattr(request.data, name) for name in WITHOUT}, WITHOUT, "--streaming reads rows as they come")
    if request.data.unknown_classes == "drop":
        raise OptionError("--unknown_classes drop has no effect: --streaming drops no rows. Leave it out.")
    if request.method.class_weights != "none":
        raise OptionError("--class_weights balanced needs all labels before training: leave it out with --streaming.")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if str(getattr(given.get(name), "value", given.get(name))) == "epoch":
            raise OptionError(f"--{name} epoch: with --streaming there are no epochs. Use steps, or leave it out.")
    for name, count in stream_options(request.stream).items():
        if count < 0:
            raise OptionError(f"--{name} {count} must be a number of rows, or 0.")
    check_streamable(
        request.configs,
        max_steps=steps,
        cache=FrozenCache(request.method.frozen_cache),
        mixing=request.mixing,
        looks=stream_options(request.stream)["measure_samples"] > 0,
    )


def stream_options(flags: StreamFlags) -> dict[str, Any]:
    """The trainer's arguments for a stream; none if there is no stream."""
    if not flags.streaming:
        return {}
    return {
        "shuffle_buffer": BUFFER if flags.shuffle_buffer is None else flags.shuffle_buffer,
        "measure_samples": LOOKED_AT if flags.measure_samples is None else flags.measure_samples,
    }


def read_streamed(flags: DataFlags) -> Streamed:
    """Open the data given by the flags.

    Raises:
        DataError: if they cannot be read or have no validation split.
    """
    return load_streamed(
        str(flags.dataset),
        config_name=flags.config_name,
        names={"train": flags.train_split, "validation": flags.validation_split, "test": flags.test_split},
        encoding=flags.encoding,
        label_column=flags.label_column,
        image_column=flags.image_column,
        text_column=flags.text_column,
        audio_column=flags.audio_column,
        validation_fraction=flags.validation_fraction,
        seed=flags.split_seed,
    )


def process_streamed(streamed: Streamed, data: Data, model: Any, processor: Any) -> Processed:
    """Process the other splits for a model, and the stream's rows when they are collated: a buffer holds files then."""
    columns, length = streamed.train_columns, data.max_length or usual_length(model, processor)

    def transform(augment: str) -> Any:
        if columns.task == "text":
            return text_transform(processor, columns, length)
        if columns.task == "audio":
            return sound_transform(processor, columns, data.seconds)
        return image_transform(processor, columns, augment)

    ready = prepare(streamed.splits, processor, streamed.columns, "none", length, data.seconds)
    return Processed(
        {"train": streamed.train, **ready},
        RowCollator(columns.inputs[0], transform(data.augment), transform("none"), collate(processor)),
        None if data.augment == "none" else unaugmented(streamed.train),
    )
