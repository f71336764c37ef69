"""Streamed training data: full batches, pass after pass, the same wherever a run is interrupted."""

import itertools
import json
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from hf_ft import CheckpointError, DAFTConfig, FTTrainer, OptionError
from hf_ft.data import training_stream
from hf_ft.data.streams import Share
from hf_ft.data.training_stream import Place, Position, keeps_place, open_training_stream, readers_of
from hf_ft.testing import same_tensors, tiny_data, tiny_resnet
from hf_ft.testing.laws import _losses, _same_optimizers
from hf_ft.testing.training import snapshot, tiny_arguments
from tests.forked import python

COUNT = 37


def generated(shards):
    for shard in shards:
        yield from ({"number": number} for number in range(shard, COUNT, 4))


def rows(shards=4):
    return datasets.Dataset.from_dict({"number": list(range(COUNT))}).to_iterable_dataset(num_shards=shards)


def drawn(row):
    return {"drawn": random.random() + np.random.rand() + torch.rand(()).item()}


def doubled(batch):
    return {"double": [2 * number for number in batch["number"]]}


class Counted(torch.utils.data.IterableDataset):
    """Any other iterable, without a stored position."""

    def __iter__(self):
        return ({"number": number} for number in range(COUNT))


STREAMS = {
    "rows": rows,
    "one shard": lambda: rows(1),
    "files": lambda: datasets.IterableDataset.from_generator(generated, gen_kwargs={"shards": [0, 1, 2, 3]}),
    "augmented": lambda: rows().map(drawn),
    "in batches": lambda: rows().map(doubled, batched=True, batch_size=5),
    "filtered": lambda: rows().filter(lambda row: row["number"] % 5),
    "formatted": lambda: rows().with_format("numpy"),
    "cast": lambda: rows().cast_column("number", datasets.Value("float32")),
    "a buffer": lambda: rows().shuffle(seed=1, buffer_size=10),
    "mixed": lambda: datasets.interleave_datasets([rows(), rows()], probabilities=[0.5, 0.5], seed=0),
    "others": Counted,
}


def listed(read, *numbers):
    return [list(row.values()) for row in read]


def opened(make, block=0, position=None, workers=0, rank=0, ranks=1):
    position = position or Position(places=(Place(),) * readers_of(make(), ranks, workers))
    return open_training_stream(make(), listed, Share(4, 3, rank, ranks), block, position, workers=workers)


def written(position):
    """The state in the form of a checkpoint."""
    saved = json.loads(json.dumps({"batches": position.batches, "places": [vars(p) for p in position.places]}))
    return Position(saved["batches"], tuple(Place(**place) for place in saved["places"]))


@pytest.mark.parametrize("kind", STREAMS)
def test_resumed_anywhere_the_same_batches_follow(kind):
    make = STREAMS[kind]
    for block, rank, ranks in ((0, 0, 1), (10, 1, 2)):
        whole = list(itertools.islice(opened(make, block, rank=rank, ranks=ranks), 13))
        for done in (1, 5, 9):  # with 18 samples per rank, the first pass ends within the fifth batch
            again = opened(make, block, written(whole[done - 1][0]), rank=rank, ranks=ranks)
            assert [b for _, b in itertools.islice(again, 13 - done)] == [b for _, b in whole[done:]]


def test_only_a_stream_without_a_position_is_read_again():
    kept = {kind for kind, make in STREAMS.items() if keeps_place(make())}
    changed = {"augmented", "in batches", "filtered"} if training_stream.FORGETFUL else set()
    assert set(STREAMS) - kept == {"a buffer", "others"} | changed


@pytest.mark.parametrize("kind", ["rows", "one shard", "others"])
def test_two_ranks_read_each_sample_once_per_pass(kind):
    orders = {}
    for block in (0, 10):
        read = [itertools.islice(opened(STREAMS[kind], block, rank=rank, ranks=2), 9) for rank in (0, 1)]
        orders[block] = [[row[0] for _, batch in one for row in batch] for one in read]
        first = [number for one in orders[block] for number in one[:18]]
        assert len(set(first)) == 36, "a sample came twice"
    assert orders[0] != orders[10]


@pytest.mark.slow
def test_worker_processes_take_turns():
    whole = list(itertools.islice(opened(rows, 10, workers=2), 12))
    assert len(whole[0][0].places) == 2
    assert len({row[0] for _, batch in whole[:8] for row in batch}) == 32
    for done in (3, 8):
        again = opened(rows, 10, written(whole[done - 1][0]), workers=2)
        assert [b for _, b in itertools.islice(again, 12 - done)] == [b for _, b in whole[done:]]


def test_what_yields_nothing_is_named():
    with pytest.raises(OptionError, match="train_dataset ran out: pass 1 "):
        next(opened(lambda: rows().filter(lambda row: False)))


# --- the trainer -----------------------------------------------------------------------------------------------


def noisy(row):
    return {**row, "pixel_values": torch.as_tensor(row["pixel_values"]) + random.random()}


def stream(count=20, shards=4):
    return tiny_data(tiny_resnet(), count).to_iterable_dataset(num_shards=shards).map(noisy)


