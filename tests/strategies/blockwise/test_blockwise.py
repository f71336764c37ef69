"""The search finds the broken block; every candidate has the same start; the result trains only that block."""

import copy
import hashlib
import json

import optuna
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from torch import nn

from hf_ft import BlockScores, BlockSearch, BlockwiseConfig, FTConfig, FTTrainer, OptionError
from hf_ft.core import State
from hf_ft.engine.checkpoint import read_states
from hf_ft.models.weight_layers import weight_layers
from hf_ft.search import evaluate as short_trainings
from hf_ft.strategies.blockwise.candidates import candidates
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.model_card import card_of
from tests.strategies.blockwise.known_block import Images, accuracy, break_block, knowing_model

QUICK = {"search_epochs": 2, "search_seeds": 1, "storage": "memory"}


def searched(model, folder, frozen_cache="auto", data=None, **options):
    config = BlockwiseConfig(**{**QUICK, **options})
    args = tiny_arguments(folder, optim="adamw_torch", per_device_train_batch_size=8)
    trainer = FTTrainer(
        model, args, strategy=config, train_dataset=data or tiny_data(model, 32), frozen_cache=frozen_cache
    )
    return BlockSearch(model, config, trainer.context(), progress=False)


# --- what it finds ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing():
    model = knowing_model()
    assert accuracy(model) > 0.9
    return model


@pytest.mark.slow
def test_the_broken_block_is_found(knowing, tmp_path, broken=2, quarter=1):
    model = break_block(copy.deepcopy(knowing), broken)
    assert accuracy(model) < 0.5
    config = BlockwiseConfig(scheme="block", search_epochs=5, search_seeds=1, storage="memory", baselines=False)
    args = tiny_arguments(tmp_path, learning_rate=1e-2, per_device_train_batch_size=16, optim="adamw_torch")
    trainer = FTTrainer(model, args, strategy=config, train_dataset=Images(160))
    scores = BlockSearch(model, config, trainer.context(), progress=False).run()
    assert scores.best.candidate.name == f"block{broken}" and scores.best.candidate.quarter == quarter
    others = [score.mean for score in scores.scores if score is not scores.best]
    assert scores.best.mean > max(others) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_the_cache_changes_no_score(name, tmp_path):
    found = []
    for use in ("never", "always"):
        search = searched(TINY_MODELS[name](), tmp_path, use, metric="loss", scheme="block")
        found.append(search.run())
        assert search.trainings.recordings.passes == (use == "always"), (
            "one pass over the samples records for all candidates"
        )
    assert [s.candidate.name for s in found[0].scores] == [s.candidate.name for s in found[1].scores]
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    assert found[0].best.candidate == found[1].best.candidate


