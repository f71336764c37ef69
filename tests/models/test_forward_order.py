"""Parts of models whose definition does not show how they run: found by one forward pass, only where needed."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_ft import GradualUnfreezingConfig, L2SPConfig, LinearProbeConfig, LPFTConfig, set_up
from hf_ft.core.plan import Stage, trained_by
from hf_ft.engine.frozen.find_prefix import find_prefix
from hf_ft.errors import AnatomyError
from hf_ft.models import find_blocks, find_head, tracing
from hf_ft.models.anatomy import anatomy
from hf_ft.models.names import matches
from hf_ft.models.parts import Chain, Part
from hf_ft.models.weight_layers import weight_layers
from hf_ft.testing.families import samples, tiny

# class, fields of its config -> stem, first block, last block, neck, head: written by hand from the architectures.
EXPECTED: dict[str, tuple[dict, str, str, str, str, str]] = {
    "MobileViTForImageClassification": (
        {},
        "mobilevit.conv_stem",
        "mobilevit.encoder.layer.0",
        "mobilevit.encoder.layer.4",
        "mobilevit.conv_1x1_exp",
        "dropout classifier",
    ),
    "SwiftFormerForImageClassification": (
        {},
        "swiftformer.patch_embed",
        "swiftformer.encoder.network.0",
        "swiftformer.encoder.network.5 swiftformer.encoder.network.6",
        "norm",
        "head dist_head",
    ),
    "PvtForImageClassification": (
        {},
        "pvt.encoder.patch_embeddings.0",
        "pvt.encoder.block.0.0",
        "pvt.encoder.patch_embeddings.3 pvt.encoder.block.3.0",
        "pvt.encoder.layer_norm",
        "classifier",
    ),
    "XLMForSequenceClassification": (
        {},
        "transformer.embeddings transformer.position_embeddings transformer.layer_norm_emb transformer.position_ids",
        "transformer.attentions.0 transformer.layer_norm1.0 transformer.ffns.0 transformer.layer_norm2.0",
        "transformer.attentions.1 transformer.layer_norm1.1 transformer.ffns.1 transformer.layer_norm2.1",
        "",
        "sequence_summary",
    ),
    "JambaForSequenceClassification": (
        {},
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.final_layernorm",
        "score",
    ),
    "PerceiverForSequenceClassification": (
        {},
        "perceiver.input_preprocessor perceiver.embeddings perceiver.encoder.cross_attention",
        "perceiver.encoder.self_attends.0",
        "perceiver.encoder.self_attends.1",
        "",
        "perceiver.decoder",
    ),
    # The last encoder runs over characters, which the classifier does not read.
    "CanineForSequenceClassification": (
        {},
        "canine.char_embeddings",
        "canine.initial_char_encoder.layer.0",
        "canine.encoder.layer.1",
        "canine.pooler canine.projection canine.final_char_encoder",
        "dropout classifier",
    ),
    "T5ForSequenceClassification": (
        {},
        "transformer.encoder.embed_tokens transformer.shared transformer.encoder.dropout",
        "transformer.encoder.block.0",
        "transformer.decoder.block.1",
        "transformer.decoder.final_layer_norm",
        "classification_head",
    ),
    "Wav2Vec2ForSequenceClassification": (
        {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "wav2vec2.feature_extractor wav2vec2.feature_projection wav2vec2.encoder.pos_conv_embed "
        "wav2vec2.encoder.dropout wav2vec2.masked_spec_embed",
        "wav2vec2.encoder.layers.0",
        "wav2vec2.encoder.layers.1",
        "wav2vec2.encoder.layer_norm",
        "projector classifier",
    ),
    "WhisperForAudioClassification": (
        {},
        "encoder.conv1 encoder.conv2 encoder.embed_positions",
        "encoder.layers.0",
        "encoder.layers.1",
        "encoder.layer_norm",
        "projector classifier",
    ),
    # Not named anywhere: two kinds of layers in sequence, and reversible layers with their own backward pass.
    "VideoPrismForVideoClassification": (
        {},
        "vision_model.spatial_embeddings",
        "vision_model.spatial_layers.0",
        "vision_model.temporal_layers.1",
        "vision_model.layernorm2 head_layernorm",
        "head classifier",
    ),
    "ReformerForSequenceClassification": (
        {},
        "reformer.embeddings",
        "reformer.encoder.layers.0",
        "reformer.encoder.layers.1",
        "reformer.encoder.layer_norm",
        "classifier",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.newest
def test_parts_are_those_that_run(name):
    fields, *wanted = EXPECTED[name]
    model = tiny(name, **fields)
    found = anatomy(model)
    parts = (found.stem, found.blocks[0], found.blocks[-1], found.neck, found.head)
    assert [" ".join(part.modules) for part in parts] == wanted
    tensors = [*model.named_parameters(), *model.named_buffers()]
    homes = {name: sum(matches(name, part.modules) for part in found.parts) for name, _ in tensors}
    assert {name for name, number in homes.items() if number != 1} == set()
    begins = tracing.forward_order(model).begins
    starts = [[begins[name] for name in part.modules if name in begins] for part in found.parts]
    assert starts == sorted(starts)


def test_an_encoder_and_a_decoder_are_two_stages():
    found = anatomy(tiny("BartForSequenceClassification"))
    assert [block.modules[-1] for block in found.blocks] == [
        f"model.{half}.layers.{layer}" for half in ("encoder", "decoder") for layer in (0, 1)
    ]
    assert found.blocks[2].modules[0] == "model.decoder.embed_tokens" and found.stages == ((0, 1), (2, 3))


# --- networks as in timm ----------------------------------------------------------------------------------


def conv(inside: int, outside: int, size: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, size, padding=size // 2), nn.BatchNorm2d(outside), nn.ReLU())


class Double(nn.Sequential):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(conv(inside, outside), conv(outside, outside, 3))


class Cell(nn.Module):
    """Two branches side by side, of several layers each."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.branch0, self.branch1 = Double(inside, outside // 2), Double(inside, outside // 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch0(x), self.branch1(x)], dim=1)


