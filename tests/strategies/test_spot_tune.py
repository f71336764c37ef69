"""Each sample takes its own path through fine-tuned and pretrained blocks; both are saved in one folder."""

import copy
import json

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

from hf_ft import CheckpointError, L2SPConfig, OptionError, SpotTuneConfig, WiSEFTConfig, from_pretrained, set_up
from hf_ft.models.anatomy import anatomy
from hf_ft.models.gated.per_sample import decisions
from hf_ft.models.preserve import random_states
from hf_ft.testing import LAWS, TINY_MODELS, same_tensors, tiny_bert, tiny_collaborative, tiny_inputs, tiny_resnet
from hf_ft.testing.families import samples, tiny
from hf_ft.testing.models import tiny_timm, tiny_vit
from hf_ft.testing.training import equipped, make_trainer, snapshot, tiny_batch, train
from tests.forked import python


def gated(make, spread=0.3, **options):
    """A model with two paths in float64, whose fine-tuned weights differ from the pretrained ones."""
    model = set_up(make().double(), SpotTuneConfig(**options)).model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "two_paths" not in name:
                parameter.add_(spread * parameter.std() * torch.randn_like(parameter))
    return model.eval()


def composed(model, make, chosen):
    """A plain model with the fine-tuned weights, but the pretrained ones in the blocks that are not chosen."""
    plain, start = make().double(), make().double()
    tuned = {name: value for name, value in model.state_dict().items() if "two_paths" not in name}
    plain.load_state_dict(tuned)
    for block, one in zip(anatomy(start).blocks, chosen, strict=True):
        for unit in block.modules if not one else ():
            plain.get_submodule(unit).load_state_dict(start.get_submodule(unit).state_dict())
    return plain.eval()


def double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("name", ["resnet", "bert", "swin", "mobilenet_v1"])
def test_each_sample_takes_its_own_path(name):
    make = TINY_MODELS[name]
    model, batch = gated(make), double(tiny_inputs(make(), 6))
    torch.manual_seed(0)
    chosen = torch.rand(6, len(anatomy(make()).blocks)) < 0.5
    model.two_paths.gate.forward = lambda features: chosen.double()
    found = model(**batch).logits
    for row in range(6):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        wanted = composed(model, make, chosen[row])(**one).logits
        torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-12, rtol=1e-9)
    assert (found - model.two_paths.pretrained(**batch).logits).abs().min() > 1e-6


def test_the_gate_reads_the_pretrained_features():
    model = gated(tiny_bert)
    batch, seen = double(tiny_inputs(model)), []
    model.two_paths.gate.register_forward_pre_hook(lambda gate, inputs: seen.append(inputs[0]))
    model(**batch)
    del batch["labels"]
    wanted = tiny_bert().double().bert(**batch).pooler_output
    torch.testing.assert_close(seen[0], wanted, atol=1e-12, rtol=0)
    assert not seen[0].requires_grad


@pytest.mark.parametrize("noise", [True, False])
def test_the_gradient_of_a_decision_is_that_of_the_softmax(noise):
    torch.manual_seed(0)
    logits, temperature = torch.randn(50, 3, 2).double().requires_grad_(), 0.7
    upstream = torch.randn(50, 3).double()
    torch.manual_seed(1)
    gumbel = -torch.empty_like(logits).exponential_().log() if noise else torch.zeros_like(logits)
    torch.manual_seed(1)
    chosen = decisions(logits, temperature, noise)
    (chosen * upstream).sum().backward()
    z = (logits + gumbel).detach()
    p = 1 / (1 + torch.exp((z[..., 0] - z[..., 1]) / temperature))
    assert torch.equal(chosen, (z[..., 1] > z[..., 0]).double()) and 0 < chosen.mean() < 1
    slope = upstream * p * (1 - p) / temperature
    torch.testing.assert_close(logits.grad, torch.stack([-slope, slope], dim=-1), atol=1e-12, rtol=0)


