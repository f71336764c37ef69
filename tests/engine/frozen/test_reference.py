"""The reference model: one frozen copy outside the module tree, whose states are computed once if possible."""

import copy
import gc
import itertools
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertTokenizerFast, DataCollatorWithPadding

from hf_ft import (
    AttentionTransferConfig,
    DELTAConfig,
    FrozenCache,
    FTTrainer,
    L2SPConfig,
    OptionError,
    Plan,
    SoftConfig,
    Term,
    TREDConfig,
    anatomy,
    set_up,
)
from hf_ft.core.config import FTConfig, register
from hf_ft.engine.batch import REFERENCE
from hf_ft.engine.frozen.reference import Reference
from hf_ft.functional import feature_distance
from hf_ft.models.feature_hooks import activations
from hf_ft.testing import TINY_MODELS, same_tensors, tiny_bert, tiny_inputs, tiny_resnet, tiny_vit, train
from hf_ft.testing.training import make_trainer, snapshot, tiny_arguments
from hf_ft.trainer.stage_cache import StageCache
from hf_ft.zoo.models import SHORT_NAMES, load_model

# A low rate, so that rounding differences from another batch size do not grow.
LONG = {"max_steps": 12, "optim": "sgd", "learning_rate": 1e-3}
# The second block of a ViT, whose names differ between versions of Transformers, and a module inside it.
BLOCK = anatomy(tiny_vit()).blocks[1].modules[0]
INNER = next(
    f"{BLOCK}.{n}" for n, _ in tiny_vit().get_submodule(BLOCK).named_children() if n in ("mlp", "intermediate")
)
UNIFORM = DELTAConfig(weights="uniform")
BOTH = [UNIFORM, AttentionTransferConfig(beta=1.0)]


def run(model, strategy, folder, use, resume=None, **arguments):
    """A training run, and whether each batch contained reference states."""
    trainer = make_trainer(model, strategy, folder, use, **{**LONG, **arguments})
    brought = []
    compute = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        if model.training:
            brought.append(any(name.startswith(REFERENCE) for name in inputs))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train(resume_from_checkpoint=resume)
    return trainer, brought


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "efficientnet", "convnext", "vit", "swin", "bert"])
@pytest.mark.parametrize("strategy", [BOTH, TREDConfig(criterion="none")], ids=["delta+at", "tred"])
def test_recorded_states_train_the_same(name, strategy, tmp_path):
    plain, none = run(TINY_MODELS[name](), strategy, tmp_path, "never")
    cached, all_of_them = run(TINY_MODELS[name](), strategy, tmp_path, "auto")
    assert none == [False] * 12 and all_of_them == [True] * 12
    for key, value in snapshot(plain.model).items():
        # The running variances of the tiny MobileNetV2, whose last maps have one position, differ most.
        tolerance = (5e-5 if name == "mobilenet_v2" else 1e-5) * max(1.0, float(value.double().abs().max()))
        same_tensors({key: value}, {key: snapshot(cached.model)[key]}, tolerance)


@pytest.mark.slow
def test_with_accumulation_worker_processes_and_resumed(tmp_path):
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    arguments |= {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 6}
    plain, _ = run(tiny_resnet(), BOTH, tmp_path / "plain", "never", **arguments)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    cached, brought = run(tiny_resnet(), BOTH, tmp_path / "cached", "always", **arguments, **workers)
    assert all(brought) and len(brought) == 24
    same_tensors(snapshot(plain.model), snapshot(cached.model), 1e-5)
    checkpoint = str(tmp_path / "cached" / "checkpoint-9")
    resumed, _ = run(tiny_resnet(), BOTH, tmp_path / "again", "always", checkpoint, **arguments)
    same_tensors(snapshot(resumed.model), snapshot(cached.model))


@pytest.mark.slow
def test_stages_with_recorded_prefix_and_recorded_reference(tmp_path):
    """LP-FT's probe starts from activations, its second stage from inputs with reference states beside them."""
    strategy = ["lp_ft", UNIFORM]
    plain, _ = run(tiny_vit(), strategy, tmp_path, "never", max_steps=16)
    cached, brought = run(tiny_vit(), strategy, tmp_path, "always", max_steps=16)
    assert not any(brought[:8]) and all(brought[10:]), "two batches were fetched before the stage changed"
    same_tensors(snapshot(plain.model), snapshot(cached.model), 1e-6)


