"""The vocabulary for authors: what a strategy is written in.

>>> from hf_ft.core import FTConfig, Plan, Stage, State, Term, option, register
"""

from hf_ft import functional
from hf_ft.core import advising
from hf_ft.core.compose import compose
from hf_ft.core.config import FTConfig, Paper, config_class, register, strategies
from hf_ft.core.context import Context, FrozenCache, Recipe, Samples, Source, State
from hf_ft.core.findings import Findings
from hf_ft.core.fitted_head import FittedHead
from hf_ft.core.head_rate import UNSET_RATE, HeadRate, describe_head_rate, head_rates, measure_head_rate
from hf_ft.core.needs import Needs
from hf_ft.core.options import option
from hf_ft.core.plan import (
    Average,
    GradientChange,
    NormMode,
    Plan,
    Rate,
    Selection,
    Stage,
    Stream,
    TensorRates,
    Term,
)
from hf_ft.core.recommended import CHOSEN, FITTED, USUAL_RATE, LearningRate, Recommended
from hf_ft.core.schedules import Decay, decay
from hf_ft.core.search_space import NORM_MODES, Choice, FittedRate, LogRange, Space
from hf_ft.core.state_checks import LARGEST, check_tensor
from hf_ft.core.task_loss import TaskLoss
from hf_ft.core.terms import DistanceFromStart, SquaredNorm
from hf_ft.core.view import StreamView, View
from hf_ft.errors import OptionError
from hf_ft.models.names import EVERYTHING, Names

__all__ = [
    "CHOSEN",
    "EVERYTHING",
    "FITTED",
    "LARGEST",
    "Average",
    "Choice",
    "Context",
    "Decay",
    "DistanceFromStart",
    "FTConfig",
    "Findings",
    "FittedHead",
    "FittedRate",
    "GradientChange",
    "HeadRate",
    "FrozenCache",
    "LearningRate",
    "LogRange",
    "NORM_MODES",
    "Names",
    "Needs",
    "NormMode",
    "OptionError",
    "Paper",
    "Plan",
    "Rate",
    "Recipe",
    "USUAL_RATE",
    "Recommended",
    "Samples",
    "Selection",
    "Source",
    "Space",
    "SquaredNorm",
    "Stage",
    "State",
    "Stream",
    "StreamView",
    "TaskLoss",
    "TensorRates",
    "UNSET_RATE",
    "Term",
    "View",
    "advising",
    "check_tensor",
    "compose",
    "config_class",
    "decay",
    "describe_head_rate",
    "functional",
    "head_rates",
    "measure_head_rate",
    "option",
    "register",
    "strategies",
]
