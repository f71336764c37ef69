"""Layers, segments and candidates: they follow the architecture, with each weight in one place and correct quarters."""

import dataclasses
import logging

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from hf_ft.core.plan import Stage, trained_by
from hf_ft.errors import OptionError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.norms import norm_layers
from hf_ft.models.weight_layers import weight_layers
from hf_ft.strategies.blockwise.candidates import (
    SCHEMES,
    Candidate,
    baseline_candidates,
    candidates,
    find_candidate,
    last_quarter,
    quarter_of,
    top_layers,
)
from hf_ft.testing.models import TINY_MODELS, tiny_bert, tiny_inputs, tiny_mobilenet_v2, tiny_resnet, tiny_vit
from hf_ft.zoo.models import load_model

FORMED = [scheme for scheme in SCHEMES if scheme != "top_layers"]

# name -> layers, segments, stages with the stem, and blocks with stem and neck where they have layers; counted by hand:
# there is one segment more than activations and poolings between two layers.
COUNTS = {
    "resnet": (8, 7, 3, 4),  # the shortcut shares a segment with the first convolution of its block
    "regnet": (18, 16, 3, 4),  # 1 + 6 + 6 + 5, two shortcuts
    "convnext": (11, 4, 3, 4),  # GELU in three blocks
    "mobilenet_v1": (27, 27, 6, 14),  # all are followed by ReLU6
    "mobilenet_v2": (52, 35, 5, 18),  # 3 + 16 * 3 + 1, and 2 ReLU6 each but 1 in the neck, at the end
    "efficientnet": (21, 17, 3, 6),  # 1 + 4 + 3 * 5 + 1; no activation after the four projections
    "vit": (19, 4, 4, 4),  # 1 + 3 * 6
    "deit": (19, 4, 4, 4),
    "swin": (23, 4, 3, 4),  # 1 + 3 * 7 with the position bias + 1 patch merging
    "bert": (22, 4, 4, 5),  # 3 + 3 * 6 + pooler, whose Tanh is at the end
    "roberta": (21, 4, 4, 4),
    "distilbert": (20, 4, 4, 4),
    "timm": (5, 3, 3, 3),
}
# Parameters of the stem that belong to no layer.
LOOSE = {
    "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
    "deit": {f"deit.embeddings.{name}" for name in ("cls_token", "distillation_token", "position_embeddings")},
    "timm": {"timm_model.cls_token", "timm_model.pos_embed"},
}
# Their shortcuts run after the main path, although they are defined before it.
SHORTCUTS = ("resnet", "regnet")


@pytest.fixture(scope="module", params=TINY_MODELS)
def tiny(request):
    return request.param, TINY_MODELS[request.param]()


def names_of(model, modules):
    """The parameters that a stage with these modules trains, found by the engine."""
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return trained_by(Stage("probe", trains=tuple(modules)), model, free)


def backbone_names(model):
    head = set(names_of(model, anatomy(model).head.modules))
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad} - head


