"""Feature distortion compared with vectors pooled by hand, and its callback."""

import builtins
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_ft import DAFTConfig, FTTrainer, OptionError, anatomy
from hf_ft.diagnostics.distortion import (
    Distortion,
    FeatureDistortionCallback,
    feature_distortion,
    plot_distortion,
)
from hf_ft.testing import same_tensors, tiny_bert, tiny_data, tiny_inputs, tiny_resnet, tiny_vit
from hf_ft.testing.families import tiny
from hf_ft.testing.models import tiny_swin
from hf_ft.testing.training import snapshot, tiny_arguments


def loader(model, sizes=(4, 4, 2)):
    return [tiny_inputs(model, size, seed) for seed, size in enumerate(sizes)]


def moved(make):
    model = make()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
    return model


def mean_over(vectors):
    """Cosine, L2 and relative L2 of pairs of plain vectors, summed entry by entry."""
    cosines, gaps, relative = [], [], []
    for a, b in vectors:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        size, other = sum(x * x for x in a) ** 0.5, sum(y * y for y in b) ** 0.5
        gap = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
        cosines.append(dot / (size * other))
        gaps.append(gap)
        relative.append(gap / size)
    return [sum(values) / len(values) for values in (cosines, gaps, relative)]


def assert_distortion(found, vectors):
    assert found.samples == len(vectors)
    assert [found.cosine, found.l2, found.relative_l2] == pytest.approx(mean_over(vectors), rel=1e-5)


def test_other_layouts_are_pooled_over_their_own_valid_tokens():
    """XLNet's blocks return (T, B, C); with padding, a text's vector is that of the text alone."""
    torch.manual_seed(0)
    before, after = (tiny("XLNetForSequenceClassification", seed).eval() for seed in (0, 1))
    ids, mask = torch.randint(5, 20, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = mask[2, :3] = 0  # it pads on the left
    found = feature_distortion(before, after, [{"input_ids": ids, "attention_mask": mask}])
    whole, kept = {}, {}
    for name, model in (("before", before), ("after", after)):
        layer = model.get_submodule(anatomy(model).blocks[0].modules[-1])
        hook = layer.register_forward_hook(lambda module, args, output, name=name: whole.update({name: output[0]}))
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        hook.remove()
        assert whole[name].shape[:2] == (6, 3)
        kept[name] = [whole[name][mask[row].bool(), row].double().mean(0).tolist() for row in range(3)]
    assert_distortion(found["block0"], list(zip(kept["before"], kept["after"], strict=True)))


def hidden(model, batch, state):
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[state]


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_blocks_against_vectors_pooled_by_hand(make):
    """Block i's output is what Transformers calls a hidden state."""
    before, after = make(), moved(make)
    found = feature_distortion(before, after, loader(before))
    assert list(found) == ["block0", "block1", "block2", "features"]
    state = {"block2": -1} if make is tiny_resnet else {"block0": 1, "block1": 2}
    for name, index in state.items():
        vectors = []
        for batch in loader(before):
            pair = [hidden(model, batch, index) for model in (before, after)]
            dims = (2, 3) if make is tiny_resnet else (1,)
            vectors += zip(*(states.double().mean(dim=dims).tolist() for states in pair), strict=True)
        assert_distortion(found[name], vectors)
    assert found["block0"].l2 > 0 and found["block2"].cosine < 1


def test_features_are_the_input_of_the_head():
    before, after = tiny_resnet(), moved(tiny_resnet)
    vectors = []
    for batch in loader(before):
        with torch.no_grad():
            pair = [model.resnet(batch["pixel_values"]).pooler_output.flatten(1) for model in (before, after)]
        vectors += zip(*(features.double().tolist() for features in pair), strict=True)
    assert_distortion(feature_distortion(before, after, loader(before))["features"], vectors)


def test_padded_tokens_do_not_count():
    before, after = tiny_bert(), moved(tiny_bert)
    vectors = []
    for batch in loader(before, (4,)):
        assert int(batch["attention_mask"].sum()) == 30  # of 32
        pair = [hidden(model, batch, 2).double() for model in (before, after)]
        for row, mask in enumerate(batch["attention_mask"].bool()):
            vectors.append(tuple(states[row][mask].mean(dim=0).tolist() for states in pair))
    found = feature_distortion(before, after, loader(before, (4,)))
    assert_distortion(found["block1"], vectors)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit, tiny_bert, tiny_swin])
def test_equal_models_are_not_distorted(make):
    for found in feature_distortion(make(), make(), loader(make())).values():
        assert found.l2 == found.relative_l2 == 0 and found.cosine == pytest.approx(1, abs=1e-12)