def test_decisions_are_drawn_with_the_probabilities_of_the_policy():
    logits = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    torch.manual_seed(0)
    drawn = decisions(logits.expand(20_000, 3, 2), 5.0, True).mean(0)
    wanted = torch.sigmoid(logits[:, 1] - logits[:, 0])
    assert (drawn - wanted).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_the_gradient_of_a_share_is_that_of_the_weighted_sum():
    model, batch = gated(tiny_resnet), double(tiny_inputs(tiny_resnet(), 3))
    share = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]).double().requires_grad_()

    def loss(values):
        model.two_paths.gate.forward = lambda features: values
        return model(**batch).loss

    loss(share).backward()
    step = 1e-6
    for place in ((0, 0), (1, 1), (2, 2)):
        moved = torch.zeros_like(share)
        moved[place] = step
        with torch.no_grad():
            slope = float(loss(share + moved) - loss(share - moved)) / (2 * step)
        assert float(share.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_evaluation_depends_only_on_the_sample():
    model = gated(tiny_bert)
    batch = double(tiny_inputs(model, 6))
    before = random_states()
    with torch.no_grad():
        together = model(**batch).logits
        wider = {name: nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for name, value in batch.items()}
        padded = model(**wider).logits
        alone = torch.cat([model(**{key: value[i : i + 1] for key, value in batch.items()}).logits for i in range(6)])
    assert random_states() == before
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(together, padded, atol=1e-12, rtol=0)
    model.train()
    model.two_paths.gate.policy[3].bias.data.zero_()
    assert len({float(model(**batch).loss.detach()) for _ in range(6)}) > 1


def test_the_frozen_copy_stays_even_if_all_statistics_move(tmp_path):
    start = snapshot(tiny_resnet())
    model = train(tiny_resnet(), SpotTuneConfig(norm_mode="train"), tmp_path, max_steps=3).model
    same_tensors(snapshot(model.two_paths.pretrained), start)
    now = snapshot(model)
    assert all(not torch.equal(now[name], start[name]) for name in start if now[name].is_floating_point())


def test_rates():
    run = set_up(tiny_resnet(), SpotTuneConfig(policy_lr=0.5, head_lr=0.25))
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in run.param_groups(0.125) for p in group["params"]}
    assert rates["two_paths.gate.policy.1.weight"] == 0.5 and rates["classifier.1.weight"] == 0.25
    assert rates["resnet.embedder.embedder.convolution.weight"] == 0.125
    assert not any("pretrained" in name for name in rates)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_accumulation_without_noise(make, tmp_path):
    LAWS["accumulation_changes_nothing"](SpotTuneConfig(noise=False), make, tmp_path)


def test_the_best_model_is_loaded(tmp_path):
    args = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "max_steps": 6}
    args |= {"load_best_model_at_end": True, "learning_rate": 0.3, "optim": "sgd"}
    trainer = make_trainer(tiny_vit(), SpotTuneConfig(policy_lr=1.0), tmp_path, **args)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("-6"), "the last is the best: nothing is shown"
    loaded = hf.AutoModelForImageClassification.from_pretrained(best)
    same_tensors(snapshot(loaded), snapshot(trainer.model))


# --- files ------------------------------------------------------------------------------------------------


CODE = """
import sys, torch, transformers, hf_ft
from safetensors.torch import load_file
batch, auto = load_file(sys.argv[1] + "/batch.safetensors"), getattr(transformers, sys.argv[2])
model = auto.from_pretrained(sys.argv[1])
assert not model.training and isinstance(model, getattr(transformers, sys.argv[3]))
assert torch.equal(model(**batch).logits, load_file(sys.argv[1] + "/logits.safetensors")["logits"])
again = auto.from_pretrained(sys.argv[1], dtype="bfloat16")
assert again.dtype == torch.bfloat16 and again.two_paths.gate.policy[1].weight.dtype == torch.float32
assert again(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}).logits.isfinite().all()
"""


@pytest.mark.parametrize(
    ("make", "auto"),
    [
        (tiny_vit, "AutoModelForImageClassification"),  # its checkpoints have other names than its modules
        (tiny_bert, "AutoModelForSequenceClassification"),
    ],
)
def test_a_fresh_process_loads_what_was_saved(make, auto, tmp_path):
    trainer = train(make(), SpotTuneConfig(), tmp_path / "run", max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    batch = {name: value for name, value in tiny_inputs(make()).items() if name != "labels"}
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    save_file(batch, tmp_path / "saved/batch.safetensors")
    save_file({"logits": logits}, tmp_path / "saved/logits.safetensors")
    ran = python("-c", CODE, tmp_path / "saved", auto, type(make()).__name__)
    assert ran.returncode == 0, ran.stderr
    card = (tmp_path / "saved/README.md").read_text()
    assert "import hf_ft  # registers" in card and f'{auto}.from_pretrained("saved")' in card
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["model_type"] == "hf_ft_gated" and config["base"]["model_type"] == make().config.model_type
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}


