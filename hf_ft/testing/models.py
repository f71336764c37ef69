"""Tiny randomly initialised classifiers: real Transformers classes, a few thousand parameters, 32x32 images.

Each factory takes the number of classes, a seed, and any field of the architecture's config. Models are returned in
eval mode, as by `from_pretrained`. The global RNG state is restored.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from hf_ft.models.ensemble.model import CollaborativeModel

# Ten times the usual width, which is meant for hundreds of channels and would let the signal die out here.
_INIT = {"initializer_range": 0.2}
_WIDTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
_VISION: dict[str, Any] = {**_INIT, **_WIDTH, "image_size": 32, "patch_size": 8}
# Tests request the same few again and again, and a copy takes a fraction of the time of a new one.
_BUILT: dict[Any, hf.PreTrainedModel] = {}
_TEXT: dict[str, Any] = {**_INIT, **_WIDTH, "vocab_size": 64, "max_position_embeddings": 40}


def _build(
    model: Callable[..., Any],
    config: Callable[..., Any],
    num_labels: int,
    seed: int,
    kw: Mapping[str, Any],
    **default: Any,
) -> hf.PreTrainedModel:
    fields = {**default, "num_labels": num_labels, **kw}
    key = (model, seed, repr(fields))
    if key not in _BUILT:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            built = model(config(**fields))
            if getattr(built, "main_input_name", "") == "pixel_values":
                size = (16, getattr(built.config, "num_channels", 3), 32, 32)
                set_running_statistics(built, lambda: {"pixel_values": torch.randn(size)})
        _BUILT[key] = built
    return _copy(_BUILT[key], {}).eval()


def _copy(module: Any, memo: dict[int, Any]) -> Any:
    """A deep copy. Most of what a module holds is empty dictionaries of hooks, which take `copy.deepcopy` long."""
    if id(module) in memo:
        return memo[id(module)]
    memo[id(module)] = new = object.__new__(type(module))
    for name, value in vars(module).items():
        made: Any = value
        if name == "_modules":
            made = {key: child if child is None else _copy(child, memo) for key, child in value.items()}
        elif type(value) in (dict, OrderedDict, list, set) and not value:
            made = type(value)()
        elif value is not None and not isinstance(value, bool | int | float | str):
            made = copy.deepcopy(value, memo)
        new.__dict__[name] = made
    return new


@torch.no_grad()
def set_running_statistics(model: Any, batch: Callable[[], Mapping[str, Tensor]]) -> None:
    """Set batch-norm statistics from a random batch: a test could not detect changes with a new model's 0 and 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(**batch())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def tiny_resnet(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Blocks 1 + 2 in two stages."""
    default = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    return _build(hf.ResNetForImageClassification, hf.ResNetConfig, num_labels, seed, kw, **default)


