"""Streams: endless, reshuffled, shared among ranks, and the same batches wherever a run is resumed."""

import json
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import default_data_collator

from hf_ft import CheckpointError, FTTrainer, OptionError, Plan, SoftConfig, Stream, compose
from hf_ft.data.streams import Share, first_rows, open_stream
from hf_ft.testing import same_tensors, tiny_data, tiny_resnet, tiny_vit
from hf_ft.testing.training import equipped, make_trainer, snapshot, tiny_arguments, train
from tests.forked import python
from tests.trainer.numbered_data import Numbered, NumberedPasses, numbers

SAVING = {"save_strategy": "steps", "save_steps": 2}
SOFT = SoftConfig(until=0.75)


def rows_of(stream, batches):
    return [batch["number"].tolist() for _, batch in (next(stream) for _ in range(batches))]


def opened(dataset, size=4, start=(0, 0), workers=0, **share):
    return open_stream(dataset, default_data_collator, Share(size, **share), start, workers=workers)


def test_each_pass_has_every_sample_once_in_another_order():
    rows = sum(rows_of(opened(Numbered(10), 4), 10), [])  # four passes; batches cross their borders
    passes = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert rows_of(opened(Numbered(10), 4, seed=1), 2) != rows_of(opened(Numbered(10), 4), 2)
    assert len(rows_of(opened(Numbered(3), 8), 1)[0]) == 8  # larger than the dataset


def test_ranks_share_the_batches_of_one_process():
    whole = rows_of(opened(Numbered(10), 6), 7)
    ranks = [rows_of(opened(Numbered(10), 3, rank=rank, ranks=2), 7) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


def test_accumulated_micro_batches_are_the_whole_batch():
    whole, parts = rows_of(opened(Numbered(10), 6), 5), rows_of(opened(Numbered(10), 2), 15)
    assert [sum(parts[i : i + 3], []) for i in range(0, 15, 3)] == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbered, NumberedPasses])
def test_resumed_anywhere_the_same_batches_follow(kind, workers):
    """Also with random augmentation, in any process."""
    stream = opened(kind(10), workers=workers)
    batches = [next(stream) for _ in range(9)]
    for done in range(1, 8):
        again = opened(kind(10), start=batches[done - 1][0], workers=workers)
        for position, batch in batches[done:]:
            found = next(again)
            assert found[0] == position
            assert found[1]["number"].tolist() == batch["number"].tolist()
            assert torch.equal(found[1]["drawn"], batch["drawn"])


def test_what_is_drawn_differs_between_batches_and_disturbs_nothing():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    stream = opened(Numbered(10))
    drawn = torch.cat([next(stream)[1]["drawn"] for _ in range(5)])
    assert len(drawn.unique()) == drawn.numel()
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


def streaming(samples, shards=4):
    parts = [{"number": i, "labels": 0} for i in range(samples)]
    return datasets.Dataset.from_list(parts).to_iterable_dataset(num_shards=shards)


def test_streaming_datasets():
    """Reshuffled in each pass, shared among ranks, and resumed where it was."""
    rows = sum(rows_of(opened(streaming(20), 5), 12), [])
    passes = [rows[i : i + 20] for i in range(0, 60, 20)]
    assert all(sorted(one) == list(range(20)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    shares = [sum(rows_of(opened(streaming(20), 5, rank=rank, ranks=2), 2), []) for rank in (0, 1)]
    assert sorted(sum(shares, [])) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_datasets_are_resumed(workers):
    stream = opened(streaming(20), 3, workers=workers)
    batches = [next(stream) for _ in range(16)]
    assert len({number for _, batch in batches[:6] for number in batch["number"].tolist()}) == 18
    for done in (1, 5, 7, 13):
        again = opened(streaming(20), 3, start=batches[done - 1][0], workers=workers)
        assert [next(again)[1]["number"].tolist() for _ in range(3)] == [
            batch["number"].tolist() for _, batch in batches[done : done + 3]
        ]


def test_other_iterables_are_shared_sample_by_sample():
    shares = [sum(rows_of(opened(NumberedPasses(10), 5, rank=rank, ranks=2), 1), []) for rank in (0, 1)]
    assert shares == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_running_dry():
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = iter([{"number": i} for i in range(6)])

        def __iter__(self):
            return self.rows

    stream = opened(Once(), 4)
    next(stream)
    with pytest.raises(OptionError, match="ran out: pass 2 over it yielded no samples"):
        next(stream)
    with pytest.raises(OptionError, match="source_dataset contains no samples"):
        first_rows([], 1, "source_dataset")


def test_a_source_that_runs_dry_stops_training(tmp_path):
    model = equipped(tiny_resnet(), SOFT)
    rows = list(tiny_data(model, 20, seed=2))

    class Dry(torch.utils.data.IterableDataset):
        passes = 0

        def __iter__(self):
            Dry.passes += 1
            return iter(rows if Dry.passes < 3 else [])  # one pass to inspect it, one to train on

    trainer = FTTrainer(
        model, tiny_arguments(tmp_path), strategy=SOFT, train_dataset=tiny_data(model), source_dataset=Dry()
    )
    with pytest.raises(OptionError, match="source_dataset ran out"):
        trainer.train()


def test_streams_with_one_name_must_agree():
    plan = Plan(streams=(Stream("source", 2.0),))
    assert compose([plan, plan]).streams == plan.streams
    with pytest.raises(OptionError, match="two strategies request the stream 'source' with different settings"):
        compose([plan, Plan(streams=(Stream("source", 1.0),))])


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_the_same_source_batches_follow(tmp_path):
    """kill -9 between two checkpoints, with random augmentation and worker processes."""
    script = Path(__file__).with_name("killed_stream_worker.py")
    for name, stop in (("whole", 0), ("killed", 3)):
        done = python(script, tmp_path / name, stop)
        assert done.returncode == (-9 if stop else 0), done.stderr[-2000:]
    assert (tmp_path / "killed" / "checkpoint-2" / "ft_streams_0.json").is_file()
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    done = python(script, tmp_path / "killed", 0, "resume")
    assert done.returncode == 0, done.stderr[-2000:]
    read = {name: numbers(tmp_path / name / "read.jsonl") for name in ("whole", "killed")}
    assert len(read["whole"]) == 6  # of 8 steps
    assert read["killed"][:3] == read["whole"][:3]
    assert read["killed"][3:] == read["whole"][2:]  # again from step 2 on
    weights = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "killed")]
    same_tensors(*weights)


