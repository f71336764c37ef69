"""Tiny configs of Transformers' classification classes.

A class's default config is shrunk by one rule for each field name (`SIZES`); what the rule cannot know is in
`EXCEPTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers as hf

CLASSES = 3
PIXELS = 32

# --- sizes ------------------------------------------------------------------------------------------------

_LAYERS = 2
_WIDTH = 16
_HEADS = 2

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth"),
            *("num_decoder_layers", "decoder_num_hidden_layers", "num_spatial_layers", "num_temporal_layers"),
            *("num_blocks", "pred_num_hidden_layers"),
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"),
            *("decoder_attention_heads", "num_key_value_heads", "decoder_num_attention_heads"),
            *("num_self_attention_heads", "pred_num_attention_heads", "linear_num_key_heads"),
            *("linear_num_value_heads", "num_ctc_classes", "num_cross_attention_heads"),
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size", "d_latents"),
            *("word_embed_proj_dim", "classifier_proj_size", "output_hidden_size", "pooler_hidden_size"),
            *("decoder_hidden_size", "projection_dim", "input_embedding_size", "output_embedding_size"),
            *("pred_hidden_size", "true_hidden_size", "q_lora_rank", "kv_lora_rank", "codevector_dim"),
            *("proj_codevector_dim", "pooler_output_size", "out_hidden_size", "entity_emb_size"),
            *("feature_projection_input_dim", "xpath_unit_hidden_size", "stem_channels", "projection_size"),
            *("intra_bottleneck_size", "dim_model_base"),
        ),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dff", "hidden_dim"),
            *("n_inner", "moe_intermediate_size", "shared_expert_intermediate_size", "feed_forward_size"),
            *("ffn_hidden_size", "d_inner", "decoder_intermediate_size", "attention_hidden_size"),
        ),
        2 * _WIDTH,
    ),
    **dict.fromkeys(
        (
            *("head_dim", "d_kv", "d_head", "kv_channels", "linear_key_head_dim", "linear_value_head_dim"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_head_dim", "attention_head_size"),
            *("rotary_dim", "mamba_headdim", "mamba_d_state", "adapter_rank", "index_head_dim"),
        ),
        _WIDTH // _HEADS,
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "qk_head_dim": _WIDTH,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
    "entity_vocab_size": 20,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "n_positions": 64,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "max_xpath_tag_unit_embeddings": 8,
    "max_xpath_subs_unit_embeddings": 8,
    "image_size": PIXELS,
    "frames_per_clip": 4,
    "num_frames": 4,
    "crop_size": PIXELS,
    "window_size": 4,
    "num_mel_bins": 16,
    "max_length": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 4,
    "tdnn_dim": (8, 8, 8, 8, 16),
    "xvector_output_dim": 8,
    "num_adapter_layers": 1,
}
"""The value of a field of a config, by its name, for a config that has such a field with a number in it."""

_DEPTHS = ("depths", "num_blocks", "block_repeats", "stage_num_blocks")
_WIDTHS = ("hidden_sizes", "embed_dims", "stage_out_channels", "neck_hidden_sizes", "encoder_hidden_sizes")
_PATCHES = ("patch_size", "encoder_stride")
_HEADS_OF_STAGES = ("num_heads", "num_attention_heads", "num_key_value_heads")

_LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attn_layers")
_DERIVED = ("hidden_size", "num_layers", "num_hidden_layers", "hybrid_layer_ids")
"""For a network in stages, what its config derives from the lists of its stages."""
_UNSET = {"head_dim": _WIDTH // _HEADS, "num_key_value_heads": _HEADS}

_SPREADS, _SPREAD = ("initializer_range", "init_std"), 0.2
"""Ten times the usual value, which is meant for hundreds of channels and would let the signal die out here."""

_LAYERDROP = 0.5
"""The usual 0.1 would skip neither of the two layers in most of a test's few steps."""

