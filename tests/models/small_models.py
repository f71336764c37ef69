"""Small random models of architectures with unusual layouts or orders of layers, with inputs."""

import torch
import transformers as hf

_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
_TEXT |= {"max_position_embeddings": 64, "initializer_range": 0.2}
_VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_VISION |= {"image_size": 32, "patch_size": 8}
_T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_XLM = {"vocab_size": 64, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "pad_index": 0}
_CONFIGS = {
    "Albert": {**_TEXT, "embedding_size": 16},
    "BigBird": {**_TEXT, "block_size": 4, "num_random_blocks": 1},
    "Canine": {**_TEXT, "num_hash_buckets": 64, "num_hash_functions": 2, "local_transformer_stride": 16},
    "DonutSwin": {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]},
    "Funnel": {"vocab_size": 64, "block_sizes": [1, 2, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
    "Hiera": {
        "image_size": [32, 32],
        "embed_dim": 8,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "patch_size": [3, 3],
    },
    "IBert": {**_TEXT, "max_position_embeddings": 66},
    "LayoutLMv3": {**_TEXT, "max_position_embeddings": 66, "coordinate_size": 2, "shape_size": 4, "input_size": 32},
    "Lilt": {
        **_TEXT,
        "hidden_size": 24,
        "max_position_embeddings": 66,
        "channel_shrink_ratio": 2,
        "max_2d_position_embeddings": 64,
    },
    "Longformer": {**_TEXT, "max_position_embeddings": 66, "attention_window": [8, 8]},
    "PvtV2": {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "sr_ratios": [2, 1],
    },
    "SqueezeBert": {**_TEXT, "embedding_size": 16},
    "T5": _T5,
    "XLM": _XLM,
    "XLNet": {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
}
_MORE = {
    "Canine": {"downsampling_rate": 4, "local_transformer_stride": 16, "upsampling_kernel_size": 4},
    "DonutSwin": {"window_size": 2, "initializer_range": 0.2},
    "Funnel": {"num_decoder_layers": 1, "initializer_range": 0.2},
    "Hiera": {"patch_stride": [2, 2], "patch_padding": [1, 1], "query_stride": [2, 2], "num_query_pool": 2},
    "LayoutLMv3": {"patch_size": 16, "max_2d_position_embeddings": 64, "rel_pos_bins": 4, "rel_2d_pos_bins": 4},
    "PvtV2": {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2]},
}


def small(name: str):
    """A model with 3 classes in eval mode; the random state is kept."""
    vision = name.startswith("Siglip")
    config_class = getattr(hf, f"{name}Config")
    fields = {**_CONFIGS.get(name, {}), **_MORE.get(name, {}), "num_labels": 3}
    if vision:
        size = {"num_patches": 16} if name == "Siglip2" else {}
        fields = {"vision_config": {**_VISION, **size}, "text_config": _TEXT, "num_labels": 3}
    kind = getattr(hf, f"{name}ForSequenceClassification", None) or getattr(hf, f"{name}ForImageClassification")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config_class(**fields)).eval()
        with torch.no_grad():  # some begin with heads or scales of zeros, which would hide everything before them
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(std=0.2)
    return model


def small_inputs(model, rows: int = 2, tokens: int = 12, seed: int = 0):
    """A batch without labels: images of 32 x 32, or texts of this length with an attention mask and no padding."""
    random = torch.Generator().manual_seed(seed)
    name = type(model).__name__.partition("For")[0]
    images = torch.randn(rows, 3, 32, 32, generator=random)
    if name == "Siglip2":
        pixels = torch.randn(rows, 16, 3 * 8 * 8, generator=random)
        shapes = torch.tensor([[4, 4]] * rows)
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(rows, 16).long(), "spatial_shapes": shapes}
    if getattr(model, "main_input_name", "") == "pixel_values":
        return {"pixel_values": images}
    ids = torch.randint(10, 60, (rows, tokens), generator=random)
    if name == "T5":
        ids[:, -1] = model.config.eos_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("Lilt", "LayoutLMv3"):
        corners = torch.randint(0, 30, (rows, tokens, 2), generator=random)
        inputs["bbox"] = torch.cat([corners, corners + 20], dim=2)
    if name == "LayoutLMv3":
        inputs["pixel_values"] = images
    return inputs