def assert_exact(model, found):
    """Assert that the engine trains exactly what a candidate lists, and that no name is listed twice."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for candidate in found:
        assert candidate.parameters == sum(sizes[name] for name in names_of(model, candidate.modules)) > 0
        assert len(set(candidate.modules)) == len(candidate.modules)
        assert candidate.layers == tuple(sorted(set(candidate.layers)))


# --- quarters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "total", "quarter"),
    [
        ((0,), 1, 1),  # c 0
        ((0,), 2, 1),
        ((1,), 2, 3),  # 4 * 1 / 2 = 2
        ((0, 1), 2, 2),  # 4 * 0.5 / 2 = 1
        ((0,), 3, 1),
        ((1,), 3, 2),  # 4 / 3 = 1.33
        ((2,), 3, 3),  # 8 / 3 = 2.67
        ((3,), 4, 4),
        ((0, 1, 2, 3), 4, 2),  # 4 * 1.5 / 4 = 1.5
        ((4,), 5, 4),  # 3.2
        ((3, 4, 5, 6, 7), 8, 3),  # 4 * 5 / 8 = 2.5
        ((5, 6, 7), 8, 4),  # 4 * 6 / 8 = 3
        ((12,), 52, 1),
        ((12, 13), 52, 1),  # 4 * 12.5 / 52 = 0.96
        ((13,), 52, 2),  # exactly 1
        ((38,), 52, 3),
        ((39,), 52, 4),
        ((3, 40), 52, 2),  # scattered: 4 * 21.5 / 52 = 1.65
        ((), 52, 0),
    ],
)
def test_quarter(layers, total, quarter):
    assert quarter_of(layers, total) == quarter


# --- every architecture -----------------------------------------------------------------------------------


@pytest.mark.newest
def test_numbers_of_candidates(tiny):
    name, model = tiny
    layers, segments, stages, blocks = COUNTS[name]
    found = {scheme: candidates(model, scheme, length=4) for scheme in FORMED}
    numbers = {"layer": layers, "segment": segments, "window": layers - 3, "stage": stages, "block": blocks}
    assert {scheme: len(made) for scheme, made in found.items()} == numbers
    for made in found.values():
        assert_exact(model, made)
        assert [c.centre for c in made] == sorted((c.centre for c in made), reverse=True)
        assert all(c.quarter == quarter_of(c.layers, layers) for c in made)


def test_every_weight_is_in_one_layer(tiny):
    name, model = tiny
    layers = weight_layers(model)
    held = [name for layer in layers for name in names_of(model, layer.modules)]
    assert len(set(held)) == len(held)
    assert backbone_names(model) - set(held) == LOOSE.get(name, set())


@pytest.mark.parametrize("scheme", ["layer", "segment", "stage", "block"])
def test_candidates_do_not_overlap_and_leave_nothing_out(scheme, tiny):
    name, model = tiny
    found = candidates(model, scheme)
    held = [name for candidate in found for name in names_of(model, candidate.modules)]
    left_out = set() if scheme in ("stage", "block") else LOOSE.get(name, set())
    assert sorted(held) == sorted(backbone_names(model) - left_out)
    assert [i for c in reversed(found) for i in c.layers] == list(range(len(weight_layers(model))))


def test_windows_are_all_runs_of_consecutive_layers(tiny):
    _, model = tiny
    layers = weight_layers(model)
    found = candidates(model, "window", length=2)[::-1]
    assert [c.layers for c in found] == [(i, i + 1) for i in range(len(layers) - 1)]
    assert [c.name for c in found] == [f"window{i}-{i + 1}" for i in range(len(layers) - 1)]
    assert all(set(c.modules) == {*layers[i].modules, *layers[i + 1].modules} for i, c in enumerate(found))
    (whole,) = candidates(model, "window", length=len(layers))
    assert whole.parameters == sum(layer.parameters for layer in layers)


@pytest.mark.slow
def test_segments_are_what_runs_between_two_activations(tiny):
    name, model = tiny
    modules, norms = dict(model.named_modules()), {norm for norm, _ in norm_layers(model)}
    ran = [[]]
    hooks = []
    for index, layer in enumerate(weight_layers(model)):
        (weight,) = [n for n in layer.modules if n in modules and n not in norms]
        hooks.append(modules[weight].register_forward_hook(lambda *_, i=index: ran[-1].append(i)))
    for module in modules.values():
        kind = type(module).__name__
        bare = next(module.children(), None) is None and next(module.parameters(), None) is None
        if bare and ("Pool" in kind or kind in ("ReLU", "ReLU6", "SiLU", "Sigmoid", "Tanh", "GELU", "GELUActivation")):
            hooks.append(module.register_forward_hook(lambda *_: ran.append([])))
    with torch.no_grad():
        model(**tiny_inputs(model))
    for hook in hooks:
        hook.remove()
    main_path = [set(segment) - shortcuts(model) for segment in ran]
    found = [set(c.layers) - shortcuts(model) for c in candidates(model, "segment")[::-1]]
    assert [s for s in main_path if s] == [s for s in found if s]
    assert bool(shortcuts(model)) == (name in SHORTCUTS)


def shortcuts(model):
    return {i for i, layer in enumerate(weight_layers(model)) if ".shortcut." in layer.modules[0]}


@pytest.mark.parametrize("scheme", FORMED)
def test_no_weights_are_needed(scheme, tiny):
    _, model = tiny
    with torch.device("meta"):
        bare = type(model)(model.config)
    assert next(bare.parameters()).is_meta
    assert candidates(bare, scheme) == candidates(model, scheme)


def test_frozen_layers_do_not_count(tiny):
    model = TINY_MODELS[tiny[0]]()
    before = weight_layers(model)
    for name in names_of(model, before[1].modules):
        model.get_parameter(name).requires_grad_(False)
    assert weight_layers(model) == (before[0], *before[2:])
    found = candidates(model, "layer")
    assert found[-2].modules == before[2].modules and found[-2].name == "layer1"
    assert_exact(model, candidates(model, "stage"))


# --- one architecture, by hand ----------------------------------------------------------------------------


def test_stages_of_mobilenet():
    found = candidates(tiny_mobilenet_v2(), "stage")
    assert [(c.name, c.layers[0], c.layers[-1], c.quarter) for c in found] == [
        ("stage3", 39, 51, 4),
        ("stage2", 18, 38, 3),
        ("stage1", 9, 17, 2),
        ("stage0", 3, 8, 1),
        ("stem", 0, 2, 1),
    ]
    blocks = tuple(f"mobilenet_v2.layer.{i}" for i in range(12, 16))
    assert found[0].modules == (*blocks, "mobilenet_v2.conv_1x1")
    blocks = candidates(tiny_mobilenet_v2(), "block")
    assert [c.name for c in blocks] == ["neck", *(f"block{i}" for i in reversed(range(16))), "stem"]
    assert blocks[1].modules == ("mobilenet_v2.layer.15",) and blocks[1].layers == (48, 49, 50)


def test_layers_of_a_resnet():
    modules = [layer.modules for layer in weight_layers(tiny_resnet())]
    assert modules[0] == ("resnet.embedder.embedder.convolution", "resnet.embedder.embedder.normalization")
    assert [m[0].removeprefix("resnet.encoder.stages.1.layers.") for m in modules[3:6]] == [
        "0.shortcut.convolution",
        "0.layer.0.convolution",
        "0.layer.1.convolution",
    ]


@pytest.mark.newest
def test_loose_parameters_and_norms_of_a_neck():
    vit = tiny_vit()
    every = {module for layer in weight_layers(vit) for module in layer.modules}
    assert not {"vit.embeddings", "vit.embeddings.cls_token"} & every
    assert "vit.embeddings.cls_token" in names_of(vit, find_candidate(candidates(vit, "stage"), "stem").modules)
    # The last norm is the neck, has no layer of its own, and follows the last layer.
    assert weight_layers(vit)[-1].modules == ("vit.layers.2.mlp.fc2", "vit.layernorm")
    assert candidates(vit, "stage")[0].modules == ("vit.layers.2", "vit.layernorm")
    convnext = TINY_MODELS["convnext"]()
    block = "convnext.encoder.stages.0.layers.0"
    assert weight_layers(convnext)[3].modules == (f"{block}.pwconv2", f"{block}.layer_scale_parameter")


# --- layouts that the tiny models do not have -------------------------------------------------------------


class Plain(nn.Module):
    """A classifier with given blocks, a stem before them and a head after them."""

    def __init__(self, *blocks, stem=None, **more):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1) if stem is None else stem
        for name, module in more.items():
            setattr(self, name, module)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 2)


class Functional(nn.Module):
    """Two convolutions, and a ReLU that is not a module."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return functional.relu(self.second(functional.relu(self.first(x))))


