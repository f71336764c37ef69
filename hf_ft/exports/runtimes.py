"""Running exported models: each is a function from tensors by name to logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ft.exports.graph import LOGITS, quiet

Run = Callable[[Mapping[str, Tensor]], Tensor]
EXTRA = "pip install 'hf-ft[export]'"
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Check for the packages that ONNX needs.

    Raises:
        ImportError: with the pip command.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"format='onnx' needs {', '.join(missing)}: {EXTRA}. format='pt2' only needs torch.")


def in_torch(model: Any) -> Run:
    """The model itself."""

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits
        return logits.reshape(logits.shape[0], -1)

    return run


def in_onnxruntime(file: Path) -> Run:
    """An ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {one.name for one in session.get_inputs()}  # an input without influence is left out

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        given = {name: value.numpy() for name, value in inputs.items() if name in names}
        return torch.from_numpy(session.run([LOGITS], given)[0])

    return run


def in_program(file: Path) -> Run:
    """A file of ``torch.export``, read again."""
    program = torch.export.load(file).module()

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = program(**inputs)
        return logits

    return run


def quantize(file: Path, quantized: Path) -> None:
    """Store weights as 8-bit integers; inputs of matrix products and convolutions are rounded to 8 bits at run time.

    Raises:
        Exception: whatever onnxruntime raises.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = file.with_name(f"{file.name}.data").exists()
    # Unsigned: signed weights saturate on processors without VNNI, and older runtimes cannot convolve with them.
    with quiet():
        quantize_dynamic(str(file), str(quantized), weight_type=QuantType.QUInt8, use_external_data_format=large)


def size_of(files: Iterable[Path]) -> int:
    """Their size in bytes."""
    return sum(file.stat().st_size for file in files)
