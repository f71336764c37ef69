"""Every model is divided according to its architecture, every tensor has one place, and errors name their fix."""

import dataclasses

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_ft.errors import AnatomyError
from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import matches
from hf_ft.models.norms import batch_norms, norm_layers, tensorflow_momentum
from hf_ft.models.parts import Anatomy
from hf_ft.testing.models import TINY_MODELS, tiny_bert, tiny_inputs, tiny_resnet, tiny_timm, tiny_vit

# Transformers renamed ViT's and DeiT's modules; with older versions, only the laws test anatomy.
pytestmark = pytest.mark.skipif(not hasattr(tiny_vit().vit, "layers"), reason="ViT has its former module names")

EACH = ((0,), (1,), (2,))

# name -> stem, last block, neck, head, stages: written by hand from the architectures.
EXPECTED: dict[str, tuple[str, str, str, str, tuple[tuple[int, ...], ...]]] = {
    "resnet": ("resnet.embedder", "resnet.encoder.stages.1.layers.1", "", "classifier", ((0,), (1, 2))),
    "regnet": ("regnet.embedder", "regnet.encoder.stages.1.layers.1", "", "classifier", ((0,), (1, 2))),
    "convnext": (
        "convnext.embeddings",
        "convnext.encoder.stages.1.layers.1",
        "convnext.layernorm",
        "classifier",
        ((0,), (1, 2)),
    ),
    "mobilenet_v1": (
        "mobilenet_v1.conv_stem",
        "mobilenet_v1.layer.24 mobilenet_v1.layer.25",
        "",
        "dropout classifier",
        ((0,), (1, 2), (3, 4), (5, 6, 7, 8, 9, 10), (11, 12)),
    ),
    "mobilenet_v2": (
        "mobilenet_v2.conv_stem",
        "mobilenet_v2.layer.15",
        "mobilenet_v2.conv_1x1",
        "dropout classifier",
        ((0, 1), (2, 3, 4), (5, 6, 7, 8, 9, 10, 11), (12, 13, 14, 15)),
    ),
    "efficientnet": (
        "efficientnet.embeddings",
        "efficientnet.encoder.blocks.3",
        "efficientnet.encoder.top_conv efficientnet.encoder.top_bn",
        "dropout classifier",
        ((0,), (1, 2, 3)),
    ),
    "vit": ("vit.embeddings", "vit.layers.2", "vit.layernorm", "classifier", EACH),
    "deit": ("deit.embeddings", "deit.layers.2", "deit.layernorm", "classifier", EACH),
    "swin": (
        "swin.embeddings",
        "swin.encoder.layers.1.blocks.1",
        "swin.layernorm",
        "classifier",
        ((0,), (1, 2)),
    ),
    "bert": ("bert.embeddings", "bert.encoder.layer.2", "bert.pooler", "dropout classifier", EACH),
    "roberta": ("roberta.embeddings", "roberta.encoder.layer.2", "", "classifier", EACH),
    "distilbert": (
        "distilbert.embeddings",
        "distilbert.transformer.layer.2",
        "",
        "pre_classifier dropout classifier",
        EACH,
    ),
    "timm": (
        "timm_model.patch_embed timm_model.pos_drop timm_model.cls_token timm_model.pos_embed",
        "timm_model.blocks.1",
        "timm_model.norm",
        "timm_model.head_drop timm_model.head",
        ((0,), (1,)),
    ),
}

# How many normalisation layers there are, and how many of them are BatchNorms with TensorFlow's momentum.
NORMS = {
    "resnet": (8, 0),  # stem 1, basic blocks of 2, a shortcut in stage 1 (stage 0 has no shortcut norm)
    "regnet": (12, 0),
    "convnext": (6, 0),
    "mobilenet_v1": (27, 27),
    "mobilenet_v2": (52, 52),
    "efficientnet": (13, 10),  # the three expansion norms stay at 0.1
    "vit": (7, 0),
    "deit": (7, 0),
    "swin": (9, 0),
    "bert": (7, 0),
    "roberta": (7, 0),
    "distilbert": (7, 0),
    "timm": (3, 0),
}


@pytest.fixture(scope="module", params=TINY_MODELS)
def tiny(request: pytest.FixtureRequest) -> tuple[str, hf.PreTrainedModel, Anatomy]:
    model = TINY_MODELS[request.param]()
    return request.param, model, anatomy(model)


def assert_partition(model: nn.Module, found: Anatomy) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    owners = {name: [part.name for part in found.parts if matches(name, part.modules)] for name, _ in tensors}
    assert owners
    assert {name: parts for name, parts in owners.items() if len(parts) != 1} == {}


