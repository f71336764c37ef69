"""Choose a strategy without training them all: measure cheap signals, then rank the strategies with reasons."""

from hf_ft.advice.advise import Advice, advise
from hf_ft.advice.regret import how_often_right
from hf_ft.advice.rules import Reason, Recommendation, recommend
from hf_ft.advice.signals import Shift, Signals

__all__ = [
    "Advice",
    "Reason",
    "Recommendation",
    "Shift",
    "Signals",
    "advise",
    "how_often_right",
    "recommend",
]