class Late(nn.Module):
    """The first-defined module runs last, and a class token joins after the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.final = nn.BatchNorm2d(8)
        self.between = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.block = nn.ModuleList(Double(8, 8) for _ in range(2))
        self.token, self.unread = nn.Parameter(torch.zeros(8, 1, 1)), nn.Parameter(torch.zeros(1))
        self.stem = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, (between, block) in enumerate(zip(self.between, self.block, strict=True)):
            x = block(between(x) + (self.token if number else 0))
        return self.final(x)


NETWORKS = {
    "inception": (
        lambda: [("conv0", conv(3, 8)), *((f"mixed_{i}", Cell(8, 8)) for i in "abc")],
        ["mixed_a", "mixed_b", "mixed_c"],
    ),
    "densenet": (
        lambda: [
            ("conv0", nn.Conv2d(3, 8, 1)),
            ("dense1", nn.Sequential(Cell(8, 8), Cell(8, 8))),
            ("transition1", conv(8, 8)),
            ("dense2", nn.Sequential(Cell(8, 8))),
        ],
        ["dense1.0", "dense1.1", "transition1 dense2.0"],
    ),
    "vgg": (
        lambda: [("0", nn.Conv2d(3, 8, 3)), ("1", nn.BatchNorm2d(8)), ("2", nn.ReLU()), ("3", nn.Conv2d(8, 8, 3))],
        ["0 1", "3"],
    ),
    "selecsls": (
        lambda: [
            ("features", nn.Sequential(Cell(3, 8), Cell(8, 8))),
            ("end", nn.Sequential(conv(8, 20, 3), conv(20, 40), conv(40, 20, 3))),
        ],
        ["features.0", "features.1", "end.0", "end.1", "end.2"],
    ),
    "pvt": (lambda: [("late", Late())], ["late.block.0", "late.between.1 late.token late.block.1"]),
}


class InTurn(nn.Module):
    """Its children, one after another, in no list."""

    def __init__(self, children: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        for name, child in children:
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Network(hf.PreTrainedModel):
    """A network structured like those of timm in Transformers' wrapper."""

    config_class = hf.PreTrainedConfig
    base_model_prefix = "timm_model"

    def __init__(self, children: list[tuple[str, nn.Module]]) -> None:
        super().__init__(hf.PreTrainedConfig(num_labels=3))
        self.config.model_type = "timm_wrapper"
        self.timm_model = InTurn(children)
        self.classifier = nn.LazyLinear(3)
        self.classifier(self.timm_model.eval()(torch.zeros(1, 3, 64, 64)).mean((2, 3)))

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.timm_model(pixel_values).mean((2, 3))))


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutional_networks(name):
    children, blocks = NETWORKS[name]
    found = anatomy(Network(children()))
    wanted = [" ".join(f"timm_model.{module}" for module in block.split()) for block in blocks]
    assert [" ".join(block.modules) for block in found.blocks] == wanted