def conv():
    return nn.Conv2d(4, 4, 1)


def segments(model):
    return [c.layers for c in candidates(model, "segment", blocks=r"blocks\.\d+")[::-1]]


def layer_names(model):
    return [layer.modules for layer in weight_layers(model, blocks=r"blocks\.\d+")]


def test_functional_activations_cut_at_the_ends_of_blocks(caplog):
    model = Plain(Functional(), Functional())
    with caplog.at_level(logging.WARNING):
        assert segments(model) == [(0,), (1, 2), (3, 4)]
    assert (
        "Plain: no block contains a pooling or activation module" in caplog.text and "where blocks end" in caplog.text
    )


def test_no_warning_if_activations_are_modules(caplog):
    model = Plain(nn.Sequential(conv(), nn.ReLU(), conv()), nn.Sequential(conv(), nn.ReLU(), conv()))
    with caplog.at_level(logging.WARNING):
        assert segments(model) == [(0, 1), (2, 3), (4,)]
    assert not caplog.text


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        # Pooling starts a segment; dropout, identity and norms do not, and a segment is never empty.
        ((conv, nn.AvgPool2d, conv, nn.Dropout, nn.Identity, conv), [(0, 1), (2, 3)]),
        ((nn.ReLU, conv, conv), [(0,), (1, 2)]),  # a Sequential runs in order
        ((conv, conv, nn.ReLU, nn.MaxPool2d), [(0, 1, 2)]),
        ((nn.BatchNorm2d, nn.ReLU, conv, nn.BatchNorm2d, nn.ReLU, conv), [(0,), (1,), (2,)]),  # pre-activation
        ((conv, nn.PReLU, conv), [(0, 1), (2,)]),
        ((conv, nn.Softmax, conv, nn.ReLU), [(0, 1, 2)]),
    ],
)
def test_what_cuts(block, expected):
    arguments = {nn.AvgPool2d: (2,), nn.MaxPool2d: (2,), nn.BatchNorm2d: (4,)}
    assert segments(Plain(nn.Sequential(*(kind(*arguments.get(kind, ())) for kind in block)))) == expected