def test_a_cache_is_not_written_by_both_paths():
    model = tiny("GPT2ForSequenceClassification")
    batch, before = samples(model), model(**samples(model)).logits
    assert model.config.use_cache
    torch.testing.assert_close(set_up(model, SpotTuneConfig()).model.eval()(**batch).logits, before)


def test_damaged_files_are_named(tmp_path):
    gated(tiny_resnet).save_pretrained(tmp_path)
    load, config = hf.AutoModelForImageClassification.from_pretrained, tmp_path / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"gate": content["gate"] | {"width": 7}}))
    with pytest.raises(CheckpointError, match=r"not a complete model with two paths"):
        load(tmp_path)
    config.write_text(json.dumps(content))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not a complete model with two paths"):
        load(tmp_path)


def test_other_classes(tmp_path):
    gated(tiny_resnet).save_pretrained(tmp_path)
    named = {0: "a", 1: "b", 2: "c"}
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path, id2label=named)
    assert loaded.config.id2label == named and loaded.two_paths.gate.settings.features == 16
    with pytest.raises(OptionError, match="to train on other classes"):
        from_pretrained(str(tmp_path), num_labels=5)
    with pytest.raises(OptionError, match="num_labels=5.*a head for 3 classes"):
        hf.AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)


def test_shared_weights_are_saved_once(tmp_path):
    model = set_up(tiny("BartForSequenceClassification"), SpotTuneConfig()).model.eval()
    model.save_pretrained(tmp_path)
    batch = samples(tiny("BartForSequenceClassification"))
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.model.shared.weight is loaded.model.encoder.embed_tokens.weight


# --- with others, and refused -------------------------------------------------------------------------------


def test_a_regulariser_concerns_the_fine_tuned_path():
    run = set_up(tiny_resnet(), [SpotTuneConfig(), L2SPConfig(alpha=1.0, beta=0.0)])
    objective, start = run.objective(), snapshot(tiny_resnet())
    objective.enter(run.plan.stages[0])
    objective.train()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.01)
    term = float(objective(**tiny_batch(objective))["terms"]["l2_sp"])
    weights = [name for name, _ in tiny_resnet().named_parameters() if not name.startswith("classifier")]
    assert term == pytest.approx(0.5 * 1e-4 * sum(start[name].numel() for name in weights), rel=1e-3)


@pytest.mark.parametrize(
    "other",
    ["bss", "co_tuning", "lwf", "attention_transfer", "stoch_norm", "ema", "bi_tuning", WiSEFTConfig(alpha=0.5)],
)
def test_it_composes(other, tmp_path):
    model = equipped(tiny_resnet(), other)
    trainer = train(model, [SpotTuneConfig(), other], tmp_path, max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    batch = tiny_inputs(trainer.model)
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def refusals():
    lora = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules="all-linear"))
    yield lora, {}, "a PEFT model"
    yield tiny_collaborative(), {}, "members|ensemble"
    yield tiny_timm(), {}, "not a classifier that Transformers' Auto classes know"
    yield set_up(tiny_resnet(), SpotTuneConfig()).model, {}, "has two paths already"
    yield TINY_MODELS["swin"](), {"blocks": r"swin\.encoder\.layers\.\d+\.blocks\.\d+\.attention"}, "one row for each"
    checkpointing = tiny_vit()
    checkpointing.gradient_checkpointing_enable()
    yield checkpointing, {}, "gradient checkpointing"


@pytest.mark.parametrize("case", range(6))
def test_refused(case):
    model, options, message = list(refusals())[case]
    with pytest.raises(OptionError, match=message):
        set_up(model, SpotTuneConfig(**options))


def test_refused_arguments(tmp_path):
    with pytest.raises(OptionError, match="gradient_checkpointing=True"):
        make_trainer(tiny_vit(), "spot_tune", tmp_path, gradient_checkpointing=True)
    model = set_up(tiny_vit(), SpotTuneConfig()).model
    with pytest.raises(OptionError, match="outside of its model"):
        model.vit(tiny_inputs(model)["pixel_values"])
    copied = copy.deepcopy(model)
    batch = tiny_inputs(model)
    with torch.no_grad():
        copied.classifier.weight.zero_()
        assert float(copied(**batch).logits.std(0).max()) < 1e-6 < float(model(**batch).logits.std(0).max())