def test_parts_are_those_of_the_architecture(tiny):
    name, _, found = tiny
    stem, last_block, neck, head, stages = EXPECTED[name]
    assert found.stem.modules == tuple(stem.split())
    assert found.blocks[-1].modules == tuple(last_block.split())
    assert found.neck.modules == tuple(neck.split())
    assert found.head.modules == tuple(head.split())
    assert found.stages == stages
    assert [part.name for part in found.blocks] == [f"block{i}" for i in range(sum(map(len, stages)))]
    assert [part.name for part in found.parts][:: len(found.parts) - 1] == ["stem", "head"]
    assert (found.neck in found.parts) == bool(neck)


def test_every_tensor_is_in_exactly_one_part(tiny):
    _, model, found = tiny
    assert_partition(model, found)


def test_forward_runs_through_the_parts_in_order(tiny):
    _, model, found = tiny
    listed = [name for part in found.parts for name in part.modules]
    modules = dict(model.named_modules())
    expected = [name for name in listed if name in modules]  # timm's loose parameters are not called
    called: list[str] = []
    hooks = [modules[n].register_forward_pre_hook(lambda *_, n=n: called.append(n)) for n in expected]
    with torch.no_grad():
        model(**tiny_inputs(model))
    for hook in hooks:
        hook.remove()
    assert called == expected


def test_norm_layers_and_momentum(tiny):
    name, model, _ = tiny
    norms, tensorflow = NORMS[name]
    assert len(norm_layers(model)) == norms
    assert len(tensorflow_momentum(model)) == tensorflow
    has_batch_norm = name in {"resnet", "regnet", "mobilenet_v1", "mobilenet_v2", "efficientnet"}
    assert batch_norms(model) == (norm_layers(model) if has_batch_norm else [])


def test_momentum_trap_is_named_with_its_location():
    names = tensorflow_momentum(TINY_MODELS["efficientnet"]())
    assert "efficientnet.embeddings.batchnorm" in names
    assert "efficientnet.encoder.blocks.1.expansion.expand_bn" not in names


def test_norm_layers_by_class_name():
    class OddRMSNorm(nn.Module):
        pass

    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fn = nn.GroupNorm(1, 4), nn.Linear(4, 4)

    model = nn.Sequential(
        OddRMSNorm(),
        PreNorm(),
        nn.InstanceNorm2d(4),
        nn.RMSNorm(4),
        nn.LocalResponseNorm(2),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.SyncBatchNorm(4, momentum=None),
    )
    assert [name for name, _ in norm_layers(model)] == ["0", "1.norm", "2", "3", "4", "6", "7"]
    assert [name for name, _ in batch_norms(model)] == ["7"]
    assert tensorflow_momentum(model) == []


def test_modules_between_stages_join_the_block_that_follows():
    convnext = anatomy(TINY_MODELS["convnext"]()).blocks[1].modules
    stage = "convnext.encoder.stages.1"
    assert convnext == (*(f"{stage}.downsampling_layer.{i}" for i in (0, 1)), f"{stage}.layers.0")
    swin = anatomy(TINY_MODELS["swin"]()).blocks[1].modules
    assert swin == ("swin.encoder.layers.0.downsample", "swin.encoder.layers.1.blocks.0")


def test_one_stage_is_one_stage_however_shallow():
    assert anatomy(tiny_resnet(hidden_sizes=[8], depths=[2])).stages == ((0, 1),)


def test_modules_defined_late_but_read_by_every_block_are_stem():
    config = hf.MPNetConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    found = anatomy(hf.MPNetForSequenceClassification(config))
    assert found.stem.modules == ("mpnet.embeddings", "mpnet.encoder.relative_attention_bias")
    assert found.neck.modules == ()


def test_shared_layers_are_one_block():
    config = hf.AlbertConfig(
        hidden_size=16, embedding_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    found = anatomy(hf.AlbertForSequenceClassification(config))
    assert [part.modules for part in found.blocks] == [("albert.encoder.albert_layer_groups.0",)]
    assert found.head.modules == ("dropout", "classifier")


def test_anatomy_is_a_value():
    first, second = anatomy(tiny_vit(seed=0)), anatomy(tiny_vit(seed=1))
    assert first == second and len({first, second}) == 1
    assert "vit.layers.0" in repr(first)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.stages = ()  # type: ignore[misc]


def test_matches_whole_steps_of_a_name():
    assert matches("layer.1.weight", ["layer.1"]) and matches("layer.1", ["layer.1"])
    assert not matches("layer.10.weight", ["layer.1"])
    assert not matches("layer.1", [])


@pytest.mark.parametrize("name", ["vit", "bert", "resnet"])
def test_lora_keeps_every_tensor_in_its_part(name):
    model = TINY_MODELS[name]()
    plain = anatomy(model)
    targets = {"vit": ["q_proj", "v_proj"], "bert": ["query", "value"], "resnet": ["convolution"]}[name]
    tuned = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["classifier"]))
    found = anatomy(tuned)
    assert_partition(tuned, found)
    assert found.stages == plain.stages
    for before, after in zip(plain.parts, found.parts, strict=True):
        assert after.modules == tuple(f"base_model.model.{module}" for module in before.modules)
    in_head = [n for n, p in tuned.named_parameters() if p.requires_grad and matches(n, found.head.modules)]
    in_block = [n for n, p in tuned.named_parameters() if "lora_A" in n and matches(n, found.blocks[-1].modules)]
    assert in_head and all("modules_to_save" in n for n in in_head)
    assert in_block


