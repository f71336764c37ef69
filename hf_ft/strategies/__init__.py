"""All strategies: importing this package registers them, and ``hf_ft`` exports their classes."""

from hf_ft.strategies.amcf.config import AMCFConfig as AMCFConfig
from hf_ft.strategies.attention_transfer import AttentionTransferConfig as AttentionTransferConfig
from hf_ft.strategies.auto_rgn import AutoRGNConfig as AutoRGNConfig
from hf_ft.strategies.bitfit import BitFitConfig as BitFitConfig
from hf_ft.strategies.blockwise.config import BlockwiseConfig as BlockwiseConfig
from hf_ft.strategies.bss import BSSConfig as BSSConfig
from hf_ft.strategies.child_tuning import ChildTuningConfig as ChildTuningConfig
from hf_ft.strategies.co_tuning.config import CoTuningConfig as CoTuningConfig
from hf_ft.strategies.daft import DAFTConfig as DAFTConfig
from hf_ft.strategies.delta.config import DELTAConfig as DELTAConfig
from hf_ft.strategies.fine_tune import FineTuneConfig as FineTuneConfig
from hf_ft.strategies.full import FullConfig as FullConfig
from hf_ft.strategies.gradual_unfreezing import GradualUnfreezingConfig as GradualUnfreezingConfig
from hf_ft.strategies.l2_sp import L2SPConfig as L2SPConfig
from hf_ft.strategies.layer_decay import LayerDecayConfig as LayerDecayConfig
from hf_ft.strategies.linear_probe import LinearProbeConfig as LinearProbeConfig
from hf_ft.strategies.lp_ft import LPFTConfig as LPFTConfig
from hf_ft.strategies.norms_only import NormsOnlyConfig as NormsOnlyConfig
from hf_ft.strategies.peft import PEFTConfig as PEFTConfig
from hf_ft.strategies.rifle import RIFLEConfig as RIFLEConfig
from hf_ft.strategies.soft import LwFConfig as LwFConfig
from hf_ft.strategies.soft import SoftConfig as SoftConfig
from hf_ft.strategies.stoch_norm import StochNormConfig as StochNormConfig
from hf_ft.strategies.stock import StockConfig as StockConfig
from hf_ft.strategies.tred.config import TREDConfig as TREDConfig
