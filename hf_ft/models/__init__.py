"""Structure of a network: anatomy, layers, names, normalisation, feature maps, and its pretrained head."""

from typing import TYPE_CHECKING

from hf_ft.lazy import attach

# Names are imported on first use, so that `import hf_ft` need not import torch.
if TYPE_CHECKING:
    from hf_ft.models.anatomy import members_of as members_of
    from hf_ft.models.batch_norm import BatchNormStatistics as BatchNormStatistics
    from hf_ft.models.batch_norm import convert_batch_norm as convert_batch_norm
    from hf_ft.models.batch_norm import estimate_batch_norm as estimate_batch_norm
    from hf_ft.models.border import SOURCE_LOGITS as SOURCE_LOGITS
    from hf_ft.models.feature_layers import last_feature_map as last_feature_map
    from hf_ft.models.feature_layers import layers_of as layers_of
    from hf_ft.models.feature_layers import positions as positions
    from hf_ft.models.feature_layers import stage_convolutions as stage_convolutions
    from hf_ft.models.feature_layers import stage_outputs as stage_outputs
    from hf_ft.models.names import EVERYTHING as EVERYTHING
    from hf_ft.models.names import Names as Names
    from hf_ft.models.names import covered as covered
    from hf_ft.models.names import covers as covers
    from hf_ft.models.norms import batch_norms as batch_norms
    from hf_ft.models.norms import norm_layers as norm_layers
    from hf_ft.models.parts import Anatomy as Anatomy
    from hf_ft.models.parts import Chain as Chain
    from hf_ft.models.parts import Part as Part
    from hf_ft.models.source_head import SourceHead as SourceHead
    from hf_ft.models.source_head import head_input as head_input
    from hf_ft.models.source_head import require_source_head as require_source_head
    from hf_ft.models.weight_layers import Layer as Layer
    from hf_ft.models.weight_layers import main_path_layers as main_path_layers
else:
    __getattr__, __dir__, __all__ = attach(__name__)
