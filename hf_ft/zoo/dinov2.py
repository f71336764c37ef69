"""DINOv2 ViT-S/14, read from an ONNX file whose initialisers have Transformers' names.

The weights of linear layers are the exception: the export stores them transposed and without a name, as the right
inputs of MatMul nodes, which are named after the layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from hf_ft.errors import CheckpointError

PREFIX = "backbone."
WIDTH, PRETRAINED_SIDE, PATCH = 384, 518, 14
POSITIONS = ((1, 1, WIDTH), (1, (PRETRAINED_SIDE // PATCH) ** 2, WIDTH))  # of the class token and of the patches


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors under Transformers' names.

    Raises:
        ImportError: if the package onnx is not installed.
        CheckpointError: if the file does not hold the position embeddings.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("onnx is not installed, but it is needed to read dinov2-small: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    stored = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    found = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and node.name.startswith(f"/{PREFIX[:-1]}/"):
            layer = node.name.split("/")[2:-1]  # /backbone/encoder/layer.0/mlp/fc1/MatMul
            found[f"{'.'.join(layer)}.weight"] = stored[node.input[1]].T.contiguous()
    by_shape = {tuple(tensor.shape): tensor for name, tensor in stored.items() if not name.startswith(PREFIX)}
    if any(shape not in by_shape for shape in POSITIONS):
        raise CheckpointError(f"{path} holds no position embeddings of the shapes {POSITIONS}.")
    found["embeddings.position_embeddings"] = torch.cat([by_shape[shape] for shape in POSITIONS], dim=1)
    return found


def dinov2_small(path: Path) -> Any:
    """The network with a new head: DINOv2 is pretrained without labels.

    Raises:
        CheckpointError: if a tensor of the backbone is missing, left over or of another shape.
    """
    config = hf.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=PRETRAINED_SIDE,
        patch_size=PATCH,
    )
    tensors = {f"dinov2.{name}": tensor for name, tensor in read_onnx(path).items()}
    # The token that replaces masked patches in pretraining is not in the file, as it is not used afterwards.
    tensors["dinov2.embeddings.mask_token"] = torch.zeros(1, WIDTH)
    # from_pretrained knows the names that layers had when the file was written.
    kind = hf.Dinov2ForImageClassification
    model, info = kind.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    missing = {name for name in info["missing_keys"] if not name.startswith("classifier.")}
    wrong = sorted(missing | set(info["unexpected_keys"]) | {str(one) for one in info["mismatched_keys"]})
    if wrong:
        raise CheckpointError(f"{path} does not match {kind.__name__}: {', '.join(wrong[:3])}.")
    return model
