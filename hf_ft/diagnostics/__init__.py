"""Effects of training on a model's features."""

from hf_ft.diagnostics.discrimination import (
    Discrimination,
    GeneralDiscriminationCallback,
    general_discrimination,
    plot_discrimination,
)
from hf_ft.diagnostics.disentangling import plot_disentangling
from hf_ft.diagnostics.distortion import (
    FEATURES as FEATURES,
)
from hf_ft.diagnostics.distortion import (
    Distortion,
    FeatureDistortionCallback,
    feature_distortion,
    plot_distortion,
)
from hf_ft.diagnostics.distortion import Distortions as Distortions

__all__ = [
    "Discrimination",
    "Distortion",
    "FeatureDistortionCallback",
    "GeneralDiscriminationCallback",
    "feature_distortion",
    "general_discrimination",
    "plot_discrimination",
    "plot_disentangling",
    "plot_distortion",
]
