"""Fine-tuning strategies for Hugging Face models: one config, one Trainer, a plain checkpoint."""

from hf_ft import diagnostics
from hf_ft.advice import advise
from hf_ft.comparison import compare
from hf_ft.core.compose import compose
from hf_ft.core.config import FTConfig, Paper, Recommended, config_class, load_configs, register
from hf_ft.core.context import Context, FrozenCache, State
from hf_ft.core.options import option
from hf_ft.core.plan import Plan, Rate, Stage, Stream, Term
from hf_ft.core.task_loss import TaskLoss
from hf_ft.core.view import View
from hf_ft.engine.checkpoint import load_delta, load_weights
from hf_ft.engine.objective import Objective
from hf_ft.engine.run import Run, set_up
from hf_ft.errors import AnatomyError, CheckpointError, OptionError
from hf_ft.functional import collaborative_loss
from hf_ft.models.anatomy import anatomy
from hf_ft.models.batch_norm import BatchNormStatistics, convert_batch_norm, estimate_batch_norm
from hf_ft.models.ensemble.config import CollaborativeConfig
from hf_ft.models.ensemble.model import CollaborativeModel
from hf_ft.models.ensemble.processor import CollaborativeImageProcessor, CollaborativeTokenizer
from hf_ft.models.parts import Anatomy, Part
from hf_ft.strategies import (
    AMCFConfig,
    AttentionTransferConfig,
    BlockwiseConfig,
    BSSConfig,
    CoTuningConfig,
    DAFTConfig,
    DELTAConfig,
    FullConfig,
    GradualUnfreezingConfig,
    L2SPConfig,
    LayerDecayConfig,
    LinearProbeConfig,
    LPFTConfig,
    LwFConfig,
    SoftConfig,
    TREDConfig,
)
from hf_ft.strategies.amcf.scores import SwarmScores
from hf_ft.strategies.amcf.search import SwarmSearch
from hf_ft.strategies.blockwise.scores import BlockScores
from hf_ft.strategies.blockwise.search import BlockSearch
from hf_ft.trainer.trainer import FTTrainer
from hf_ft.version import __version__
from hf_ft.zoo.models import from_pretrained
from hf_ft.zoo.sources import load_sources

__all__ = [
    "AMCFConfig",
    "Anatomy",
    "AnatomyError",
    "AttentionTransferConfig",
    "BSSConfig",
    "BatchNormStatistics",
    "BlockScores",
    "BlockSearch",
    "BlockwiseConfig",
    "CheckpointError",
    "CollaborativeConfig",
    "CollaborativeImageProcessor",
    "CollaborativeModel",
    "CollaborativeTokenizer",
    "CoTuningConfig",
    "Context",
    "DAFTConfig",
    "DELTAConfig",
    "FTConfig",
    "FTTrainer",
    "FrozenCache",
    "FullConfig",
    "GradualUnfreezingConfig",
    "L2SPConfig",
    "LPFTConfig",
    "LayerDecayConfig",
    "LinearProbeConfig",
    "LwFConfig",
    "Objective",
    "OptionError",
    "Paper",
    "Part",
    "Plan",
    "Rate",
    "Recommended",
    "Run",
    "Stage",
    "SoftConfig",
    "State",
    "SwarmScores",
    "SwarmSearch",
    "Stream",
    "TREDConfig",
    "TaskLoss",
    "Term",
    "View",
    "__version__",
    "advise",
    "anatomy",
    "collaborative_loss",
    "compare",
    "compose",
    "config_class",
    "convert_batch_norm",
    "diagnostics",
    "estimate_batch_norm",
    "from_pretrained",
    "load_configs",
    "load_delta",
    "load_sources",
    "load_weights",
    "option",
    "register",
    "set_up",
]