def test_random_samples_are_never_recorded(tmp_path, monkeypatch):
    """The reference sees exactly the sample that the model sees."""

    class Jitter(torch.utils.data.Dataset):
        def __init__(self, model):
            self.inputs = tiny_inputs(model, 16)

        def __len__(self):
            return 16

        def __getitem__(self, row):
            values = {name: column[row] for name, column in self.inputs.items()}
            return {**values, "pixel_values": values["pixel_values"] + torch.rand(())}

    model = tiny_resnet()
    args = tiny_arguments(tmp_path, **LONG)
    trainer = FTTrainer(model, args, strategy=UNIFORM, train_dataset=Jitter(model))
    record = StageCache._record_reference
    found = []
    monkeypatch.setattr(
        StageCache, "_record_reference", lambda cache, dataset: found.append(record(cache, dataset)) or found[-1]
    )
    trainer.train()
    assert found == [None]


def test_no_room_and_no_epoch_to_repeat(tmp_path):
    _, brought = run(tiny_resnet(), UNIFORM, tmp_path, FrozenCache(memory_gb=0, disk_gb=0))
    assert not any(brought)
    _, brought = run(tiny_resnet(), UNIFORM, tmp_path, FrozenCache(memory_gb=0))
    assert all(brought), "from a file"
    _, brought = run(tiny_resnet(), UNIFORM, tmp_path, "auto", max_steps=4)
    assert not any(brought), "a single epoch reads each sample once"


def test_text_padded_per_batch(tmp_path):
    """Rows differ in length: nothing is recorded, and padded tokens do not count."""
    words = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])}
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    rows = [{**tokenizer(" ".join("abcdefgh"[: 1 + i % 7])), "labels": i % 3} for i in range(32)]
    args = tiny_arguments(tmp_path / "out", **LONG)
    model = tiny_bert()
    data = {"train_dataset": rows, "data_collator": DataCollatorWithPadding(tokenizer)}
    trainer = FTTrainer(model, args, strategy=[*BOTH, "bss", TREDConfig(epochs=2)], **data)
    trainer.train()
    logged = trainer.state.log_history[-2]
    assert all(logged[f"loss/{name}"] > 0 for name in ("delta", "attention_transfer", "bss", "tred"))


# --- the copy ---------------------------------------------------------------------------------------------


def copies_of(model_class):
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) is model_class)


def test_one_copy_outside_the_tree_serves_all_terms(tmp_path):
    model = tiny_resnet()
    before = copies_of(type(model))
    trainer = make_trainer(model, [*BOTH, TREDConfig(criterion="none")], tmp_path)
    trainer.train()
    assert copies_of(type(model)) == before + 1
    objective, reference = trainer._attempt.objective, trainer._run.reference
    inside = {id(p) for p in objective.parameters()}
    assert objective.reference is reference and not any(id(p) in inside for p in reference.model.parameters())
    assert not any("reference" in name for name in objective.state_dict())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in held or p.requires_grad or p.grad is not None for p in reference.model.parameters())
    assert not any(module.training for module in reference.model.modules())
    same_tensors(snapshot(reference.model), snapshot(tiny_resnet()))


def test_no_copy_if_starting_weights_suffice(tmp_path):
    for strategy in (L2SPConfig(), "bss", "full", DELTAConfig(alpha=0.0), AttentionTransferConfig(beta=0.0)):
        assert set_up(tiny_resnet(), strategy).reference is None


def test_it_is_not_saved_and_does_not_run_in_evaluation(tmp_path):
    trainer = make_trainer(tiny_resnet(), UNIFORM, tmp_path, "never", save_strategy="steps", save_steps=4, **LONG)
    trainer.train()
    trainer._run.reference.model = None
    assert trainer.evaluate()["eval_loss"] > 0
    stored = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert not any("reference" in name for name in stored)
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4")
    assert set(saved.state_dict()) == set(trainer.model.state_dict())


def lora(**more):
    torch.manual_seed(0)
    names = {name.rpartition(".")[2] for name, _ in tiny_vit().named_modules()}
    targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]
    return get_peft_model(
        tiny_vit(), LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"], lora_dropout=0.1, **more)
    )


