"""Layers of any layout are compared at their real tokens: a padded batch gives the same as its texts alone."""

import copy

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from hf_ft import DELTAConfig, FTTrainer, anatomy
from hf_ft.core.plan import Plan, Term
from hf_ft.engine.frozen.reference import Reference
from hf_ft.engine.objective import Objective
from hf_ft.models import last_feature_map, stage_convolutions
from hf_ft.models.find_layouts import find_layouts, logger, look_at
from hf_ft.models.layouts import PLAIN, Layouts, Tokens
from hf_ft.strategies.delta.config import FeatureDistance
from hf_ft.testing import tiny_bert, tiny_resnet, tiny_vit
from hf_ft.testing.training import make_trainer, tiny_arguments
from hf_ft.trainer.stage_cache import StageCache
from tests.models.small_models import small, small_inputs
from tests.strategies.perturbed_model import moved

# The layers, the order of their axes, and how many positions n tokens have.
_FUNNEL = ["funnel.encoder.blocks.0.0", "funnel.encoder.blocks.1.1", "funnel.encoder.blocks.2.0"]
CASES = {
    "Longformer": (["longformer.encoder.layer.0", "longformer.encoder.layer.1"], (0, 1, 2), lambda n: [n, n]),
    "LayoutLMv3": (["layoutlmv3.encoder.layer.0"], (0, 1, 2), lambda n: [n + 5]),  # four patches and a token
    "Funnel": (
        ["funnel.encoder.blocks.0.0", "funnel.encoder.blocks.1.1", "funnel.encoder.blocks.2.0"],
        (0, 1, 2),
        None,
    ),
    "XLNet": (["transformer.layer.0", "transformer.layer.1"], (1, 0, 2), lambda n: [n, n]),
    "SqueezeBert": (["transformer.encoder.layers.1.output.conv1d"], (0, 2, 1), lambda n: [n]),
    # Not covered by any rule.
    "XLM": (["transformer.layer_norm1.1"], (0, 1, 2), lambda n: [n]),
    "T5": (["transformer.encoder.final_layer_norm", "transformer.decoder.block.1"], (0, 1, 2), lambda n: [n, n]),
    "prompted BERT": (["base_model.bert.encoder.layer.1"], (0, 1, 2), lambda n: [n + 3]),
}
LENGTHS = {"Funnel": (8, 12, 16)}  # it drops odd tokens at each pooling; the others may have any length


