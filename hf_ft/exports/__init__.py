"""Trained classifiers for other runtimes: ONNX and ``torch.export``, with the preprocessing of inputs as JSON."""

from hf_ft.exports.export import export
from hf_ft.exports.record import Export
from hf_ft.exports.settings import Settings

__all__ = ["Export", "Settings", "export"]