@pytest.mark.slow
def test_resumed_after_the_source_is_dropped(tmp_path):
    whole = train(tiny_resnet(), SoftConfig(until=0.25), tmp_path, **SAVING)
    resumed = make_trainer(tiny_resnet(), SoftConfig(until=0.25), tmp_path / "again", **SAVING)
    resumed._open = lambda stream: pytest.fail("a stream was opened")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))


@pytest.mark.slow
def test_a_damaged_position_is_named(tmp_path):
    train(tiny_resnet(), SOFT, tmp_path, **SAVING)
    file = tmp_path / "checkpoint-4" / "ft_streams_0.json"
    assert json.loads(file.read_text()) == {"source": [1, 12]}  # four batches of 8, from 20 samples
    file.write_text('{"source": [1')
    trainer = make_trainer(tiny_resnet(), SOFT, tmp_path / "again", **SAVING)
    with pytest.raises(CheckpointError, match=r"ft_streams_0.json is damaged"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    found = []
    for count in (0, 2):
        model = equipped(tiny_resnet(), SOFT)
        arguments = tiny_arguments(tmp_path / str(count), dataloader_num_workers=count)
        data = {"train_dataset": tiny_data(model), "source_dataset": tiny_data(model, 20, seed=2)}
        trainer = FTTrainer(model, arguments, strategy=SOFT, **data)
        trainer.train()
        found.append(snapshot(trainer.model))
    same_tensors(*found)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_streaming_source_is_resumed(workers, tmp_path):
    def run(folder, resume=None):
        model = equipped(tiny_resnet(), SOFT)
        source = tiny_data(model, 20, seed=2).to_iterable_dataset(num_shards=2)
        arguments = tiny_arguments(folder, dataloader_num_workers=workers, **SAVING)
        data = {"train_dataset": tiny_data(model), "source_dataset": source}
        trainer = FTTrainer(model, arguments, strategy=SOFT, **data)
        trainer.train(resume_from_checkpoint=resume)
        return snapshot(trainer.model)

    whole = run(tmp_path / "whole")
    same_tensors(whole, run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-4")))


def test_iterables_that_know_their_length(tmp_path):
    class Sized(NumberedPasses):
        def __len__(self):
            return self.count

    assert rows_of(opened(Sized(10), 5), 3) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


def test_worker_processes_leave_cuda_alone(monkeypatch):
    """A forked process must not access its parent's GPU memory: torch refuses that."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("CUDA was touched"))
    assert rows_of(opened(Numbered(10), workers=1), 2) == rows_of(opened(Numbered(10)), 2)


def test_an_iterable_target_loses_no_sample(tmp_path):
    model = equipped(tiny_resnet(), SOFT)
    rows, seen = iter(list(tiny_data(model, 64))), []

    class Once(torch.utils.data.IterableDataset):
        def __iter__(self):
            return rows

    def collate(batch):
        seen.append(batch[0]["pixel_values"])
        return default_data_collator(batch)

    data = {"train_dataset": Once(), "source_dataset": tiny_data(model, 20, seed=2)}
    args = tiny_arguments(tmp_path)
    more = {"data_collator": collate, "source_data_collator": default_data_collator}
    FTTrainer(model, args, strategy=SOFT, **data, **more).train()
    assert torch.equal(seen[0], tiny_data(model, 64)[0]["pixel_values"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
def test_resumed_at_the_border(step, tmp_path):
    """At the step at which the weight becomes 0, and before it."""
    whole = train(tiny_vit(), SoftConfig(schedule="step", until=0.5), tmp_path, **SAVING)
    resumed = make_trainer(tiny_vit(), SoftConfig(schedule="step", until=0.5), tmp_path / "again", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    same_tensors(snapshot(resumed.model), snapshot(whole.model))


@pytest.mark.slow
def test_a_missing_position_is_named(tmp_path):
    train(tiny_resnet(), SOFT, tmp_path, **SAVING)
    (tmp_path / "checkpoint-4" / "ft_streams_0.json").unlink()
    trainer = make_trainer(tiny_resnet(), SOFT, tmp_path / "again", **SAVING)
    with pytest.raises(CheckpointError, match=r"ft_streams_0.json is missing.*Use another"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_columns_that_the_model_does_not_take_are_removed(tmp_path):
    model = equipped(tiny_resnet(), SOFT)
    source = tiny_data(model, 20, seed=2)
    source = source.add_column("path", ["x"] * 20)
    FTTrainer(
        model, tiny_arguments(tmp_path), strategy=SOFT, train_dataset=tiny_data(model), source_dataset=source
    ).train()