@pytest.mark.parametrize("strategy", [UNIFORM, SoftConfig(source="head")], ids=["delta", "soft"])
def test_the_base_of_adapters_serves_without_a_copy(strategy, tmp_path, monkeypatch):
    """In two stages, with bf16 and resumed, it trains the same weights as with a copy, bit for bit."""
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "bf16": True}
    strategy = ["lp_ft", strategy]

    def trained(folder, resume=None):
        trainer = make_trainer(lora(), strategy, folder, "never", **given)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    alone = trained(tmp_path / "alone")
    assert alone._run.reference.model is alone.model
    assert any(p.requires_grad for p in alone.model.parameters())
    resumed = trained(tmp_path / "resumed", str(tmp_path / "alone" / "checkpoint-2"))
    monkeypatch.setattr("hf_ft.engine.frozen.reference.adapters_of", lambda model: ())
    copied = trained(tmp_path / "copied")
    assert copied._run.reference.model is not copied.model
    assert [e.get("loss") for e in alone.state.log_history] == [e.get("loss") for e in copied.state.log_history]
    for other in (resumed, copied):
        same_tensors(snapshot(alone.model), snapshot(other.model))


def test_a_copy_where_the_base_would_not_do():
    assert Reference(lora()).adapters
    for model in (lora(init_lora_weights=False), lora(bias="all"), tiny_vit()):
        assert Reference(model).model is not model and not Reference(model).adapters
    with_statistics = get_peft_model(tiny_resnet(), LoraConfig(r=2, target_modules=["convolution"]))
    assert not Reference(with_statistics).adapters, "BatchNorm statistics move"


def test_dtype_and_device_follow_the_model():
    model = tiny_resnet().to(torch.bfloat16)
    reference = Reference(model)
    batch = {**tiny_inputs(model), "pixel_values": tiny_inputs(model)["pixel_values"].bfloat16()}
    states = reference.states(["resnet.encoder.stages.0"], batch, torch.device("cpu"))
    assert states["resnet.encoder.stages.0"].dtype == torch.bfloat16
    with torch.device("meta"):
        assert Reference(model).states(["resnet.embedder"], {"pixel_values": torch.empty(2, 3, 32, 32).bfloat16()},
                                       torch.device("meta"))["resnet.embedder"].device.type == "meta"  # fmt: skip


def test_with_daft_it_is_the_converted_model(tmp_path):
    """Surgery comes first: the start is what training starts from."""
    trainer = make_trainer(tiny_resnet(), ["daft", UNIFORM], tmp_path)
    run = trainer._start_run()
    same_tensors(snapshot(run.reference.model), snapshot(run.model))
    assert not torch.equal(
        run.model.resnet.embedder.embedder.normalization.running_mean,
        tiny_resnet().resnet.embedder.embedder.normalization.running_mean,
    )