def test_a_bare_parameter_lies_where_it_is_read():
    found = anatomy(Network([("late", Late())]))
    assert found.stem.modules == ("timm_model.late.stem", "timm_model.late.between.0", "timm_model.late.unread")
    assert found.neck.modules == ("timm_model.late.final",)
    layers = weight_layers(Network([("late", Late())]))
    assert [layer.modules for layer in layers if "timm_model.late.token" in layer.modules] == [layers[-1].modules]


class Joined(nn.Module):
    """A class token joins between two blocks, and a module without weights runs after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.token = nn.Conv2d(3, 8, 1), Cell(8, 8), nn.Parameter(torch.zeros(8, 1, 1))
        self.same, self.second = nn.Identity(), Cell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.same(self.first(self.stem(x)) + self.token))


def test_a_bare_parameter_that_trains_is_not_skipped():
    model = Network([("joined", Joined())])
    parts = anatomy(model).parts
    assert parts[2].modules == ("timm_model.joined.token", "timm_model.joined.second")
    batches = ({"pixel_values": torch.randn(rows, 3, 64, 64)} for rows in (3, 2))
    assert find_prefix(model, [Chain("", parts[2:])], *batches) is None


class Borrowed(nn.Module):
    """Mamba reads the weights of its convolution without calling it, before a layer that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.read, self.act = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU()
        self.called = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.stem(x), self.read.weight, self.read.bias)
        return self.called(self.act(x))


def test_a_module_that_trains_and_is_not_called_is_not_skipped():
    model = Network([("borrowed", Borrowed())])
    batches = [{"pixel_values": torch.randn(rows, 3, 64, 64)} for rows in (3, 2)]
    read, called = (f"timm_model.borrowed.{name}" for name in ("read", "called"))
    head = Part("head", ("classifier",))
    later = find_prefix(model, [Chain("", (Part("block", (called,)), head))], *batches)
    assert later is not None and later.borders == ("timm_model.borrowed.act",)
    sooner = find_prefix(model, [Chain("", (Part("block", (read, called)), head))], *batches)
    assert sooner is None or sooner.borders == ("timm_model.borrowed.stem",)


def test_names_that_match_a_detail_are_ignored():
    """As with timm's HRNet, whose `layer1` has 1 % of the weights."""
    small, large = nn.Sequential(conv(4, 4), conv(4, 4)), nn.Sequential(Cell(4, 64), Cell(64, 64))
    found = anatomy(Network([("stem", conv(3, 4)), ("layer1", small), ("stage2", large)]))
    assert [block.modules for block in found.blocks] == [("timm_model.stage2.0",), ("timm_model.stage2.1",)]


# --- only where needed ------------------------------------------------------------------------------------


