"""A model trained from recorded activations is the same as one trained on the inputs, with any other settings."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, DataCollatorWithPadding

from hf_ft import DELTAConfig, FrozenCache, FTTrainer, GradualUnfreezingConfig, OptionError, Plan, Stage, Term, set_up
from hf_ft.core.config import FTConfig, register
from hf_ft.core.context import Samples
from hf_ft.data.rows import GB, drawn_rows, same_each_time
from hf_ft.engine.batch import ACTIVATION
from hf_ft.engine.frozen.recorder import Recordings
from hf_ft.engine.frozen.row_store import RowsDiffer, RowStore
from hf_ft.engine.frozen.staged_rows import StagedRows
from hf_ft.testing import TINY_MODELS, same_tensors, still, tiny_bert, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.stage_cache import StageCache

# Twelve steps of 8 are three epochs of the 32 samples; a second stage begins in the middle of an epoch.
LONG = {"max_steps": 12, "optim": "sgd", "lr_scheduler_type": "constant"}


def run(model, strategy, folder, use, resume=None, **arguments):
    trainer = make_trainer(model, strategy, folder, use, **{**LONG, **arguments})
    return trainer, starts_noted(trainer, resume)


def starts_noted(trainer, resume=None):
    """Train; return whether each stage started from recorded activations."""
    used, start = [], StageCache.start

    def noted(cache, steps):
        start(cache, steps)
        used.append(cache.objective.prefix is not None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageCache, "start", noted)
        trainer.train(resume_from_checkpoint=resume)
    return used


def alike(one, other):
    """Weights agree to 1e-6, relative to a tensor's largest entry if above 1; running statistics to 5e-6."""
    for name, tensor in snapshot(one).items():
        tolerance = (5e-6 if "running" in name else 1e-6) * max(1.0, float(tensor.abs().max()))
        same_tensors({name: tensor}, {name: snapshot(other)[name]}, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["linear_probe", "lp_ft", "gradual_unfreezing"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "bert"])
def test_same_weights_and_scores(name, strategy, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 3}
    plain, unused = run(TINY_MODELS[name](), strategy, tmp_path, "never", **arguments)
    cached, used = run(TINY_MODELS[name](), strategy, tmp_path, "always", **arguments)
    assert not any(unused)
    assert used == {"linear_probe": [1], "lp_ft": [1, 0], "gradual_unfreezing": [1, 1, 1, 0]}[strategy]
    alike(plain.model, cached.model)
    for one, other in zip(plain.state.log_history[:-1], cached.state.log_history[:-1], strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert (key in one) == (key in other)
            assert key not in one or one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "bert"])
def test_same_weights_with_accumulation_and_resumed(name, tmp_path):
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments |= {"save_strategy": "steps", "save_steps": 3}
    plain, _ = run(TINY_MODELS[name](), "lp_ft", tmp_path / "plain", "never", **arguments)
    cached, used = run(TINY_MODELS[name](), "lp_ft", tmp_path / "cached", "always", **arguments)
    alike(plain.model, cached.model)
    for step in (3, 9):
        checkpoint = str(tmp_path / "cached" / f"checkpoint-{step}")
        resumed, used = run(TINY_MODELS[name](), "lp_ft", tmp_path / "r", "always", checkpoint, **arguments)
        assert used == ([True, False] if step == 3 else [False])
        same_tensors(snapshot(resumed.model), snapshot(cached.model))


@pytest.mark.slow
def test_worker_processes_see_the_stage_change(tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 16}
    workers |= {"eval_strategy": "steps", "eval_steps": 4}
    plain, _ = run(tiny_vit(), "lp_ft", tmp_path, "never", **workers)
    cached, used = run(tiny_vit(), "lp_ft", tmp_path, "always", **workers)
    assert used == [True, False]
    same_tensors(snapshot(plain.model), snapshot(cached.model), 1e-6)


class Counted(torch.utils.data.Dataset):
    """Counts how often each row is read."""

    def __init__(self, model, samples, jitter=0.0):
        self.inputs = tiny_inputs(model, samples)
        self.reads = [0] * samples
        self.jitter = jitter

    def __len__(self):
        return len(self.reads)

    def __getitem__(self, row):
        self.reads[row] += 1
        values = {name: column[row] for name, column in self.inputs.items()}
        values["pixel_values"] = values["pixel_values"] + self.jitter * random.random()
        return values


def counted_run(folder, use="auto", jitter=0.0, model=None, **arguments):
    model = model or tiny_resnet()
    train, evaluate = Counted(model, 40, jitter), Counted(model, 12)
    args = tiny_arguments(folder, **{**LONG, "eval_strategy": "steps", "eval_steps": 2, **arguments})
    data = {"train_dataset": train, "eval_dataset": evaluate}
    trainer = FTTrainer(model, args, strategy="linear_probe", frozen_cache=use, **data)
    trainer.train()
    return train, evaluate


