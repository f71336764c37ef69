"""Names of blocks and heads in known architectures, which save a forward pass to find them."""

from __future__ import annotations

import re

# Transformer layers, or the blocks of a flat CNN, in a single list under the backbone.
_FLAT = r"\w+\.(?:encoder\.|transformer\.)?layers?\.\d+"
_STAGED = r"\w+\.encoder\.stages\.\d+\.layers\.\d+"

# config.model_type -> regex of its blocks: residual blocks or transformer layers, the smallest repeated unit.
_BLOCKS: dict[str, str] = {
    **dict.fromkeys(("vit", "deit", "beit", "dinov2", "mobilenet_v1", "mobilenet_v2"), _FLAT),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet"), _FLAT),
    **dict.fromkeys(("deberta", "deberta-v2", "modernbert"), _FLAT),
    **dict.fromkeys(("resnet", "regnet", "convnext", "convnextv2"), _STAGED),
    **dict.fromkeys(("swin", "swinv2"), r"\w+\.encoder\.layers\.\d+\.blocks\.\d+"),
    "efficientnet": r"\w+\.encoder\.blocks\.\d+",
    # One group of shared weights serves many layers: the block is the weights, not the calls.
    "albert": r"\w+\.encoder\.albert_layer_groups\.\d+",
    # In this order: ViT or EfficientNet, ConvNeXt or Swin, ResNet, RegNet.
    "timm_wrapper": r"timm_model\.(?:blocks\.\d+(?:\.\d+)?|(?:stages|layers)\.\d+\.(?:blocks\.)?\d+"
    r"|layer\d\.\d+|s\d\.b\d+)",
}
# Types whose names cover many architectures: what they match must hold most weights, and is put in forward order.
_UNSURE = frozenset({"timm_wrapper"})
# Types whose layers are differentiated only in train mode: they compute their input from their output (reversible).
TRAIN_MODE_ALONE = frozenset({"reformer"})
# MobileNetV1 lists the depthwise and the pointwise convolution of each block separately.
_MODULES_PER_BLOCK = {"mobilenet_v1": 2}

# In these architectures, modules are defined in the order in which they run, so that no forward pass is needed to find
# it, except these: defined after the blocks that read their output,
_FEEDS_BLOCKS = re.compile(
    r"(?:.*[._])?(?:rotary|position|rel(?:ative)?)_\w*|.*\.(?:layernorm_embedding|embed_dropout)"
    r"|deberta\.encoder\.(?:LayerNorm|conv)"
)
# and these: defined before the blocks, although they read the output of the last one.
_FOLLOWS_BLOCKS = re.compile(r".*\.(?:pooler|final_\w+)")
# Usual names of the head if a model does not name its backbone (CLIP, SigLIP, torchvision).
_HEAD_NAMES = ("classifier", "score", "classification_head", "head", "fc")