def test_a_prompt_is_stem():
    tuned = get_peft_model(tiny_bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    found = anatomy(tuned)
    assert_partition(tuned, found)
    assert matches("prompt_encoder.default.embedding.weight", found.stem.modules)
    assert found.blocks[0].modules == ("base_model.bert.encoder.layer.0",)


def test_head_argument():
    found = anatomy(TINY_MODELS["distilbert"](), head="classifier")
    assert found.head.modules == ("dropout", "classifier")
    assert found.neck.modules == ("pre_classifier",)
    both = anatomy(TINY_MODELS["distilbert"](), head="pre_classifier, classifier")
    assert both.head.modules == ("pre_classifier", "dropout", "classifier")


def test_blocks_argument():
    model = tiny_resnet()
    stages = anatomy(model, blocks=r".*\.stages\.\d+")
    assert [part.modules for part in stages.blocks] == [(f"resnet.encoder.stages.{i}",) for i in (0, 1)]
    outermost = anatomy(model, blocks=r"resnet\.encoder\.stages\.\d+.*")
    assert outermost.blocks == stages.blocks
    assert_partition(model, stages)


@pytest.mark.parametrize("name", ["vit", "deit", "bert", "roberta", "distilbert"])
def test_unknown_transformer_is_divided_by_its_largest_list(name):
    model = TINY_MODELS[name]()
    known = anatomy(model)
    model.config.model_type = "unheard-of"
    assert anatomy(model) == known


def test_unknown_cnn_is_divided_into_its_stages():
    model = tiny_resnet()
    model.config.model_type = "unheard-of"
    found = anatomy(model)
    assert [part.modules for part in found.blocks] == [(f"resnet.encoder.stages.{i}",) for i in (0, 1)]
    assert found.stages == ((0,), (1,))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)