def test_resuming_from_another_start_is_refused(tmp_path):
    train(tiny_resnet(), UNIFORM, tmp_path, save_strategy="steps", save_steps=4)
    other = make_trainer(tiny_resnet(seed=5), UNIFORM, tmp_path, save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match="trained from weights other than"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# --- what a term sees -------------------------------------------------------------------------------------


@register("probe_of_states")
class ProbeConfig(FTConfig):
    """Passes the view to a function of the test; without one, it is full fine-tuning, to other tests that try all."""

    look = None
    layers = (BLOCK,)

    def plan(self, model, state):
        fn = ProbeConfig.look
        return Plan(terms=(Term("probe", fn, layers=self.layers, needs=frozenset({"reference"})),) if fn else ())


def test_the_view_shows_both_states_in_float32_under_autocast():
    seen = {}

    def look(view):
        now, before = view.states[BLOCK], view.reference[BLOCK]
        seen["dtypes"] = now.dtype, before.dtype
        seen["grad"] = now.requires_grad, before.requires_grad
        return feature_distance(now, before)

    ProbeConfig.look = staticmethod(look)
    model = tiny_vit().train()
    objective = set_up(model, ProbeConfig()).objective().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = objective(**tiny_inputs(model))
    assert seen == {"dtypes": (torch.float32,) * 2, "grad": (True, False)}
    assert outputs["terms"]["probe"].item() == 0.0  # the same computation on both sides
    assert objective._view.states == {} and objective._view.reference == {}, "the graph is let go"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layer", [BLOCK, INNER])
@pytest.mark.newest
def test_gradient_checkpointing(reentrant, layer, tmp_path):
    """Reentrant checkpointing hides what is computed inside a block, so it is refused, not ignored."""
    config = DELTAConfig(weights="uniform", alpha=1.0, layers=(layer,))
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if reentrant and layer == INNER:
        with pytest.raises(OptionError, match="use_reentrant': False"):
            train(tiny_vit(), config, tmp_path, **arguments)
        return
    with_it = train(tiny_vit(), config, tmp_path, optim="sgd", **arguments)
    without = train(tiny_vit(), config, tmp_path, optim="sgd")
    same_tensors(snapshot(with_it.model), snapshot(without.model), 1e-6)


def test_terms_are_computed_outside_autocast():
    """Inside, the product of two float32 matrices would be bfloat16."""
    seen = []

    def look(view):
        now = view.states[BLOCK]
        seen.append((now[0] @ now[0].T).dtype)
        return now.mean()

    ProbeConfig.look = staticmethod(look)
    model = tiny_vit()
    objective = set_up(model, ProbeConfig()).objective().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective(**tiny_inputs(model))
    assert seen == [torch.float32]


class Plain(nn.Module):
    """Convolutions whose outputs a ReLU overwrites, as in VGG."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_labels=3, problem_type="single_label_classification")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = [3, 8, 8, 8]
            pairs = itertools.pairwise(sizes)
            self.body = nn.ModuleList(nn.Sequential(nn.Conv2d(*pair, 3), nn.ReLU(inplace=True)) for pair in pairs)
            self.classifier = nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        for layer in self.body:
            pixel_values = layer(pixel_values)
        logits = self.classifier(pixel_values.mean(dim=(2, 3)))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Plain, {"blocks": r"body\.\d+"}),
        (tiny_resnet, {"layers": ("resnet.encoder.stages.1.layers.1.layer",)}),
        (TINY_MODELS["regnet"], {"layers": ("regnet.encoder.stages.1.layers.1.layer",)}),
    ],
)
def test_a_layer_is_compared_as_it_was_before_the_next_overwrites_it(make, options):
    """A ReLU, or the shortcut that a residual block adds."""
    model, batch = make(), tiny_inputs(tiny_resnet())
    strategy = DELTAConfig(weights="uniform", beta=0.0, norm_mode="eval", **options)
    run = set_up(model, strategy)
    objective = run.objective().train()
    assert objective(**batch)["terms"]["delta"] == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    (term,) = run.plan.terms
    pairs = [[activations(each, [x], batch)[x] for each in (model, run.reference.model)] for x in term.layers]
    assert make is not Plain or all(now.min() < 0 for now, _ in pairs), "these are not the convolutions' outputs"
    expected = term.weight * sum(feature_distance(*pair) for pair in pairs) / 2
    torch.testing.assert_close(objective(**batch)["terms"]["delta"], expected)


def test_shared_layers_have_no_single_output(tmp_path):
    config = transformers.AlbertConfig(
        hidden_size=16, embedding_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        vocab_size=64, max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config)
    for strategy in (UNIFORM, AttentionTransferConfig()):
        with pytest.raises(OptionError, match="called several times.*L2SPConfig"):
            train(copy.deepcopy(model), strategy, tmp_path)


def test_a_layer_before_the_first_trained_one_is_a_constant(tmp_path):
    """It is in the same part, so the term stays: it rightly gets no gradient from there."""
    model = tiny_resnet().requires_grad_(False)
    for trained in (model.classifier, model.resnet.encoder.stages[1].layers[1].layer[1].normalization):
        trained.requires_grad_(True)
    trainer = train(model, UNIFORM, tmp_path)
    assert trainer.state.log_history[-2]["loss/delta"] >= 0


class Boxes(torch.utils.data.Dataset):
    """Has a column that the model does not accept, with a different length in each row."""

    def __init__(self):
        self.inputs = tiny_inputs(tiny_resnet(), 16)

    def __len__(self):
        return 16

    def __getitem__(self, row):
        return {**{name: column[row] for name, column in self.inputs.items()}, "boxes": torch.zeros(row)}


def test_unused_columns_are_dropped_beside_recorded_states(tmp_path):
    args = tiny_arguments(tmp_path, **LONG)
    trainer = FTTrainer(tiny_resnet(), args, strategy=UNIFORM, train_dataset=Boxes(), frozen_cache="always")
    trainer.train()
    assert trainer.state.global_step == 12


def test_in_a_handwritten_loop():
    """The reference follows the model without a Trainer, as set_up and the objective do."""
    model = tiny_resnet()
    run = set_up(model, BOTH)
    objective = run.objective().train()
    optimizer = torch.optim.SGD(run.param_groups(lr=1e-2))
    distances = []
    for seed in range(3):
        outputs = objective(**tiny_inputs(model, 8, seed))
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        distances.append(outputs["terms"]["delta"].item())
    assert all(value > 0 for value in distances)
    same_tensors(snapshot(run.reference.model), snapshot(tiny_resnet()))


@pytest.mark.parametrize("tuner", ["lora", "prompt"])
def test_peft(tuner, tmp_path):
    """Adapters: trained, saved and resumed as without these terms. Prompts: their own tokens before the text's."""
    if tuner == "lora":
        lora = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
        make = lambda: peft_model(tiny_resnet(), lora)  # noqa: E731
    else:
        make = lambda: peft_model(tiny_bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))  # noqa: E731
    strategy = [UNIFORM, AttentionTransferConfig(beta=1.0), "bss", TREDConfig(epochs=2)]
    arguments = {"save_strategy": "steps", "save_steps": 4}
    whole = train(make(), strategy, tmp_path, **arguments)
    again = train(make(), strategy, tmp_path, resume=str(tmp_path / "checkpoint-4"), **arguments)
    same_tensors(snapshot(whole.model), snapshot(again.model))
    logged = whole.state.log_history[-2]
    assert all(logged[f"loss/{name}"] >= 0 for name in ("delta", "attention_transfer", "bss", "tred"))


