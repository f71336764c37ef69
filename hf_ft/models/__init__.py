"""What a network is made of: parts, layers, names, norms, feature maps, its pretrained head."""

from hf_ft.models.anatomy import anatomy, members_of
from hf_ft.models.batch_norm import BatchNormStatistics, convert_batch_norm, estimate_batch_norm
from hf_ft.models.feature_layers import last_feature_map, layers_of, positions, stage_convolutions, stage_outputs
from hf_ft.models.names import EVERYTHING, Names, covered, covers
from hf_ft.models.norms import batch_norms, norm_layers
from hf_ft.models.parts import Anatomy, Chain, Part
from hf_ft.models.source_head import SourceHead, head_input, require_source_head
from hf_ft.models.weight_layers import Layer, main_path_layers, weight_layers

__all__ = [
    "EVERYTHING",
    "Anatomy",
    "BatchNormStatistics",
    "Chain",
    "Layer",
    "Names",
    "Part",
    "SourceHead",
    "anatomy",
    "batch_norms",
    "convert_batch_norm",
    "covered",
    "covers",
    "estimate_batch_norm",
    "head_input",
    "last_feature_map",
    "layers_of",
    "main_path_layers",
    "members_of",
    "norm_layers",
    "positions",
    "require_source_head",
    "stage_convolutions",
    "stage_outputs",
    "weight_layers",
]
