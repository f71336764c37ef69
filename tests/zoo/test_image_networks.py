"""Image networks by short name: what is read from their files, and how they treat image sizes."""

import importlib.util

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from hf_ft.testing import same_tensors
from hf_ft.zoo import image_networks
from hf_ft.zoo.image_networks import GATES, LITE, image_processor
from hf_ft.zoo.models import SHORT_NAMES, load_model


def package(name, tmp_path, monkeypatch):
    """An installed package that fails on import, and the path of the file with its weights."""
    entry = SHORT_NAMES[name]
    folder = tmp_path / entry.requirement.partition("==")[0].replace("-", "_")
    path = folder / entry.path
    path.parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_sizes_by_default_are_those_of_pretraining():
    picture = (torch.rand(3, 300, 500) * 255).byte().numpy()
    sides = {
        name: image_processor(name, None)([picture], return_tensors="pt")["pixel_values"].shape[-2:]
        for name, entry in SHORT_NAMES.items()
        if entry.task == "image"
    }
    small = {name: (224, 224) for name in ("mobilenet_v2", "efficientnet-lite0", "dinov2-small")}
    assert sides == {**small, "efficientnet-lite1": (240, 240), "efficientnet-lite2": (260, 260)}


# EfficientNet-Lite


@pytest.mark.slow
def test_lite_is_scaled_without_stem_and_last_convolution(tmp_path, monkeypatch):
    path = package("efficientnet-lite2", tmp_path, monkeypatch)
    options = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "num_labels": 1000, "hidden_dim": 1280}
    source = hf.EfficientNetForImageClassification(hf.EfficientNetConfig(**options, **LITE["efficientnet-lite2"]))
    tensors = {name: value for name, value in source.state_dict().items() if GATES not in name}
    torch.save({name.replace("efficientnet.", "_"): value for name, value in tensors.items()}, path)
    model, _ = load_model("efficientnet-lite2", num_labels=3)
    kept = {name: value for name, value in model.state_dict().items() if name in tensors and "classifier" not in name}
    same_tensors(kept, {name: value for name, value in tensors.items() if "classifier" not in name})
    assert model.efficientnet.embeddings.convolution.out_channels == 32 and len(model.efficientnet.encoder.blocks) == 21
    assert model.efficientnet.encoder.top_conv.in_channels == 352 and model.classifier.in_features == 1280
    assert model.config.image_size == 260 and model.config.depthwise_padding == [4, 7, 15]


@pytest.mark.parametrize(
    ("name", "size", "blocks"),
    [
        ("efficientnet-lite0", 224, []),
        ("efficientnet-lite0", 96, []),
        ("efficientnet-lite0", 100, [3, 5, 11]),
        ("efficientnet-lite1", 240, [15]),
        ("efficientnet-lite2", 128, []),
    ],
)
def test_blocks_with_an_odd_input(name, size, blocks):
    config = hf.EfficientNetConfig(image_size=size, **LITE[name])
    assert image_networks._odd_inputs(config) == blocks


class SamePadding(nn.Module):
    """A convolution with TensorFlow's padding, computed from its input."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        side, kernel, stride = x.shape[-1], self.convolution.kernel_size[0], self.convolution.stride[0]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        return self.convolution._conv_forward(
            F.pad(x, (total // 2, total - total // 2) * 2), self.convolution.weight, self.convolution.bias
        )


def installed(name):
    return importlib.util.find_spec(SHORT_NAMES[name].requirement.partition("==")[0].replace("-", "_")) is not None


@pytest.mark.real
@pytest.mark.parametrize(("name", "size"), [*((name, None) for name in LITE), ("efficientnet-lite0", 100)])
def test_lite_pads_as_tensorflow(name, size):
    if not installed(name):
        pytest.skip(f"the package with the weights of {name} is not installed")
    model, _ = load_model(name, image_size=size)
    pixels = torch.randn(1, 3, model.config.image_size, model.config.image_size)
    ours = model(pixels).logits
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.ZeroPad2d):
                setattr(module, child, nn.Identity())
            elif isinstance(layer, nn.Conv2d) and not isinstance(module, SamePadding):
                layer.padding = (0, 0)
                setattr(module, child, SamePadding(layer))
    torch.testing.assert_close(model(pixels).logits, ours)