def peft_model(model, config):
    torch.manual_seed(0)
    return get_peft_model(model, config)


def test_terms_on_parts_that_are_always_frozen_are_reported(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_ft.engine.run.logger.warning_once", said.append)
    trainer = train(tiny_vit(), ["linear_probe", UNIFORM], tmp_path)
    assert said and all("delta has no effect: in every stage, all its inputs are frozen" in text for text in said)
    assert not any("loss/delta" in entry for entry in trainer.state.log_history)
    said.clear()
    train(tiny_vit(), ["lp_ft", UNIFORM], tmp_path)
    assert not said


def test_a_layer_that_is_never_called(tmp_path):
    blocks = BLOCK.rpartition(".")[0]
    with pytest.raises(OptionError, match=f"'{blocks}' produced no output"):
        train(tiny_vit(), DELTAConfig(weights="uniform", layers=(blocks,)), tmp_path)


def test_a_last_batch_of_one_sample_is_read_without_gradients(tmp_path):
    trainer = make_trainer(tiny_resnet(), BOTH, tmp_path)
    trainer.train_dataset = trainer.train_dataset.select(range(9))
    trainer.train()
    assert trainer.state.global_step == 8


def test_the_model_itself_is_left_without_hooks(tmp_path):
    model = tiny_resnet()
    train(model, [*BOTH, "bss"], tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Module))


@pytest.mark.real
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet-lite0"])
def test_on_real_networks(name, tmp_path):
    """Terms are 0 at the start in eval mode, and train the same with and without recorded states."""
    package = SHORT_NAMES[name].requirement.partition("==")[0].replace("-", "_")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    strategy = [DELTAConfig(weights="uniform", alpha=1e-3), AttentionTransferConfig(beta=1.0), "bss"]
    random = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 64, 64, generator=random), "labels": i % 2} for i in range(24)]
    weights = []
    for use in ("never", "always"):
        model, _ = load_model(name, num_labels=2, image_size=64)
        args = tiny_arguments(tmp_path / use, max_steps=4, optim="sgd", learning_rate=1e-4)
        trainer = FTTrainer(model, args, strategy=strategy, train_dataset=data, frozen_cache=use)
        objective = trainer._start_run().objective()
        objective.model.eval()
        batch = {"pixel_values": torch.stack([d["pixel_values"] for d in data[:4]]), "labels": torch.zeros(4).long()}
        terms = objective(**batch)["terms"]
        assert terms["delta"].item() == terms["attention_transfer"].item() == 0.0 < terms["bss"].item()
        trainer.train()
        weights.append(snapshot(trainer.model))
    for key, value in weights[0].items():
        same_tensors({key: value}, {key: weights[1][key]}, 1e-4 * max(1.0, float(value.double().abs().max())))