class Opaque(nn.Module):
    """A model with unknown inputs, in which nothing repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Bilinear(4, 4, 4), nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, graph: Tensor) -> Tensor:
        raise ValueError("no graph")


def test_head_only_needs_no_blocks(monkeypatch):
    monkeypatch.setattr(tracing, "_order", lambda *_: pytest.fail("a forward pass was traced"))
    for model in (Opaque(), tiny("XLMForSequenceClassification")):
        for config in (LinearProbeConfig(head_lr=0.1), LPFTConfig(head_lr=0.1), L2SPConfig()):
            run = set_up(model, config)
            if run.chains:
                assert [part.name for part in run.chains[0].parts] == ["backbone", "head"]
                assert run.objective().alive.trained_from == (1,)


def test_the_error_for_an_untraceable_model_names_the_fix():
    with pytest.raises(AnatomyError, match=r"could not be traced \(ValueError: no graph\).*blocks=r") as error:
        set_up(Opaque(), GradualUnfreezingConfig())
    assert "\n" not in str(error.value)
    found = anatomy(Opaque(), blocks="first|second")
    assert [block.modules for block in found.blocks] == [("first",), ("second",)]


def test_a_known_architecture_is_not_traced(monkeypatch):
    monkeypatch.setattr(tracing, "_order", lambda *_: pytest.fail("a forward pass was traced"))
    assert len(anatomy(tiny("BertForSequenceClassification")).blocks) == 2


def test_tracing_leaves_no_trace():
    model = tiny("LevitForImageClassification")  # which caches attention biases after a forward pass
    next(model.parameters()).requires_grad_(False)
    torch.manual_seed(3)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    order = tracing.forward_order(model)
    assert tracing.forward_order(model) is order  # one pass for all strategies
    assert torch.equal(torch.random.get_rng_state(), state) and not next(model.parameters()).requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(getattr(module, "attention_bias_cache", None) for module in model.modules())
    copy.deepcopy(model)


def test_a_skeleton_has_the_parts_of_the_model():
    config = tiny("T5ForSequenceClassification").config
    with torch.device("meta"):
        skeleton = hf.T5ForSequenceClassification(config)
    assert anatomy(skeleton) == anatomy(tiny("T5ForSequenceClassification"))


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("CTRLForSequenceClassification", "transformer.pos_encoding"),
        ("LayoutLMv3ForSequenceClassification", "layoutlmv3.visual_bbox"),
    ],
)
def test_a_stage_may_name_a_buffer(name, buffer):
    model = tiny(name)
    stem = anatomy(model).stem.modules
    assert buffer in stem and buffer in dict(model.named_buffers())
    names = [name for name, _ in model.named_parameters()]
    trained = trained_by(Stage("stem", trains=stem), model, names)
    assert trained == [name for name in names if matches(name, stem)]
    set_up(model, GradualUnfreezingConfig())


def test_the_head_is_what_the_base_lacks():
    """Except for a model with a backbone beside its head, where that is enough."""
    assert find_head.find_head(tiny("CLIPForImageClassification")) == ["classifier"]
    model = tiny("WhisperForAudioClassification")
    trained = set_up(model, LinearProbeConfig(head_lr=0.1)).trained
    assert {name.partition(".")[0] for name in trained} == {"projector", "classifier"}
    assert model(**samples(model)).logits.shape == (4, 3)


def test_half_of_the_weights_that_run():
    """A vision tower that a text never reaches does not count, nor one wide layer (MobileNet's last convolution)."""
    assert find_blocks.find_blocks(tiny("Gemma3ForSequenceClassification"), ["score"])[0] == [
        ["model.language_model.layers.0"],
        ["model.language_model.layers.1"],
    ]
    wide = Network(
        [("stem", conv(3, 4)), ("blocks", nn.Sequential(Cell(4, 4), Cell(4, 4))), ("end", nn.Conv2d(4, 400, 1))]
    )
    assert [block.modules for block in anatomy(wide).blocks] == [("timm_model.blocks.0",), ("timm_model.blocks.1",)]