@pytest.mark.slow
def test_all_start_alike_and_the_model_is_left_alone(tmp_path, monkeypatch):
    model = TINY_MODELS["mobilenet_v2"]().train()
    model.mobilenet_v2.conv_stem.requires_grad_(False)
    before = snapshot(model)
    flags = [(p.requires_grad) for p in model.parameters()]
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    starts, orders = {}, {}
    fit = short_trainings.fit

    def spy(run, recipe, batches, rows, epochs, seed, after_epoch):
        starts.setdefault(seed, []).append(snapshot(run.model))
        orders.setdefault(seed, []).append((tuple(rows), epochs))
        fit(run, recipe, batches, rows, epochs, seed, after_epoch)

    monkeypatch.setattr(short_trainings, "fit", spy)
    search = searched(model, tmp_path, search_seeds=2)
    scores = search.run()
    assert len(starts[0]) == len(starts[1]) == len(scores.scores) + 2
    for seed in starts:
        assert len(set(orders[seed])) == 1
        for start in starts[seed][1:]:
            same_tensors(start, starts[seed][0])
    same_tensors(starts[0][0], before)
    changed = {name for name in before if not torch.equal(starts[0][0][name], starts[1][0][name])}
    assert changed == {"classifier.weight"}, "the second seed draws the head anew, and nothing else"
    rows = {seed: search.trainings.rows(seed) for seed in starts}
    for seed, (train, held_out) in rows.items():
        assert orders[seed][0][0] == tuple(train) and not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(rows[0][0] + rows[0][1])
    assert set(rows[0][1]) != set(rows[1][1]), "the second seed holds out other samples"
    same_tensors(snapshot(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta


@pytest.mark.slow
def test_a_last_row_on_its_own_trains_no_batch_norm(tmp_path):
    """With accumulation, an update may be large and its last batch still have one row, whose feature map is 1x1."""
    model = TINY_MODELS["mobilenet_v2"]()
    arguments = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    config = BlockwiseConfig(**QUICK, validation=0.26)
    args = tiny_arguments(tmp_path, **arguments)
    trainer = FTTrainer(model, args, strategy=config, train_dataset=tiny_data(model, 34))
    search = BlockSearch(model, config, trainer.context(), progress=False)
    assert len(search.trainings.rows(0)[0]) == 25  # 16 and 8 + 1
    search.trainings.train(search._start(search.candidates[0], 0), 0)


@pytest.mark.parametrize(("samples", "draws"), [(32, 4), (300, 3), (400, 2), (800, 1)])
def test_fewer_samples_are_drawn_more_often(samples, draws, tmp_path):
    """A quarter of them is held out; 200 are to be scored."""
    model = tiny_resnet()
    search = searched(model, tmp_path, data=tiny_data(model, samples), search_seeds="auto")
    assert search.seeds == tuple(range(draws))


def test_a_search_that_must_be_short_draws_less_before_it_trains_less():
    model, config = tiny_resnet(), BlockwiseConfig()
    firsts = [min(one.layers) for one in candidates(model, "stage")]
    draw = 5 * 0.75 * sum(1 - first / len(weight_layers(model)) for first in firsts)  # in epochs of the whole network

    def fitted(epochs, config=config):
        found = config.within(epochs, model)
        assert not found.baselines
        return found.search_seeds, found.search_epochs

    assert fitted(4.01 * draw) == ("auto", 5) and fitted(2.01 * draw) == (2, 5)
    assert fitted(0.61 * draw) == (1, 3) and fitted(0.01) == (1, 1)
    assert fitted(2.01 * draw, BlockwiseConfig(search_seeds=5)) == (5, 2)


@pytest.mark.slow
def test_an_interrupted_search_continues(tmp_path, monkeypatch):
    storage = str(tmp_path / "search.db")
    whole = searched(tiny_resnet(), tmp_path, metric="loss").run()
    calls = []
    fit = short_trainings.fit

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        fit(*args, **kwargs)

    monkeypatch.setattr(short_trainings, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        searched(tiny_resnet(), tmp_path, metric="loss", storage=storage).run()
    resumed = searched(tiny_resnet(), tmp_path, metric="loss", storage=storage).run()
    assert len(calls) == 3 + 3, "five trials, of which two were finished"
    again = searched(tiny_resnet(), tmp_path, metric="loss", storage=storage).run()
    assert len(calls) == 6 and again == resumed
    assert [s.scores for s in resumed.scores] == [s.scores for s in whole.scores]
    # Other settings make another study in the same storage.
    searched(tiny_resnet(), tmp_path, metric="loss", storage=storage, search_epochs=1).run()
    searched(tiny_resnet(), tmp_path, metric="loss", storage=storage, halving=True).run()
    assert len(calls) == 16 and len(optuna.get_all_study_names(f"sqlite:///{storage}")) == 3


def test_another_process_recognises_the_search(tmp_path):
    """The study's name depends only on model, data and options, even if no labels can be read."""
    model = TINY_MODELS["mobilenet_v1"](num_labels=4)
    data = Images(20)
    search = searched(model, tmp_path, data=data)
    assert search.context.labels is None
    columns = {"labels": data.labels, "pixel_values": data.pixels}
    plain = b"".join(column.contiguous().numpy().tobytes() for column in columns.values())
    assert search._signature["data"] == hashlib.sha256(plain).hexdigest()
    assert searched(model, tmp_path, data=Images(20))._signature == search._signature
    assert searched(model, tmp_path, data=Images(20, seed=2))._signature != search._signature


@pytest.mark.slow
def test_halving_stops_the_worse_ones(tmp_path):
    model = tiny_vit(num_hidden_layers=8)
    search = searched(model, tmp_path, halving=True, search_epochs=6, scheme="block", metric="loss")
    scores = search.run()
    pruned = [score for score in scores.scores if score.pruned]
    assert 3 <= len(pruned) < len(scores.scores)
    assert all(score.epochs < 6 for score in pruned) and not scores.best.pruned
    assert all(score.epochs == 6 and not score.pruned for score in scores.baselines.values())


@pytest.mark.slow
def test_top_layers_join_the_best(tmp_path):
    layers = searched(tiny_resnet(), tmp_path, scheme="layer", metric="loss").run()
    ranked = sorted(layers.scores, key=lambda s: (-s.mean, -s.candidate.centre))
    found = searched(tiny_resnet(), tmp_path, scheme="top_layers", top=3, metric="loss").run()
    assert [score.candidate.name for score in found.scores] == ["top1", "top2", "top3"]
    assert found.scores[0].scores == ranked[0].scores
    assert set(found.scores[2].candidate.layers) == {score.candidate.layers[0] for score in ranked[:3]}


# --- as a strategy ----------------------------------------------------------------------------------------


def trained_by(config, model, folder, **arguments):
    before = snapshot(model)
    trainer = make_trainer(model, config, folder, **arguments)
    trainer.train()
    after = snapshot(trainer.model)
    return trainer, {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("block", "modules"),
    [
        ("stage0", ["resnet.encoder.stages.0"]),
        (0, ["resnet.embedder"]),
        (-1, ["resnet.encoder.stages.1"]),
        ("last_quarter", ["resnet.encoder.stages.1"]),
        ("head", []),
        ("all", [""]),
    ],
)
def test_a_block_by_name(block, modules, tmp_path):
    model = tiny_resnet()
    _, changed = trained_by(BlockwiseConfig(block=block), model, tmp_path, optim="sgd")
    names = [*modules, "classifier"]
    assert changed == {n for n in snapshot(model) if any(n.startswith(module) for module in names)}


@pytest.mark.slow
def test_auto_searches_once_and_keeps_the_table(tmp_path, monkeypatch):
    config = BlockwiseConfig(search_epochs=1, search_seeds=2)
    saving = {"save_strategy": "steps", "save_steps": 4, "optim": "sgd"}
    trainer, changed = trained_by(config, tiny_resnet(), tmp_path / "run", **saving)
    state = read_states(tmp_path / "run" / "checkpoint-4")["blockwise"]
    scores = config.scores(state)
    assert scores == BlockScores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert len(scores.scores) == 3 and scores.seeds == (0, 1) and set(scores.baselines) == {"head", "all"}
    block = scores.best.candidate.modules
    assert {n for n in changed if not n.startswith("classifier")} == {
        n for n in snapshot(trainer.model) if any(n.startswith(module) for module in block)
    }
    assert (tmp_path / "run" / "block_search.db").is_file()
    card = (tmp_path / "run" / "checkpoint-4" / "README.md").read_text()
    assert f"best: {scores.best.candidate.name}, " in card and "head only: head, " in card and "Barakat" in card
    monkeypatch.setattr("hf_ft.search.evaluate.run_trials", lambda *a, **k: pytest.fail("searched again"))
    resumed = make_trainer(tiny_resnet(), config, tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    same_tensors(snapshot(resumed.model), snapshot(trainer.model))


def test_head_rate(tmp_path):
    trainer = make_trainer(tiny_vit(), BlockwiseConfig(block=1, head_lr=0.5), tmp_path)
    trainer.train()
    assert {group["stage_rates"] for group in trainer.optimizer.param_groups} == {(0.5,), (0.01,)}


def test_samples_without_augmentation_are_searched_on(tmp_path):
    model, config = tiny_vit(), BlockwiseConfig(**QUICK)
    plain, augmented = tiny_data(model, 32), tiny_data(model, 32, seed=5)
    trainer = FTTrainer(
        model, tiny_arguments(tmp_path), strategy=config, train_dataset=augmented, plain_train_dataset=plain
    )
    assert torch.equal(trainer.context().samples.read([3, 1])["pixel_values"], plain[[3, 1]]["pixel_values"])
    trainer.plain_train_dataset = plain.select(range(5))
    with pytest.raises(OptionError, match="plain_train_dataset has 5 samples, but train_dataset has 32"):
        trainer.train()


# --- with adapters ----------------------------------------------------------------------------------------

TUNED = {
    "resnet": tiny_resnet,
    "vit": tiny_vit,
    "bert": tiny_bert,
    "mobilenet_v2": lambda: TINY_MODELS["mobilenet_v2"](tf_padding=False),  # code accesses what a wrapper hides
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_adapters_in_the_block_alone(name, tmp_path):
    config = BlockwiseConfig(block=-2, tuner=LoraConfig(r=2, init_lora_weights=False))
    base = TUNED[name]()
    block = config.chosen(base, None).modules
    trainer = make_trainer(
        copy.deepcopy(base), config, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2
    )
    before = snapshot(base)
    trainer.train()
    model = trainer.model
    assert isinstance(model, PeftModel)
    adapted = {
        n.partition(".lora_A")[0].removeprefix("base_model.model.") for n in model.state_dict() if ".lora_A" in n
    }
    assert adapted and all(any(n.startswith(module) for module in block) for n in adapted)
    convolutions = [base.get_submodule(n) for n in adapted if isinstance(base.get_submodule(n), nn.Conv2d)]
    assert all(convolution.groups == 1 for convolution in convolutions)
    assert "| tuner | `LoraConfig(r=2, init_lora_weights=False)` |" in str(card_of(trainer, None, tmp_path))
    # Saved like PEFT, and loaded with PEFT alone: adapter, head, the block's norms and their buffers.
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "saved").eval()
    inputs = tiny_inputs(base)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
        assert not torch.equal(base(**inputs).logits, loaded(**inputs).logits)
    # Everything except adapters and saved modules equals the base, bit for bit.
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): t
             for n, t in model.state_dict().items() if ".lora_" not in n and ".modules_to_save" not in n}  # fmt: skip
    same_tensors(plain, before)
    resumed = make_trainer(copy.deepcopy(base), config, tmp_path / "again", max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    same_tensors(snapshot(resumed.model), snapshot(model))


@pytest.mark.slow
def test_the_search_finds_where_adapters_belong(tmp_path):
    found = [
        searched(tiny_vit(), tmp_path, use, tuner=LoraConfig(r=2), metric="loss", scheme="block").run()
        for use in ("never", "always")
    ]
    assert len(found[0].scores) == 4
    for one, other in zip(found[0].scores, found[1].scores, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
    trainer = make_trainer(tiny_vit(), BlockwiseConfig(tuner=LoraConfig(r=2), **QUICK), tmp_path)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)


def test_the_tuner_survives_the_round_trip(tmp_path):
    tuner = LoraConfig(r=3, lora_alpha=7, target_modules=["query", "value"], bias="none", rank_pattern={"query": 5})
    config = BlockwiseConfig(tuner=tuner)
    config.save_pretrained(tmp_path)
    loaded = FTConfig.from_pretrained(tmp_path)
    assert loaded == config and isinstance(loaded.tuner, LoraConfig)
    assert loaded.tuner.r == 3 and set(loaded.tuner.target_modules) == {"query", "value"}
    assert json.loads((tmp_path / "ft_config.json").read_text())["strategies"][0]["tuner"]["peft_type"] == "LORA"


def test_named_targets_are_kept_to_the_block(tmp_path):
    config = BlockwiseConfig(block="stage1", tuner=LoraConfig(r=2, target_modules=["query"]))
    model = tiny_bert()
    (surgery,) = config.plan(model, State()).surgery
    assert surgery.targets == ("bert.encoder.layer.1.attention.self.query",)
    with pytest.raises(OptionError, match="supports an adapter"):
        BlockwiseConfig(block="stage1", tuner=LoraConfig(target_modules=["nowhere"])).plan(model, State())
    with pytest.raises(OptionError, match="PromptTuningConfig does not adapt modules"):
        BlockwiseConfig(block="stage1", tuner=PromptTuningConfig(num_virtual_tokens=2)).plan(model, State())
    with pytest.raises(OptionError, match="PEFT rejects LoraConfig"):
        make_trainer(model, BlockwiseConfig(block="stage1", tuner=LoraConfig(r=0)), tmp_path).train()


def test_other_adapters(tmp_path):
    trainer = make_trainer(tiny_bert(), BlockwiseConfig(block="stage1", tuner=IA3Config()), tmp_path)
    trainer.train()
    assert any("ia3" in name for name in trainer.model.state_dict())


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "stage9"}, r"no candidate 'stage9'.*stem, stage0, stage1"),
        ({"block": 7}, r"no candidate 7.*stem, stage0, stage1"),
        ({"block": 0, "scheme": "window", "length": 99}, "length=99 must be between 1 and 8, the number of layers"),
        ({"block": "top2", "scheme": "top_layers"}, "needs that search's ranking"),
    ],
)
def test_a_block_that_does_not_exist(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        make_trainer(tiny_resnet(), BlockwiseConfig(**options), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "blocks"}, "scheme='blocks' is not"),
        ({"search_epochs": 0}, "search_epochs=0 lies outside"),
        ({"validation": 1.0}, "validation=1.0 lies outside"),
        ({"tuner": {"r": 8}}, "tuner=.*is not PeftConfig or None"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(OptionError, match=message):
        BlockwiseConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "f2"}, "metric='f2' is unknown: choose loss, accuracy"),
        ({"validation": 0.001}, r"validation=0.001 of 32 training samples leaves 32 to train on and 0 to score on"),
        ({"scheme": "window", "length": 99}, "length=99 must be between 1 and 8"),
        ({"storage": "/no/such/folder/x.db"}, "/no/such/folder"),
        ({"storage": "oracle+nothing://x"}, "oracle"),
    ],
)
def test_a_search_that_cannot_work(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        searched(tiny_resnet(), tmp_path, **options).run()


def test_data_that_cannot_be_read_by_index(tmp_path):
    model = tiny_resnet()
    stream = tiny_data(model).to_iterable_dataset()
    with pytest.raises(OptionError, match="map-style"):
        FTTrainer(model, tiny_arguments(tmp_path), strategy=BlockwiseConfig(**QUICK), train_dataset=stream)