@pytest.mark.slow
def test_inputs_are_read_once(tmp_path):
    train, evaluate = counted_run(tmp_path)
    # Once for recording; a few are read again: to check labels and whether samples stay the same, and to probe.
    assert sorted(train.reads)[20] == 1 and max(train.reads) <= 7
    assert sorted(evaluate.reads) == [1] * 8 + [2] * 4


@pytest.mark.slow
def test_samples_that_differ_each_time_are_never_recorded(tmp_path):
    train, evaluate = counted_run(tmp_path, jitter=0.1)
    assert min(train.reads) >= 2, "read from a record"
    assert sorted(evaluate.reads) == [6] * 8 + [7] * 4
    train, _ = counted_run(tmp_path, "always", jitter=0.1)
    assert min(train.reads) == 1, "the option overrides"
    train, _ = counted_run(tmp_path, "never")
    assert min(train.reads) >= 2


@pytest.mark.parametrize("every", [2, 3, 4])
def test_samples_that_differ_at_intervals_are_never_recorded(every, tmp_path):
    class Periodic(Counted):
        def __getitem__(self, row):
            self.jitter = 0.0 if row % every == 0 else 0.1
            return super().__getitem__(row)

    model = tiny_vit()
    train = Periodic(model, 48)
    trainer = FTTrainer(model, tiny_arguments(tmp_path, max_steps=12), strategy="linear_probe", train_dataset=train)
    assert starts_noted(trainer) == [False]


def test_rows_are_drawn_without_order_or_repetition():
    assert drawn_rows(3, 8) == [0, 1, 2] and drawn_rows(0, 8) == []
    drawn = drawn_rows(10_000, 8)
    assert drawn == drawn_rows(10_000, 8) == sorted(set(drawn)) and len(drawn) == 8
    assert len({row % 2 for row in drawn}) == 2 and len(set(np.diff(drawn))) == 7


def test_a_stage_of_one_epoch_records_nothing(tmp_path):
    train, _ = counted_run(tmp_path, max_steps=5)
    assert sorted(train.reads) == [1] * 36 + [2] * 4


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_tiny_data(samples, tmp_path):
    model = tiny_vit()
    data = Counted(model, samples)
    args = tiny_arguments(tmp_path, max_steps=12)
    FTTrainer(model, args, strategy="linear_probe", train_dataset=data, frozen_cache="always").train()


def test_random_states_are_left_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    assert same_each_time(lambda: {"x": torch.ones(2)})
    assert not same_each_time(lambda: {"x": torch.rand(2)})
    assert not same_each_time(lambda: {"x": torch.tensor(np.random.rand())})
    assert not same_each_time(lambda: {"x": random.random()})
    assert states() == before


def texts(lengths):
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(5, 64, (n,)).tolist(), "labels": n % 3} for n in lengths]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "expected"), [("linear_probe", [1]), ("gradual_unfreezing", [1, 0, 0, 0])])
def test_text_of_any_length(strategy, expected, tmp_path, caplog):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(59))]))
    collate = DataCollatorWithPadding(BertTokenizerFast(str(tmp_path / "vocab.txt")))
    data = texts([3, 5, 8, 4, 6, 7, 9, 3, 5, 4, 8, 6])
    results = []
    for use in ("never", "always"):
        model = still(tiny_bert())
        args = tiny_arguments(tmp_path, **LONG, per_device_train_batch_size=4)
        trainer = FTTrainer(model, args, strategy=strategy, train_dataset=data, data_collator=collate, frozen_cache=use)
        used = starts_noted(trainer)
        results.append(snapshot(model))
    assert used == expected
    same_tensors(*results, 1e-6)


@register("with_inputs")
class WithInputsConfig(FTConfig):
    """A probe with a term that reads the inputs."""

    def plan(self, model, state):
        term = Term("brightness", brightness, needs=frozenset({"inputs"}), weight=0.0)
        return Plan(stages=(Stage("probe", trains=self.anatomy(model).head.modules),), terms=(term,))


def brightness(view):
    return view.batch["pixel_values"].mean() * next(view.model.classifier.parameters()).sum()


def test_a_term_that_needs_the_inputs_gets_them(tmp_path):
    _, used = run(tiny_vit(), WithInputsConfig(), tmp_path, "always")
    assert used == [False]


@pytest.mark.slow
def test_a_file_holds_what_exceeds_the_memory_limit(tmp_path):
    (tmp_path / "files").mkdir()
    cache = FrozenCache("always", memory_gb=0.0, folder=str(tmp_path / "files"))
    seen = []
    put = RowStore.put

    def spy(self, rows, columns):
        seen.extend(path.name for path in (tmp_path / "files").rglob("frozen*"))
        put(self, rows, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowStore, "put", spy)
        filed, used = run(tiny_resnet(), "lp_ft", tmp_path / "run", cache)
    plain, _ = run(tiny_resnet(), "lp_ft", tmp_path / "run", "never")
    assert used == [True, False] and "frozen_prefix_activation_0" in seen
    same_tensors(snapshot(filed.model), snapshot(plain.model), 1e-6)
    del filed
    assert not list((tmp_path / "files").iterdir()), "the file was left behind"