def test_a_pooling_beside_the_blocks_cuts():
    block = nn.Sequential(conv(), nn.ReLU(), conv())
    assert segments(Plain(block, bn=nn.BatchNorm2d(4), relu=nn.ReLU(), maxpool=nn.MaxPool2d(2))) == [(0,), (1,), (2,)]


def test_the_head_cuts_nothing():
    head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model = Late(stem=conv(), head=head, blocks=nn.ModuleList([nn.Sequential(conv(), nn.ReLU(), conv())]))
    assert segments(model) == [(0, 1), (2,)]  # although it is defined between the stem and the block


class Late(nn.Module):
    """Layers and activations in the order given, whatever the order of the forward pass."""

    def __init__(self, **children):
        super().__init__()
        for name, module in children.items():
            setattr(self, name, module)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("act a b", [(0, 1), (2,)]),
        ("a b act", [(0, 1), (2,)]),
        ("a b act act2", [(0, 1), (2,)]),
        ("a b c act act2", [(0, 1), (2,), (3,)]),
        ("a act b c", [(0, 1), (2, 3)]),
        ("a b c act", [(0, 1, 2, 3)]),  # three layers, one activation: nothing shows where it is called
    ],
)
def test_activations_defined_apart_from_their_layers(names, expected):
    block = Late(**{name: nn.ReLU() if name.startswith("act") else conv() for name in names.split()})
    assert segments(Plain(block)) == expected


def test_what_is_a_layer():
    block = Late(norm=nn.BatchNorm2d(4), attention=nn.MultiheadAttention(4, 2), act=nn.PReLU(), fc=conv())
    block.scale = nn.Parameter(torch.ones(4))
    assert layer_names(Plain(block)) == [
        ("stem",),
        (
            "blocks.0.norm",
            "blocks.0.attention.out_proj",
            "blocks.0.act",
            "blocks.0.attention.in_proj_weight",
            "blocks.0.attention.in_proj_bias",
        ),
        ("blocks.0.fc", "blocks.0.scale"),
    ]
    # A container with only a norm is a layer, as is one with a bare parameter.
    bare = Late(norm=nn.LayerNorm(4))
    bare.weight = nn.Parameter(torch.ones(4))
    assert layer_names(Plain(bare, conv()))[1:] == [("blocks.0",), ("blocks.1",)]


def test_a_stem_of_a_norm_joins_the_first_block():
    model = Plain(Late(a=conv(), act=nn.ReLU()), Late(a=conv(), act=nn.ReLU()), stem=nn.BatchNorm2d(4))
    found = candidates(model, "block", blocks=r"blocks\.\d+")
    assert [(c.name, c.modules) for c in found] == [("block1", ("blocks.1",)), ("block0", ("stem", "blocks.0"))]
    assert layer_names(model)[0] == ("stem", "blocks.0.a")


def test_a_frozen_block_is_not_a_candidate_and_keeps_its_number():
    model = Plain(conv(), conv(), conv())
    model.blocks[1].requires_grad_(False)
    model.stem.bias.requires_grad_(False)
    found = candidates(model, "block", blocks=r"blocks\.\d+")
    assert [(c.name, c.layers, c.quarter) for c in found] == [
        ("block2", (2,), 3),
        ("block0", (1,), 2),
        ("stem", (0,), 1),
    ]
    assert found[-1].parameters == model.stem.weight.numel()


def test_adapters_are_layers():
    config = LoraConfig(target_modules=["query"], r=2, modules_to_save=["classifier"])
    model = get_peft_model(tiny_bert(), config)
    layers = weight_layers(model)
    assert len(layers) == 6 and all(".lora_" in layer.modules[0] for layer in layers)
    found = candidates(model, "stage")
    assert [c.name for c in found] == ["stage2", "stage1", "stage0"]
    assert_exact(model, found)


def test_shared_weights_count_once():
    config = hf.AlbertConfig(
        vocab_size=64,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = hf.AlbertForSequenceClassification(config)
    assert [c.name for c in candidates(model, "stage")] == ["stage0", "stem"]
    assert sum(c.parameters for c in candidates(model, "block")) == sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("classifier")
    )


# --- the best layers, the baselines, choosing -------------------------------------------------------------


def test_top_layers_are_unions():
    model = tiny_resnet()
    layers = weight_layers(model)
    found = top_layers(model, [6, 1, 4])
    assert [(c.name, c.layers, c.quarter) for c in found] == [
        ("top1", (6,), 4),
        ("top2", (1, 6), 2),  # 4 * 3.5 / 8 = 1.75
        ("top3", (1, 4, 6), 2),
    ]
    assert_exact(model, found)
    assert found[-1].modules == (*layers[1].modules, *layers[4].modules, *layers[6].modules)


