"""Tiny classifiers whose containers apply dropout, LayerDrop or SpecAugment themselves, without a module for it."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from hf_ft.testing import tiny_inputs

_TEXT: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 1}
_LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
_BOTH: dict[str, Any] = {"d_model": 16, "init_std": 0.2}
for _side in ("encoder", "decoder"):
    _BOTH |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 2, f"{_side}_ffn_dim": 32, f"{_side}_layerdrop": 0.3}
_AUDIO: dict[str, Any] = {**_LAYERS, "intermediate_size": 32, "classifier_proj_size": 16, "layerdrop": 0.3}
_AUDIO |= {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
_AUDIO |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
_AUDIO |= {"mask_time_prob": 0.3, "mask_time_length": 2}  # SpecAugment
_REFORMER: dict[str, Any] = {"attn_layers": ["local", "lsh"], "axial_pos_shape": (4, 2), "axial_pos_embds_dim": (8, 8)}
_REFORMER |= {"vocab_size": 64, "hidden_size": 16, "feed_forward_size": 32, "num_attention_heads": 2, "hash_seed": 0}
_REFORMER |= {"attention_head_size": 8, "max_position_embeddings": 8, "num_buckets": 2, "is_decoder": False}
_REFORMER |= {"local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "pad_token_id": 1, "initializer_range": 0.2}
_OPT = {**_TEXT, **_LAYERS, "ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.3, "init_std": 0.2}
_WHISPER = {**_BOTH, "vocab_size": 64, "max_source_positions": 20, "num_mel_bins": 8, "classifier_proj_size": 16}
_WHISPER |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 2}

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bart": (hf.BartForSequenceClassification, hf.BartConfig, {**_TEXT, **_BOTH}),
    "biogpt": (hf.BioGptForSequenceClassification, hf.BioGptConfig, {**_TEXT, **_LAYERS, "intermediate_size": 32}),
    "reformer": (hf.ReformerForSequenceClassification, hf.ReformerConfig, _REFORMER),
    "wav2vec2": (hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config, _AUDIO),
    "opt": (hf.OPTForSequenceClassification, hf.OPTConfig, _OPT),
    "whisper": (hf.WhisperForAudioClassification, hf.WhisperConfig, _WHISPER),
}


def tiny(kind: str, **fields: Any) -> hf.PreTrainedModel:
    """A model of this kind in eval mode; ``fields`` override those of its config."""
    model, config, default = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(num_labels=3, **{**default, **fields})).eval()


def inputs(model: Any, batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A random batch with labels: text, a waveform or a spectrogram."""
    shapes: dict[str, tuple[int, ...]] = {"input_values": (400,), "input_features": (8, 40)}
    random = torch.Generator().manual_seed(seed)
    if model.main_input_name in shapes:
        audio = torch.randn(batch, *shapes[model.main_input_name], generator=random)
        return {model.main_input_name: audio, "labels": torch.randint(3, (batch,), generator=random)}
    text = tiny_inputs(model, batch, seed)
    text["input_ids"][:, -3] = 2  # the end of the text, from which BART classifies
    return text
