"""Comparison of strategies under equal tuning budgets, with a report."""

from hf_ft.comparison.compare import compare
from hf_ft.comparison.results import Contender, Results, Training
from hf_ft.comparison.settings import Settings
from hf_ft.data.task import Data

__all__ = ["Contender", "Data", "Results", "Settings", "Training", "compare"]
