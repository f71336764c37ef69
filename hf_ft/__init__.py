"""Fine-tuning strategies for Hugging Face models: one config, one Trainer, a plain checkpoint."""

from typing import TYPE_CHECKING

from hf_ft.lazy import attach
from hf_ft.models.ensemble.auto import register_when_imported
from hf_ft.version import __version__ as __version__

# Each is imported when it is first used: importing torch and Transformers takes seconds.
if TYPE_CHECKING:
    from hf_ft import diagnostics as diagnostics
    from hf_ft.advice import advise as advise
    from hf_ft.comparison import compare as compare
    from hf_ft.core.compose import compose as compose
    from hf_ft.core.config import FTConfig as FTConfig
    from hf_ft.core.config import Paper as Paper
    from hf_ft.core.config import config_class as config_class
    from hf_ft.core.config import load_configs as load_configs
    from hf_ft.core.config import register as register
    from hf_ft.core.context import Context as Context
    from hf_ft.core.context import FrozenCache as FrozenCache
    from hf_ft.core.context import State as State
    from hf_ft.core.options import option as option
    from hf_ft.core.plan import Average as Average
    from hf_ft.core.plan import GradientChange as GradientChange
    from hf_ft.core.plan import Plan as Plan
    from hf_ft.core.plan import Rate as Rate
    from hf_ft.core.plan import Selection as Selection
    from hf_ft.core.plan import Stage as Stage
    from hf_ft.core.plan import Stream as Stream
    from hf_ft.core.plan import TensorRates as TensorRates
    from hf_ft.core.plan import Term as Term
    from hf_ft.core.recommended import LearningRate as LearningRate
    from hf_ft.core.recommended import Recommended as Recommended
    from hf_ft.core.task_loss import TaskLoss as TaskLoss
    from hf_ft.core.view import View as View
    from hf_ft.data.checking import check_data as check_data
    from hf_ft.engine.checkpoint import load_weights as load_weights
    from hf_ft.engine.deltas import load_delta as load_delta
    from hf_ft.engine.objective import Objective as Objective
    from hf_ft.engine.run import Run as Run
    from hf_ft.engine.set_up import set_up as set_up
    from hf_ft.errors import AnatomyError as AnatomyError
    from hf_ft.errors import CheckpointError as CheckpointError
    from hf_ft.errors import DataError as DataError
    from hf_ft.errors import HubError as HubError
    from hf_ft.errors import OptionError as OptionError
    from hf_ft.exports import export as export
    from hf_ft.functional import collaborative_loss as collaborative_loss
    from hf_ft.inference import calibrated as calibrated
    from hf_ft.inference import evaluate as evaluate
    from hf_ft.inference import predict as predict
    from hf_ft.models.anatomy import anatomy as anatomy
    from hf_ft.models.batch_norm import BatchNormStatistics as BatchNormStatistics
    from hf_ft.models.batch_norm import convert_batch_norm as convert_batch_norm
    from hf_ft.models.batch_norm import estimate_batch_norm as estimate_batch_norm
    from hf_ft.models.ensemble.config import CollaborativeConfig as CollaborativeConfig
    from hf_ft.models.ensemble.model import CollaborativeModel as CollaborativeModel
    from hf_ft.models.ensemble.processor import CollaborativeImageProcessor as CollaborativeImageProcessor
    from hf_ft.models.ensemble.processor import CollaborativeTokenizer as CollaborativeTokenizer
    from hf_ft.models.parts import Anatomy as Anatomy
    from hf_ft.models.parts import Part as Part
    from hf_ft.models.sharing import push_to_hub as push_to_hub
    from hf_ft.models.soup import Soup as Soup
    from hf_ft.models.soup import soup as soup
    from hf_ft.strategies import *  # noqa: F403, one line there makes a strategy known here too
    from hf_ft.strategies.amcf.scores import SwarmScores as SwarmScores
    from hf_ft.strategies.amcf.search import SwarmSearch as SwarmSearch
    from hf_ft.strategies.blockwise.scores import BlockScores as BlockScores
    from hf_ft.strategies.blockwise.search import BlockSearch as BlockSearch
    from hf_ft.trainer.trainer import FTTrainer as FTTrainer
    from hf_ft.zoo.models import from_pretrained as from_pretrained
    from hf_ft.zoo.sources import load_sources as load_sources
else:
    __getattr__, __dir__, __all__ = attach(__name__)

register_when_imported()