def test_models_and_random_states_are_left_as_they_were():
    before, after = tiny_bert().train(), moved(tiny_bert).eval()
    weights = snapshot(before), snapshot(after)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = feature_distortion(before, after, loader(before))
    assert first == feature_distortion(before, after, loader(before)), "dropout ran"
    assert all(module.training for module in before.modules())
    assert not any(module.training for module in after.modules())
    same_tensors(snapshot(before), weights[0])
    same_tensors(snapshot(after), weights[1])
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    for model in (before, after):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_input_is_refused():
    model = tiny_resnet()
    with pytest.raises(OptionError, match="yielded no samples"):
        feature_distortion(model, tiny_resnet(), [])
    with pytest.raises(OptionError, match="no module 'resnet.encoder.stages.1.layers.1'"):
        feature_distortion(model, tiny_resnet(depths=[1, 1]), loader(model))
    with pytest.raises(OptionError, match="a batch is a tuple"):
        feature_distortion(model, tiny_resnet(), [(1, 2)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- plot


RESULT = {"block0": Distortion(0.9, 1.0, 0.2, 4), "features": Distortion(0.7, 2.0, 0.5, 4)}


@pytest.mark.slow
def test_plot_has_a_line_per_result(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (drawn.append(self), save(self, file)))
    plot_distortion({"ID": RESULT, "OOD": {**RESULT, "features": Distortion(0.1, 2.0, 0.9, 4)}}, tmp_path / "plot.png")
    lines = [[list(line.get_ydata()) for line in axis.get_lines()] for axis in drawn[0].axes]
    assert lines == [[[0.9, 0.7], [0.9, 0.1]], [[0.2, 0.5], [0.2, 0.9]]]
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["ID", "OOD"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_names_the_extra(monkeypatch, tmp_path):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"hf-ft\[report\]"):
        plot_distortion({"ID": RESULT}, tmp_path / "plot.png")


# --- callback


EVALUATING = {"eval_strategy": "steps", "eval_steps": 4}


def trained(tmp_path, callback, **arguments):
    model = tiny_resnet()
    data, eval_data = tiny_data(model), tiny_data(model, 16, seed=1)
    args = tiny_arguments(tmp_path, **{**EVALUATING, **arguments})
    trainer = FTTrainer(
        model, args, strategy=DAFTConfig(), train_dataset=data, eval_dataset=eval_data, callbacks=[callback]
    )
    return trainer


@pytest.mark.slow
def test_callback_logs_what_the_function_gives(tmp_path):
    ood = [{"pixel_values": 3 * batch["pixel_values"]} for batch in loader(tiny_resnet())]
    callback = FeatureDistortionCallback({"id": loader(tiny_resnet()), "ood": ood})
    trainer = trained(tmp_path, callback)
    kept = {}

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            kept["start"] = snapshot(model)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            kept["metrics"] = dict(metrics)

    trainer.add_callback(Keep())
    trainer.train()
    assert [step for step, _ in callback.history] == [4, 8]
    start = tiny_resnet()
    start.load_state_dict(kept["start"])
    step, last = callback.history[-1]
    assert last["ood"] == feature_distortion(start, trainer.model, ood)
    assert last["id"] != last["ood"] and last["id"]["block0"].cosine < 1
    entries = [entry for entry in trainer.state.log_history if "distortion/ood/features_cosine" in entry]
    assert [entry["step"] for entry in entries] == [4, 8]
    blocks = [last["ood"][f"block{i}"].cosine for i in range(3)]
    assert entries[-1]["distortion/ood/blocks_cosine"] == pytest.approx(sum(blocks) / 3)
    assert entries[-1]["distortion/ood/features_cosine"] == last["ood"]["features"].cosine
    assert kept["metrics"]["distortion/id/features_cosine"] == last["id"]["features"].cosine
    assert not any(isinstance(value, nn.Module) and value is callback._reference for value in trainer.model.modules())


@pytest.mark.slow
def test_training_is_the_same_with_the_callback(tmp_path):
    watched = trained(tmp_path, FeatureDistortionCallback({"id": loader(tiny_resnet())}))
    watched.train()
    alone = trained(tmp_path, TrainerCallback())
    alone.train()
    same_tensors(snapshot(watched.model), snapshot(alone.model))


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_reference_it_is_given(tmp_path, monkeypatch):
    said = []
    module = sys.modules[FeatureDistortionCallback.__module__]  # the package has a function of the same name
    monkeypatch.setattr(module.logger, "warning", said.append)
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = FeatureDistortionCallback({"id": loader(tiny_resnet())})
    trained(tmp_path, whole, **saving).train()
    assert not said
    start = whole._reference
    resumed = FeatureDistortionCallback({"id": loader(tiny_resnet())}, reference=start)
    trained(tmp_path, resumed, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.history == whole.history[1:] and not said
    fresh = FeatureDistortionCallback({"id": loader(tiny_resnet())})
    trained(tmp_path, fresh, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(said) == 1 and "resumed at step 4" in said[0] and fresh.history != resumed.history