_TEXT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _field(name: str, value: Any) -> Any:
    """The tiny value of a field of this name and default; the default if there is no rule."""
    if isinstance(value, bool) or value is None:
        return _UNSET.get(name) if value is None else value
    if name in _LAYER_KINDS and isinstance(value, (list, tuple)) and value:
        kinds = list(dict.fromkeys(value))[:_LAYERS]
        return kinds * (_LAYERS // len(kinds))
    if isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
        count = len(value)
        if name in _DEPTHS:
            return [2 if stage == 1 else 1 for stage in range(count)]
        if name in _WIDTHS:
            return [8 * 2 ** min(stage, 3) for stage in range(count)]
        if name in _HEADS_OF_STAGES:
            return [1 if stage == 0 else 2 for stage in range(count)]
        if name in ("conv_dim", "conv_kernel", "conv_stride", "tdnn_dim"):
            return SIZES[name]
        if name == "image_size":
            return [PIXELS] * count
        return value
    if name in _SPREADS and value:
        return _SPREAD
    if name.endswith("layerdrop") and value:
        return _LAYERDROP
    if isinstance(value, (int, float)) and name in _PATCHES:
        return min(int(value), 8)
    if isinstance(value, int) and name in SIZES and not isinstance(SIZES[name], tuple):
        return min(value, SIZES[name])
    return value


def _shrunk(config: hf.PreTrainedConfig, text: bool) -> dict[str, Any]:
    """The fields that make a config of this class tiny, nested for the configs inside it."""
    fields: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, hf.PreTrainedConfig):
            fields[name] = _shrunk(value, text)
        elif name in _DERIVED and isinstance(getattr(config, "depths", None), (list, tuple)):
            continue
        elif not name.startswith("_") and (small := _field(name, value)) != value:
            fields[name] = small
    if text and "vocab_size" in fields:
        fields |= _TEXT
    return fields


# --- exceptions -------------------------------------------------------------------------------------------

