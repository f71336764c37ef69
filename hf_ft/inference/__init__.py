"""Inference with trained classifiers: predictions, and scores on labelled data."""

from hf_ft.data.inputs import Reading
from hf_ft.inference.checkpoint import Trained, load_trained
from hf_ft.inference.evaluation import Evaluation, calibrate, evaluate
from hf_ft.inference.pipelines import calibrated
from hf_ft.inference.predictor import Options, Prediction, predict

__all__ = [
    "Evaluation",
    "Options",
    "Prediction",
    "Reading",
    "Trained",
    "calibrate",
    "calibrated",
    "evaluate",
    "load_trained",
    "predict",
]
