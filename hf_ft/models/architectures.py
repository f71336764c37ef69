"""What is known of architectures by name: where their blocks and heads are."""

from __future__ import annotations

import re

# Transformer layers, or the blocks of a flat CNN, in one list under the backbone.
_FLAT = r"\w+\.(?:encoder\.|transformer\.)?layers?\.\d+"
_STAGED = r"\w+\.encoder\.stages\.\d+\.layers\.\d+"

# config.model_type -> regex of its blocks: residual blocks or transformer layers, the finest repeated unit.
_BLOCKS: dict[str, str] = {
    **dict.fromkeys(("vit", "deit", "beit", "dinov2", "mobilenet_v1", "mobilenet_v2"), _FLAT),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet"), _FLAT),
    **dict.fromkeys(("deberta", "deberta-v2", "modernbert"), _FLAT),
    **dict.fromkeys(("resnet", "regnet", "convnext", "convnextv2"), _STAGED),
    **dict.fromkeys(("swin", "swinv2"), r"\w+\.encoder\.layers\.\d+\.blocks\.\d+"),
    "efficientnet": r"\w+\.encoder\.blocks\.\d+",
    # One group of shared weights is called for many layers: the weights are the block, not the calls.
    "albert": r"\w+\.encoder\.albert_layer_groups\.\d+",
    # In turn: ViT or EfficientNet, ConvNeXt or Swin, ResNet, RegNet.
    "timm_wrapper": r"timm_model\.(?:blocks\.\d+(?:\.\d+)?|(?:stages|layers)\.\d+\.(?:blocks\.)?\d+"
    r"|layer\d\.\d+|s\d\.b\d+)",
}
# MobileNetV1 lists the depthwise and the pointwise convolution of each block separately.
_MODULES_PER_BLOCK = {"mobilenet_v1": 2}

# Modules are defined in the order they run, but for these: after the blocks, though every block reads their output,
_FEEDS_BLOCKS = re.compile(
    r"(?:.*[._])?(?:rotary|position|rel(?:ative)?)_\w*|.*\.(?:layernorm_embedding|embed_dropout)"
    r"|deberta\.encoder\.(?:LayerNorm|conv)"
)
# and before the blocks, though they read the last one's.
_FOLLOWS_BLOCKS = re.compile(r".*\.(?:pooler|final_\w+)")
# What a head is called where a model does not name its backbone (CLIP, SigLIP, torchvision).
_HEAD_NAMES = ("classifier", "score", "classification_head", "head", "fc")