_TWO_STAGES = {"depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "embed_dim": 8}
_LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "key_dim": [4, 4, 4], "patch_size": 16}
_PERCEIVER = {"num_latents": 8, "num_self_attends_per_block": _LAYERS}
_SHARED = {  # the second hybrid layer has the weights of the first
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_head_dim": _WIDTH,
    "attention_hidden_size": 2 * _WIDTH,
}
_GROUPS = {"n_group": 2, "topk_group": 2}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ASTForAudioClassification": {"patch_size": 8, "frequency_stride": 4, "time_stride": 4},
    "AXK1ForSequenceClassification": _GROUPS,
    # They would change to it at the first text that is this short, and draw the weights of new layers for it.
    "BigBirdForSequenceClassification": {"attention_type": "original_full"},
    "BigBirdPegasusForSequenceClassification": {"attention_type": "original_full"},
    "BitForImageClassification": {"num_groups": 4, "embedding_size": 8},
    "CanineForSequenceClassification": {"num_hash_buckets": 32, "local_transformer_stride": 4},
    "CLIPForImageClassification": {"text_config": {"vocab_size": 99, **_TEXT}},
    "CohereCompassTextForSequenceClassification": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "CvtForImageClassification": {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "DeepseekV2ForSequenceClassification": {**_GROUPS, "num_experts_per_tok": 2},
    "DonutSwinForImageClassification": _TWO_STAGES,
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.25,
        "depth_coefficient": 1.0,
        "hidden_dim": 320,
        **{"in_channels": [32, 32, 64], "out_channels": [32, 64, 64], "strides": [1, 2, 1]},
        **{"kernel_sizes": [3, 3, 5], "num_block_repeats": [1, 2, 1], "expand_ratios": [1, 2, 2]},
    },
    "EsmForSequenceClassification": {"vocab_size": 99, **_TEXT},
    "EsmcForSequenceClassification": {"vocab_size": 99},
    "FocalNetForImageClassification": {"embed_dim": 8, "depths": [1, 2], "hidden_sizes": [8, 16]},
    "GPTNeoForSequenceClassification": {"attention_types": [[["global", "local"], 1]]},
    "HGNetV2ForImageClassification": {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 32],
        "stage_mid_channels": [4, 4, 8, 8],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "HieraForImageClassification": {"embed_dim": 8, "num_query_pool": 2, "depths": [1, 1, 2, 1]},
    "ImageGPTForImageClassification": {"n_positions": PIXELS, "vocab_size": 99},
    "JambaForSequenceClassification": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    },
    "LayoutLMv3ForSequenceClassification": {
        **{"input_size": PIXELS, "coordinate_size": 3, "shape_size": 2, "max_2d_position_embeddings": 64},
    },
    "LevitForImageClassification": _LEVIT,
    "LevitForImageClassificationWithTeacher": _LEVIT,
    "LiltForSequenceClassification": {"hidden_size": 24, "max_2d_position_embeddings": 64},
    "LongformerForSequenceClassification": {"attention_window": 8},
    "MarkupLMForSequenceClassification": {"tag_pad_id": 7, "subs_pad_id": 7, "max_depth": 4},
    "Mistral4ForSequenceClassification": {"head_dim": _WIDTH},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.05, "min_depth": 4},
    "MobileNetV2ForImageClassification": {
        **{"depth_multiplier": 0.05, "expand_ratio": 2.0, "finegrained_output": False},
    },
    "MobileViTForImageClassification": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16]},
    "MobileViTV2ForImageClassification": {
        **{"width_multiplier": 0.125, "image_size": 64, "n_attn_blocks": [1, 1, 1]},
    },
    "PerceiverForImageClassificationFourier": {**_PERCEIVER, "num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": _PERCEIVER,
    "PerceiverForImageClassificationLearned": _PERCEIVER,
    "PerceiverForSequenceClassification": _PERCEIVER,
    "PPLCNetForImageClassification": {"scale": 0.25, "class_expand": 32},
    "Qwen3_5ForSequenceClassification": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "ReformerForSequenceClassification": {
        **{"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 2},
        **{"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    },
    "RoCBertForSequenceClassification": {
        **{"pronunciation_vocab_size": 99, "shape_vocab_size": 99},
        **{"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    },
    "SwinForImageClassification": _TWO_STAGES,
    "Swinv2ForImageClassification": _TWO_STAGES,
    "T5ForSequenceClassification": {"decoder_start_token_id": 0},
    "TextNetForImageClassification": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 16]},
    "Wav2Vec2BertForSequenceClassification": {"conv_depthwise_kernel_size": 5},
    "WhisperForAudioClassification": {"max_source_positions": 16, **_TEXT, "decoder_start_token_id": 1},
    "XmodForSequenceClassification": {"default_language": "en_XX"},
    "ZambaForSequenceClassification": {**_SHARED, "mamba_dt_rank": 4},
    "Zamba2ForSequenceClassification": {**_SHARED, "n_mamba_heads": 2, "mamba_headdim": _WIDTH},
}
"""Fields of a class's config that the rule for their name gets wrong, and fields that it does not reach."""


def tiny_config(name: str, text: bool, **fields: Any) -> hf.PreTrainedConfig:
    """The config of the tiny model of a class; ``fields`` are set in it, ``text`` if it reads tokens."""
    kind = getattr(hf, name).config_class
    small = _shrunk(kind(), text)
    classes = fields.pop("num_labels", CLASSES)
    # All three: of the number alone, Pvt's config makes no names.
    names = {index: f"LABEL_{index}" for index in range(classes)}
    labels = {"num_labels": classes, "id2label": names, "label2id": {name: index for index, name in names.items()}}
    return kind(**_merged(small, EXCEPTIONS.get(name, {}), labels, fields))


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            inside = isinstance(value, Mapping) and isinstance(whole.get(name), dict)
            whole[name] = _merged(whole[name], value) if inside else value
    return whole
