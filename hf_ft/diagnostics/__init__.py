"""Effects of training on a model's features."""

from hf_ft.diagnostics.discrimination import (
    Discrimination,
    GeneralDiscriminationCallback,
    general_discrimination,
    plot_discrimination,
)
from hf_ft.diagnostics.disentangling import plot_disentangling
from hf_ft.diagnostics.feature_distortion import (
    FEATURES,
    Distortion,
    Distortions,
    FeatureDistortionCallback,
    feature_distortion,
    plot_distortion,
)

__all__ = [
    "Discrimination",
    "Distortion",
    "Distortions",
    "FEATURES",
    "FeatureDistortionCallback",
    "GeneralDiscriminationCallback",
    "feature_distortion",
    "general_discrimination",
    "plot_discrimination",
    "plot_disentangling",
    "plot_distortion",
]
