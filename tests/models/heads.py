"""Tiny classifiers with all kinds of heads (several modules, per token, after pooling), and padded samples."""

import copy

import torch
import transformers as hf

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SPREAD = {"initializer_range": 0.2}  # ten times the usual, with which the signal of so few channels dies out
_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **_SPREAD}
_BERT = {**_TEXT, **_SIZES, "max_position_embeddings": 40}
_SOUND = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
_SOUND |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12}
_SOUND |= {"feat_extract_norm": "layer"}  # the other norms a sound over all of its time, padding included

TEXTS = {
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(**_TEXT, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=40),
    ),
    "deberta_v2": (hf.DebertaV2ForSequenceClassification, hf.DebertaV2Config(**_BERT)),
    "modernbert": (
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(**_BERT, classifier_pooling="mean", cls_token_id=1, sep_token_id=2),
    ),
    "xlnet": (hf.XLNetForSequenceClassification, hf.XLNetConfig(**_TEXT, d_model=16, n_layer=2, n_head=2, d_inner=32)),
    "gpt2": (hf.GPT2ForSequenceClassification, hf.GPT2Config(**_TEXT, n_embd=16, n_layer=2, n_head=2, n_positions=40)),
    "llama": (hf.LlamaForSequenceClassification, hf.LlamaConfig(**_BERT)),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig(**_BERT, embedding_size=8)),
    "bloom": (hf.BloomForSequenceClassification, hf.BloomConfig(**_TEXT, hidden_size=16, n_layer=2, n_head=2)),
}
OTHERS = {
    "wav2vec2": (hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config(**_SIZES, **_SPREAD, **_SOUND)),
    "timesformer": (
        hf.TimesformerForVideoClassification,
        hf.TimesformerConfig(**_SIZES, **_SPREAD, image_size=16, patch_size=8, num_frames=2),
    ),
}


def headed(name, classes=3, dtype=torch.float32):
    """A random model in eval mode; the same weights for the same number of classes."""
    kind, config = (TEXTS | OTHERS)[name]
    config = copy.deepcopy(config)
    config.num_labels = classes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).to(dtype).eval()


def padded(name, more=0):
    """Four samples of different lengths, and their labels; the longest is followed by ``more`` padding."""
    random = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, 1])
    if name == "timesformer":
        return {"pixel_values": torch.randn(4, 2, 3, 16, 16, generator=random), "labels": labels}
    lengths = (9, 7, 9, 5)
    if name == "wav2vec2":
        lengths = [80 * length for length in lengths]
        values = torch.randn(4, 720, generator=random)
        more *= 80
    else:
        values = torch.randint(5, 60, (4, 9), generator=random)
    for row, length in enumerate(lengths):
        values[row, length:] = 0
    values = torch.nn.functional.pad(values, (0, more))
    mask = torch.arange(values.shape[1])[None] < torch.tensor(lengths)[:, None]
    return {
        "input_values" if name == "wav2vec2" else "input_ids": values,
        "attention_mask": mask.long(),
        "labels": labels,
    }


def without_labels(batch, dtype=torch.float32):
    """The inputs without labels, in this dtype."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