def test_what_exceeds_the_disk_limit_is_not_kept(tmp_path, caplog):
    cache = FrozenCache("always", memory_gb=0.0, disk_gb=0.0)
    from hf_ft.trainer import stage_cache as cached_stages

    warnings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_stages.logger, "warning", warnings.append)
        _, used = run(tiny_resnet(), "linear_probe", tmp_path, cache)
    assert used == [False] and "memory_gb=0 and disk_gb=0" in warnings[0]


@pytest.mark.parametrize("strategy", ["linear_probe", DELTAConfig(weights="uniform")])
def test_where_the_disk_is_full_every_step_computes_it(strategy, tmp_path, monkeypatch):
    def full(number, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    warnings = []
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr("hf_ft.trainer.stage_cache.logger.warning", warnings.append)
    cached, used = run(tiny_resnet(), strategy, tmp_path, FrozenCache("always", memory_gb=0.0, folder=str(tmp_path)))
    assert used == [False] and "in every step" in warnings[0] and "No space left" in warnings[0]
    monkeypatch.undo()
    plain, _ = run(tiny_resnet(), strategy, tmp_path, "never")
    same_tensors(snapshot(cached.model), snapshot(plain.model))


def test_stores():
    first = {"a": torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "b": torch.zeros(2).bool()}
    store = RowStore(4, first, FrozenCache())
    values = torch.randn(4, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    store.put(torch.tensor([2, 0]), {"a": values[:2], "b": torch.tensor([True, False])})
    store.put(torch.tensor([3, 1]), {"a": values[2:], "b": torch.tensor([True, True])})
    taken = store.take(torch.tensor([0, 2, 1]))
    assert torch.equal(taken["a"], values[[1, 0, 3]]) and taken["b"].tolist() == [False, True, True]
    assert taken["a"].is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RowsDiffer, match=r"rows of 'a' differ: \(4, 9, 3\)"):
        wide = torch.zeros(1, 3, 4, 9).contiguous(memory_format=torch.channels_last)
        store.put(torch.tensor([0]), {"a": wide, "b": first["b"][:1]})
    rows = StagedRows(list("abcd"))
    assert rows[1] == "b" and len(rows) == 4
    rows.activate(store)
    assert rows[1] == 1 and rows.stored
    rows.activate(None)
    assert rows.__getitems__([0, 3]) == ["a", "d"]


def size(rows):
    """Bytes of everything recorded for a prefix."""
    return sum(store.bytes for store in rows.stores.values())


def test_several_borders_share_the_space(tmp_path):
    """One pass records all planned borders: in memory, together, no more than allowed; the rest in files."""
    model = tiny_resnet()
    data = tiny_inputs(model, 24)
    samples = Samples(24, lambda rows: {name: column[list(rows)] for name, column in data.items()})
    run = set_up(model, GradualUnfreezingConfig())
    objective = run.objective()

    def recorded(cache):
        recordings, prefixes = Recordings(model, samples, cache), []
        for stage in run.plan.stages[:-1]:
            objective.enter(stage)
            prefixes.append(recordings.prefix(objective))
            recordings.plan(prefixes[-1])
        assert all(prefix.model is model for prefix in prefixes)
        return recordings, prefixes, [recordings.store(prefix) for prefix in prefixes]

    _, _, free = recorded(FrozenCache("always"))
    room = max(size(rows) for rows in free) / GB
    recordings, prefixes, stores = recorded(FrozenCache("always", memory_gb=room, folder=str(tmp_path)))
    kept = {store.number: store for rows in stores for store in rows.stores.values()}.values()
    assert recordings.passes == 1 and len(kept) == 4, "three borders, and the labels once"
    assert 0 < sum(store.bytes for store in kept if store.in_memory) <= room * GB
    assert not all(store.in_memory for store in kept)
    for prefix, store in zip(prefixes, stores, strict=True):
        found = store.take(torch.arange(24))
        assert torch.equal(found["labels"], data["labels"])
        assert torch.allclose(found[f"{ACTIVATION}0"], prefix.record(data)[0], atol=1e-6)
    none = Recordings(model, samples, FrozenCache("always", memory_gb=0.0, disk_gb=0.0))
    objective.enter(run.plan.stages[0])
    assert none.store(none.prefix(objective)) is None and none.usable, "another border may fit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "sometimes"}, "use='sometimes'"),
        ({"memory_gb": -1.0}, "memory_gb=-1.0"),
        ({"folder": "/no/such/folder"}, "folder='/no/such/folder' is not a folder"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        FrozenCache(**options)