class HeadFirst(nn.Module):
    """Not from Transformers; parallel lists as in torchvision's ResNet, and the head defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.bn1 = nn.BatchNorm2d(3)
        self.drop = nn.Dropout()
        self.layer1 = nn.Sequential(Residual(), Residual())
        self.layer2 = nn.Sequential(Residual())


def test_plain_module_with_its_head_first():
    found = anatomy(HeadFirst())
    assert found.stem.modules == ("bn1", "drop")
    assert [part.modules for part in found.blocks] == [("layer1.0",), ("layer1.1",), ("layer2.0",)]
    assert found.parts[-1].modules == ("fc",)
    assert found.stages == ((0, 1), (2,))


class Outlined(nn.Module):
    """A backbone and the modules beside it, in the given order."""

    base_model_prefix = "body"

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def body(**children: nn.Module) -> nn.Module:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    return Outlined(words=nn.Embedding(1000, 4), pooler=nn.Linear(4, 4), layers=layers, **children)


def test_pooler_defined_before_the_blocks_is_neck():
    found = anatomy(Outlined(body=body(rotary_emb=nn.Linear(1, 1)), classifier=nn.Linear(4, 2)))
    assert found.stem.modules == ("body.words", "body.rotary_emb")
    assert found.neck.modules == ("body.pooler",)


def test_norm_beside_the_backbone_is_neck_and_dropout_is_head():
    found = anatomy(Outlined(drop=nn.Dropout(), body=body(), norm=nn.LayerNorm(4), classifier=nn.Linear(4, 2)))
    assert found.neck.modules == ("body.pooler", "norm")
    assert found.head.modules == ("drop", "classifier")


def test_two_heads_of_a_distilled_timm_model():
    model = tiny_timm()
    timm = model.timm_model
    timm.head_dist = nn.Linear(16, 3)
    timm.get_classifier = lambda: (timm.head, timm.head_dist)
    assert anatomy(model).head.modules == ("timm_model.head", "timm_model.head_drop", "timm_model.head_dist")


def test_a_list_with_less_than_half_the_backbone_is_not_used():
    wide = nn.ModuleList(nn.Linear(4, 40) for _ in range(3))  # single layers are not blocks either
    with pytest.raises(AnatomyError, match=r"by size.*body\.layers\.0 \.\.\. body\.layers\.1 \(2 x Sequential\)"):
        _ = anatomy(Outlined(body=body(wide=wide), classifier=nn.Linear(4, 2))).blocks


@pytest.mark.parametrize(("name", "stages"), [("blocks", ((0,), (1, 2))), ("stages", ((0,), (1,), (2,)))])
def test_strides_part_blocks_but_not_stages(name, stages):
    strides = (2, 2, 1)
    layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, stride=stride)) for stride in strides))
    assert anatomy(Outlined(**{name: layers}, head=nn.Linear(4, 2))).stages == stages


def test_lists_of_lists_hold_the_blocks():
    lists = nn.ModuleList(nn.ModuleList(Residual() for _ in range(depth)) for depth in (2, 1))
    found = anatomy(Outlined(stages=lists, head=nn.Linear(4, 2)))
    assert [part.modules for part in found.blocks] == [("stages.0.0",), ("stages.0.1",), ("stages.1.0",)]
    assert found.stages == ((0, 1), (2,))


TIMM_LAYOUTS = {
    "efficientnet": ("blocks.0.0 blocks.1.0 blocks.1.1", ((0,), (1, 2))),
    "convnext": ("stages.0.blocks.0 stages.1.blocks.0 stages.1.blocks.1", ((0,), (1, 2))),
    "resnet": ("layer1.0 layer2.0 layer2.1", ((0,), (1, 2))),
    "regnet": ("s1.b1 s2.b1 s2.b2", ((0,), (1, 2))),
}


@pytest.mark.parametrize("layout", TIMM_LAYOUTS)
def test_timm_layouts(layout):
    names, stages = TIMM_LAYOUTS[layout]
    model = tiny_timm()
    del model.timm_model.blocks, model.timm_model.patch_embed  # blocks hold most of the weights
    for name in names.split():
        holder: nn.Module = model.timm_model
        for step in name.split(".")[:-1]:
            if not hasattr(holder, step):
                holder.add_module(step, nn.Sequential())
            holder = getattr(holder, step)
        holder.add_module(name.split(".")[-1], Residual())
    found = anatomy(model)
    assert [part.modules[-1] for part in found.blocks] == [f"timm_model.{name}" for name in names.split()]
    assert found.stages == stages
    assert_partition(model, found)


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        (tiny_vit, {"head": "clasifier"}, ["'clasifier'", "vit (ViTModel", "classifier (Linear", "51 parameters"]),
        (tiny_vit, {"head": ""}, ["no module ''", 'head="classifier"']),
        (tiny_vit, {"blocks": "encoder"}, ["blocks='encoder'", "vit.layers.0 ... vit.layers.2 (3 x ViTLayer)"]),
        (tiny_vit, {"blocks": ""}, ["blocks=''", 'blocks=r"']),
        (tiny_vit, {"blocks": "("}, ["blocks='('", "not a regular expression"]),
        (tiny_vit, {"head": "vit.layers.2.mlp"}, ["vit.layers.2 overlap", "vit.layers.2.mlp", "blocks=r"]),
        (lambda: tiny_vit().vit, {}, ["Found no head", "embeddings (ViTEmbeddings", 'head="classifier"']),
        (lambda: tiny_vit(num_labels=0), {}, ["Found no head", "classifier (Identity, 0 parameters)"]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {"head": "0"}, ["Found no blocks", "none", 'blocks=r"']),
    ],
)  # fmt: skip
def test_errors_list_what_was_tried_and_name_the_fix(model, arguments, said):
    with pytest.raises(AnatomyError) as error:
        _ = anatomy(model(), **arguments).blocks
    assert [words for words in said if words not in str(error.value)] == []


def test_lists_called_in_turn_are_not_mistaken_for_blocks():
    model = nn.Module()
    model.attentions = nn.ModuleList(Residual() for _ in range(2))
    model.ffns = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(2))
    model.head = nn.Linear(4, 2)
    with pytest.raises(AnatomyError, match=r"attentions\.0 \.\.\. attentions\.1 \(2 x Residual\); ffns\.0"):
        _ = anatomy(model).blocks


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models_are_small_seeded_and_leave_the_random_state_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (TINY_MODELS[name](num_labels=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert not first.training
    assert sum(p.numel() for p in first.parameters()) < 100_000
    inputs = tiny_inputs(first)
    with torch.no_grad():
        logits, same, different = (model(**inputs).logits for model in (first, again, other))
    assert logits.shape == (4, 4) and logits.std(dim=0).min() > 1e-3  # it does depend on the input
    assert torch.equal(logits, same) and not torch.equal(logits, different)