def model_of(name):
    if name != "prompted BERT":
        return small(name).double()
    return get_peft_model(tiny_bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).double()


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def states(model, layers, batch):
    found = {}

    def keep(layer):
        return lambda module, args, output: found.update({layer: first(output)})

    handles = [model.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    with torch.no_grad():
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return found


def padded(model, lengths):
    """A batch of texts of these lengths, padded on the right with a token of the vocabulary, in float64."""
    batch = small_inputs(model, len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        batch["attention_mask"][row, length:] = 0
        if type(model).__name__.startswith("T5"):
            batch["input_ids"][row, length - 1 :] = torch.tensor([1] + [0] * (max(lengths) - length))
    return {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}


def alone(batch, row, length):
    """One text of the batch, without padding."""
    width = batch["attention_mask"].shape[1]
    one = {name: value[row : row + 1] for name, value in batch.items()}
    return {n: v[:, :length] if v.dim() > 1 and v.shape[1] == width else v for n, v in one.items()}


def objective_of(model, start, term, layers):
    layouts = Layouts()
    plan = Plan(terms=(Term("term", term, layers=tuple(layers), needs=frozenset({"reference"})),))
    return Objective(model, plan, reference=Reference(start, layouts), layouts=layouts)


@pytest.mark.parametrize("name", CASES)
def test_a_padded_batch_is_compared_as_its_texts_alone(name):
    layers, order, positions = CASES[name]
    lengths = LENGTHS.get(name, (7, 9, 13))
    model = model_of(name)
    start, batch = copy.deepcopy(model), padded(model, lengths)
    objective = objective_of(model, start, FeatureDistance(tuple(layers), "mean"), layers).train()
    moved(model)
    value = objective(**batch, labels=torch.zeros(len(lengths)).long())["terms"]["term"]

    total = 0.0
    for row, length in enumerate(lengths):
        one = alone(batch, row, length)
        now, before = states(model, layers, one), states(start, layers, one)
        for index, layer in enumerate(layers):
            difference = (now[layer] - before[layer]).permute(order)[0]
            count = len(difference) if positions is None else positions(length)[index]
            total += float(difference[:count].square().sum(dim=1).mean()) / 2 / len(lengths)
    assert float(value) == pytest.approx(total, rel=1e-6) and total > 1e-4


def test_a_joint_batch_of_longer_source_texts_is_padded_on_the_right():
    mask = torch.tensor([[1, 1, 1, 0]])
    assert PLAIN.mask({"attention_mask": mask}, torch.zeros(1, 4, 2)) is mask
    assert PLAIN.mask({"attention_mask": mask}, torch.zeros(1, 6, 2)).tolist() == [[1, 1, 1, 0, 0, 0]]
    assert PLAIN.mask({"attention_mask": mask}, torch.zeros(1, 3, 2)) is None
    assert PLAIN.mask({"attention_mask": mask}, torch.zeros(1, 4)) is PLAIN.mask({}, torch.zeros(1, 4, 2)) is None


@pytest.mark.parametrize(
    ("tokens", "positions", "expected"),
    [
        (Tokens(first=-2, after=1), 8, [1, 1, 1, 1, 1, 0, 0, 1]),  # two prompts, a patch after the text
        (Tokens(first=-2, after=1), 10, [1, 1, 1, 1, 1, 0, 0, 1, 0, 0]),
        (Tokens(stride=2, first=-1), 3, [1, 1, 0]),  # a class token, then pairs of which none may be padding
        (Tokens(stride=2), 4, [1, 0, 0, 0]),
    ],
)
def test_masks_of_layers(tokens, positions, expected):
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert tokens.mask(mask, positions).tolist() == [expected]


class Channels(torch.nn.Module):
    """Feature maps with the channels last."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.last = torch.nn.LayerNorm(5)
        self.idle = torch.nn.Identity()

    def forward(self, pixel_values):
        return self.last(self.first(pixel_values).permute(0, 2, 3, 1)).mean(dim=(1, 2))


def test_channels_of_feature_maps():
    layouts = find_layouts(Channels(), ["first", "last", "idle"], {"pixel_values": torch.randn(2, 3, 12, 10)})
    assert [layout.order for layout in layouts.values()] == [None, (0, 3, 1, 2), None]
    assert layouts["last"].arranged(torch.zeros(2, 6, 5, 4)).shape == (2, 4, 6, 5)


def test_one_warning_if_padding_cannot_be_found(monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warning_once", warnings.append)
    model, layer = small("Longformer"), "longformer.encoder.layer.1.attention.self"  # zeroes padding, and mixes tokens
    layout = find_layouts(model, [layer], small_inputs(model))[layer]
    assert layout.tokens is None and len(warnings) == 1 and repr(layer) in warnings[0]


def test_looking_leaves_the_model_and_random_states_alone():
    """BigBird permanently replaces its attention when it sees a short text."""
    model = small("BigBird").train()
    before, state, batch = copy.deepcopy(model), torch.get_rng_state(), small_inputs(model)
    find_layouts(model, ["bert.encoder.layer.1"], batch)
    last_feature_map(model, anatomy(model), batch)
    assert model.bert.attention_type == "block_sparse" and torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert all(module.training for module in model.modules())
    model(**batch)
    assert model.bert.attention_type == "original_full"


@pytest.mark.parametrize("make", [tiny_bert, tiny_vit, tiny_resnet])
def test_layers_are_looked_at_once_before_training(make, tmp_path, monkeypatch):
    looks = []

    def counted(model, layers, batch):
        looks.append((layers, len(batch["labels"])))
        return find_layouts(model, layers, batch)

    monkeypatch.setattr(f"{look_at.__module__}.find_layouts", counted)
    trainer = make_trainer(make(), DELTAConfig(weights="uniform"), tmp_path, max_steps=3)
    trainer._start_run()
    assert [count for _, count in looks] == [2]
    trainer.train()
    assert len(looks) == 1
    assert all(trainer._run.layouts[layer].order is None for layer in looks[0][0])


def test_recorded_reference_states_are_arranged_as_well(tmp_path, monkeypatch):
    """Rows of states are samples, which are XLNet's second axis."""
    losses, stores, record = [], [], StageCache._record_reference
    monkeypatch.setattr(StageCache, "_record_reference", lambda *a: stores.append(record(*a)) or stores[-1])
    for use in ("always", "never"):
        model = small("XLNet")
        batch = {**small_inputs(model, 8), "labels": torch.arange(8) % 3}
        data = [{name: value[row] for name, value in batch.items()} for row in range(8)]
        args = tiny_arguments(tmp_path / use, max_steps=3, logging_steps=1)
        delta = DELTAConfig(weights="uniform")
        trainer = FTTrainer(model, args, strategy=delta, train_dataset=data, frozen_cache=use)
        trainer.train()
        losses.append([entry["loss/delta"] for entry in trainer.state.log_history if "loss/delta" in entry])
    assert len(stores) == 1 and stores[0] is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] > 0


def test_convolutions_of_channels_before_tokens_are_the_default():
    model = small("SqueezeBert")
    assert stage_convolutions(model, anatomy(model))[-1] == "transformer.encoder.layers.1.output.conv1d"