def tiny_regnet(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Blocks 1 + 2 in two stages, with squeeze-and-excitation."""
    default = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 8}
    return _build(hf.RegNetForImageClassification, hf.RegNetConfig, num_labels, seed, kw, **default)


def tiny_convnext(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Blocks 1 + 2 in two stages, with a downsampling layer between them."""
    default = {**_INIT, "hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}
    default |= {"layer_scale_init_value": 0.1}
    return _build(hf.ConvNextForImageClassification, hf.ConvNextConfig, num_labels, seed, kw, **default)


def tiny_mobilenet_v1(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """All 13 depthwise-separable blocks, with 4 to 51 channels; BatchNorm momentum 0.9997."""
    default = {**_INIT, "depth_multiplier": 0.05, "min_depth": 4, "image_size": 32}
    return _build(hf.MobileNetV1ForImageClassification, hf.MobileNetV1Config, num_labels, seed, kw, **default)


def tiny_mobilenet_v2(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """All 16 inverted residuals, with 8 to 16 channels; BatchNorm momentum 0.997."""
    default = {**_INIT, "depth_multiplier": 0.05, "expand_ratio": 2.0, "image_size": 32}
    default |= {"finegrained_output": False}
    return _build(hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config, num_labels, seed, kw, **default)


def tiny_efficientnet(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Blocks 1 + 2 + 1 at strides 1, 2, 1; a mix of BatchNorm momenta 0.99 and 0.1."""
    default: dict[str, Any] = {**_INIT, "image_size": 32, "hidden_dim": 320}
    default |= {"width_coefficient": 0.25, "depth_coefficient": 1.0, "kernel_sizes": [3, 3, 5]}
    default |= {"in_channels": [32, 32, 64], "out_channels": [32, 64, 64], "strides": [1, 2, 1]}
    default |= {"num_block_repeats": [1, 2, 1], "expand_ratios": [1, 2, 2]}
    return _build(hf.EfficientNetForImageClassification, hf.EfficientNetConfig, num_labels, seed, kw, **default)


def tiny_vit(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Three layers over 16 patches."""
    return _build(hf.ViTForImageClassification, hf.ViTConfig, num_labels, seed, kw, **_VISION)


def tiny_deit(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Three layers over 16 patches, with a distillation token."""
    return _build(hf.DeiTForImageClassification, hf.DeiTConfig, num_labels, seed, kw, **_VISION)


def tiny_swin(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Blocks 1 + 2 in two stages, with patch merging between them."""
    default: dict[str, Any] = {**_INIT, "image_size": 32, "patch_size": 4, "window_size": 2, "embed_dim": 8}
    default |= {"depths": [1, 2], "num_heads": [1, 2]}
    return _build(hf.SwinForImageClassification, hf.SwinConfig, num_labels, seed, kw, **default)


def tiny_bert(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Three layers, pooler, dropout and classifier."""
    return _build(hf.BertForSequenceClassification, hf.BertConfig, num_labels, seed, kw, **_TEXT)


def tiny_roberta(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Three layers and a head of two linear layers in one module."""
    return _build(hf.RobertaForSequenceClassification, hf.RobertaConfig, num_labels, seed, kw, **_TEXT)


def tiny_distilbert(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """Three layers and a head of two linear layers in two modules."""
    default = {**_INIT, "dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2}
    default |= {"vocab_size": 64, "max_position_embeddings": 40}
    return _build(hf.DistilBertForSequenceClassification, hf.DistilBertConfig, num_labels, seed, kw, **default)


def tiny_timm(num_labels: int = 3, seed: int = 0, **kw: Any) -> hf.PreTrainedModel:
    """A model laid out like Transformers' wrapper of a timm ViT, without timm: two blocks over 16 patches."""
    return _build(TimmLikeForImageClassification, TimmLikeConfig, num_labels, seed, kw)


class TimmLikeConfig(hf.PreTrainedConfig):
    """Config of `TimmLikeForImageClassification`, with the wrapper's `model_type`."""

    model_type = "timm_wrapper"
    image_size: int = 32
    hidden_size: int = 16
    depth: int = 2
    initializer_range: float = 0.2


class TimmLikeBlock(nn.Module):
    """Pre-norm residual MLP: enough of a ViT block for the same shapes and names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class TimmLikeViT(nn.Module):
    """Outline of timm's VisionTransformer: a loose class token, and the head inside the model."""

    def __init__(self, config: TimmLikeConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (config.image_size // 8) ** 2 + 1, dim) * 0.02)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.Sequential(*(TimmLikeBlock(dim) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc_norm = nn.Identity()
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(dim, config.num_labels or 1)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (batch, patches, dim)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        x = self.norm(self.blocks(self.pos_drop(x)))
        return self.head(self.head_drop(self.fc_norm(x.mean(dim=1))))


class TimmLikeForImageClassification(hf.PreTrainedModel):
    """Outline of TimmWrapperForImageClassification."""

    config_class = TimmLikeConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: TimmLikeConfig) -> None:
        super().__init__(config)
        self.timm_model = TimmLikeViT(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.timm_model(pixel_values)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


def tiny_collaborative(num_labels: int = 3, seed: int = 0) -> CollaborativeModel:
    """A ResNet with 7 layers and one with 22, each with the images of its own processor."""
    deeper = {"depths": [3, 4], "layer_type": "bottleneck", "hidden_sizes": [16, 32]}
    members = [tiny_resnet(num_labels, seed), tiny_resnet(num_labels, seed + 1, **deeper)]
    return CollaborativeModel.from_members(members, inputs=[0, 1])


TINY_MODELS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "resnet": tiny_resnet,
    "regnet": tiny_regnet,
    "convnext": tiny_convnext,
    "mobilenet_v1": tiny_mobilenet_v1,
    "mobilenet_v2": tiny_mobilenet_v2,
    "efficientnet": tiny_efficientnet,
    "vit": tiny_vit,
    "deit": tiny_deit,
    "swin": tiny_swin,
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "distilbert": tiny_distilbert,
    "timm": tiny_timm,
}


def tiny_inputs(model: nn.Module, batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A random batch for a tiny model, with labels; for text, the last row ends in two padding tokens.

    Returns:
        pixel_values (batch, 3, 32, 32) for each processor of the model, or input_ids and attention_mask (batch, 8); and
        labels (batch,).
    """
    random = torch.Generator().manual_seed(seed)
    config: Any = model.config
    labels = torch.randint(config.num_labels, (batch,), generator=random)
    if getattr(model, "main_input_name", "") == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        names = getattr(model, "input_names", ("pixel_values",))
        images = {name: torch.randn(batch, channels, 32, 32, generator=random) for name in names}
        return {**images, "labels": labels}
    input_ids = torch.randint(5, config.vocab_size, (batch, 8), generator=random)  # 0 to 4: special tokens
    attention_mask = torch.ones_like(input_ids)
    input_ids[-1, -2:], attention_mask[-1, -2:] = config.pad_token_id, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