@pytest.mark.parametrize("ranked", [[], [0, 0], [8], [-1], [0, 1, 99]])
def test_top_layers_refuses_what_is_not_a_ranking(ranked):
    with pytest.raises(OptionError, match="distinct layer indices from 0 to 7"):
        top_layers(tiny_resnet(), ranked)


def test_baselines(tiny):
    _, model = tiny
    found = baseline_candidates(model)
    assert found["head"] == Candidate("head", (), (), 0, 0) and found["head"].centre == -1
    every = found["all"]
    assert every.parameters == sum(model.get_parameter(name).numel() for name in backbone_names(model))
    assert every.layers == tuple(range(len(weight_layers(model)))) and every.modules == ("",)


def test_find_by_name_and_index():
    found = candidates(tiny_resnet(), "stage")
    for given in (found, found[::-1]):
        assert [find_candidate(given, i).name for i in (0, 1, 2, -1, -3)] == [
            "stem",
            "stage0",
            "stage1",
            "stage1",
            "stem",
        ]
        assert find_candidate(given, "stage0").layers == (1, 2)


@pytest.mark.parametrize("wanted", ["stage2", "layer1", "", 3, -4])
def test_find_lists_what_there_is(wanted):
    with pytest.raises(
        OptionError, match=r"no candidate .*the candidates are stem, stage0, stage1: .*from 0 to 2 \(-1"
    ):
        find_candidate(candidates(tiny_resnet(), "stage"), wanted)


def test_find_shortens_a_long_list():
    with pytest.raises(OptionError, match=r"layer0, layer1, layer2, \.\.\., layer49, layer50, layer51: .*0 to 51"):
        find_candidate(candidates(tiny_mobilenet_v2(), "layer"), "layer52")


def test_last_quarter():
    found = candidates(tiny_mobilenet_v2(), "window", length=3)
    assert last_quarter(found).name == last_quarter(found[::-1]).name == "window49-51"
    # Seven of eight layers form the last stage: its centre is in the third quarter, and nothing follows it.
    wide = last_quarter(candidates(tiny_resnet(), "stage"))
    assert (wide.name, wide.quarter) == ("stage1", 3)
    # top2's last layer is 6 too, but its centre is 3.5.
    assert last_quarter(top_layers(tiny_resnet(), [6, 1])).name == "top1"
    with pytest.raises(OptionError, match="no candidates"):
        last_quarter([])


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"scheme": "stages"},
            "scheme='stages' is unknown. Choose one of layer, top_layers, segment, window, stage, block",
        ),
        ({"scheme": "top_layers"}, "needs that search's ranking: hf_ft.strategies.blockwise.candidates.top_layers"),
        ({"scheme": "window", "length": 9}, "length=9 must be between 1 and 8, the number of layers"),
        ({"scheme": "window", "length": 0}, "length=0 must be between 1 and 8"),
        ({"scheme": "layer", "head": "nowhere"}, "no module 'nowhere'"),
        ({"scheme": "layer", "blocks": "nothing"}, "Found no blocks by blocks='nothing'"),
    ],
)
def test_refused(keywords, message):
    with pytest.raises(ValueError) as error:
        candidates(tiny_resnet(), **keywords)
    assert message in str(error.value)


def test_refused_if_everything_is_frozen():
    model = tiny_resnet()
    model.resnet.requires_grad_(False)
    with pytest.raises(OptionError, match="all parameters outside the head are frozen"):
        candidates(model, "stage")
    assert weight_layers(model) == ()


def test_candidates_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        candidates(tiny_resnet(), "stage")[0].name = "other"


# --- real weights -----------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "numbers"), [("mobilenet_v2", (52, 35, 5, 18)), ("efficientnet-lite0", (49, 33, 6, 18))]
)
def test_real_models(name, numbers):
    try:
        model, _ = load_model(name, num_labels=2)
    except ImportError as error:
        pytest.skip(str(error))
    schemes = ("layer", "segment", "stage", "block")
    found = {scheme: candidates(model, scheme) for scheme in schemes}
    assert tuple(map(len, found.values())) == numbers
    for made in found.values():
        assert_exact(model, made)
        assert not any(".squeeze_excite" in module for c in made for module in c.modules)
        # No loose parameters here: each scheme covers everything trainable outside the head.
        held = [name for candidate in made for name in names_of(model, candidate.modules)]
        assert sorted(held) == sorted(backbone_names(model))