def made(folder, strategy="lp_ft", data=None, model=None, **given):
    """Three passes over 20 samples in 8 steps of two micro-batches."""
    ours = {name: given.pop(name) for name in OURS if name in given}
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, **given}
    data = stream() if data is None else data
    args = tiny_arguments(folder, **given)
    return FTTrainer(model or tiny_resnet(), args, strategy=strategy, train_dataset=data, **ours)


OURS = {"eval_dataset", "plain_train_dataset", "measure_samples", "shuffle_buffer", "frozen_cache", "mixup"}
OURS |= {"class_weights"}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def same_runs(one, other):
    same_tensors(snapshot(one.model), snapshot(other.model))
    _same_optimizers(one.optimizer, other.optimizer)
    assert _losses(one) == _losses(other)
    assert [entry.get("epoch") for entry in one.state.log_history] == [e.get("epoch") for e in other.state.log_history]


@pytest.mark.slow
def test_killed_and_resumed_it_reads_on_where_it_was(tmp_path):
    """Within the third block of 8 samples, and within a stage."""
    killed = python(Path(__file__).with_name("killed_training_stream_worker.py"), tmp_path / "run", 3)
    assert killed.returncode == -9, killed.stderr[-2000:]
    resumed = made(tmp_path / "run", shuffle_buffer=8, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    whole = made(tmp_path / "whole", shuffle_buffer=8, **SAVING)
    whole.train()
    same_runs(resumed, whole)
    other = made(tmp_path / "other", data_seed=1, shuffle_buffer=8)
    other.train()
    assert _losses(other) != _losses(whole), "the order matters"


def test_positions_that_do_not_fit_are_named(tmp_path):
    made(tmp_path, max_steps=2, **SAVING).train()
    file = tmp_path / "checkpoint-2" / "ft_data_0.json"
    content = file.read_text()
    for text, message in (
        (
            content.replace('"ranks": 1', '"ranks": 2'),
            "read by 2 process.*Resume with that many.*ignore_data_skip=True",
        ),
        ("{}", "ft_data_0.json is damaged .*Restore it"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            made(tmp_path, max_steps=3, **SAVING).train(resume_from_checkpoint=str(file.parent))
    made(tmp_path, max_steps=3, ignore_data_skip=True).train(resume_from_checkpoint=str(file.parent))


# --- strategies that measure -----------------------------------------------------------------------------------


def test_measured_samples_give_the_same_as_those_rows(tmp_path):
    """The first samples; measured once, even if the run is resumed."""
    options = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-2, "max_steps": 2}
    data = tiny_data(tiny_resnet(), 24)
    streamed = made(tmp_path / "a", DAFTConfig(), data.to_iterable_dataset(num_shards=1), measure_samples=16, **options)
    plain = made(tmp_path / "b", DAFTConfig(), data.select(range(16)), **options)
    one, other = (trainer.measure()["daft"] for trainer in (streamed, plain))
    same_tensors(one.tensors, other.tensors)
    assert one.info == other.info
    streamed.train()


def test_labels_and_the_draw_of_measured_samples(tmp_path):
    data = tiny_data(tiny_resnet(), 24)
    drawn = [made(tmp_path, data=data.to_iterable_dataset(num_shards=shards), measure_samples=8, shuffle_buffer=20)
             for shards in (1, 1)]  # fmt: skip
    one, other = (trainer.context() for trainer in drawn)
    assert one.labels.tolist() == other.labels.tolist() == one.samples.read(range(8))["labels"].tolist()
    assert one.samples.count == 8 and one.labels.tolist() != data["labels"][:8].tolist()
    given = made(tmp_path, data=data.to_iterable_dataset(), plain_train_dataset=data)
    assert given.context().samples.count == 24, "data to measure that can be read by index need no look"


EVALUATED = tiny_data(tiny_resnet(), 4)
BEFORE = "daft measures the training data first.*measure_samples=256"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "daft"}, BEFORE),
        ({"strategy": "auto_rgn"}, "auto_rgn measures.*measure_samples=256"),
        (
            {"strategy": "wise_ft", "eval_dataset": EVALUATED},
            "wise_ft renews BatchNorm statistics.*measure_samples=256",
        ),
        ({"frozen_cache": "always"}, "frozen_cache='always' .*Use 'auto'"),
        ({"mixup": 0.2}, "mixup=0.2: batches of an iterable train_dataset.*measure_samples=8"),
        ({"max_steps": -1}, "max_steps=-1: train_dataset is a stream without a length.*Set max_steps"),
        ({"measure_samples": -2}, "measure_samples=-2 must be a number of samples"),
        ({"class_weights": "balanced"}, "class_weights='balanced' needs a label column"),
        ({"data": split_dataset_by_node(rows(), 0, 2)}, "already split among processes"),
    ],
)
def test_what_needs_rows_by_index_is_refused_before_anything_runs(given, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        made(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists() or "class_weights" in given


def test_with_measured_samples_they_run(tmp_path):
    made(tmp_path / "a", "auto_rgn", measure_samples=16, max_steps=2).train()
    made(tmp_path / "b", "full", measure_samples=16, max_steps=2, mixup=0.2).train()


@pytest.mark.slow
def test_two_ranks_share_a_stream(tmp_path):
    done = python(Path(__file__).with_name("distributed_scale_worker.py"), tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-4000:]
