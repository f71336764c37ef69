"""The strategies. One file is one strategy; importing this package registers all of them."""

from hf_ft.strategies.amcf.config import AMCFConfig
from hf_ft.strategies.attention_transfer import AttentionTransferConfig
from hf_ft.strategies.blockwise.config import BlockwiseConfig
from hf_ft.strategies.bss import BSSConfig
from hf_ft.strategies.co_tuning.config import CoTuningConfig
from hf_ft.strategies.daft import DAFTConfig
from hf_ft.strategies.delta.config import DELTAConfig
from hf_ft.strategies.full import FullConfig
from hf_ft.strategies.gradual_unfreezing import GradualUnfreezingConfig
from hf_ft.strategies.l2_sp import L2SPConfig
from hf_ft.strategies.layer_decay import LayerDecayConfig
from hf_ft.strategies.linear_probe import LinearProbeConfig
from hf_ft.strategies.lp_ft import LPFTConfig
from hf_ft.strategies.soft import LwFConfig, SoftConfig
from hf_ft.strategies.tred.config import TREDConfig

__all__ = [
    "AMCFConfig",
    "AttentionTransferConfig",
    "BSSConfig",
    "BlockwiseConfig",
    "CoTuningConfig",
    "DAFTConfig",
    "DELTAConfig",
    "FullConfig",
    "GradualUnfreezingConfig",
    "L2SPConfig",
    "LPFTConfig",
    "LayerDecayConfig",
    "LinearProbeConfig",
    "LwFConfig",
    "SoftConfig",
    "TREDConfig",
]
