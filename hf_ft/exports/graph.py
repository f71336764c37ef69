"""A classifier as a graph that depends on neither Transformers nor hf_ft: traced by torch, converted to ONNX."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_ft.engine.adapters import merge_adapters
from hf_ft.errors import OptionError
from hf_ft.inference.batches import Batches

Axes = Mapping[str, Mapping[int, str]]
LOGITS = "logits"
BATCH = "batch"
_LONGEST_REASON = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# For texts and sounds the second axis; of images the last two.
_AXES: dict[str, dict[int, str]] = {
    "text": {1: "sequence"},
    "audio": {1: "length", 2: "frames"},
    "image": {2: "height", 3: "width"},
}


class Logits(nn.Module):
    """A classifier whose forward takes tensors, by these names or in this order, and returns logits (B, C)."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Tensor, **inputs: Tensor) -> Tensor:
            logits = model(**dict(zip(names, args, strict=False)), **inputs).logits
            return logits.reshape(logits.shape[0], -1)

        # The tracer names the inputs of the graph by the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        setattr(forward, "__signature__", inspect.Signature([inspect.Parameter(name, kind) for name in names]))  # noqa: B010
        self.forward = forward


@dataclass(frozen=True)
class Example:
    """The inputs with which a model is traced.

    Attributes:
        inputs: at least two samples; their values have no influence, and are random.
        axes: for each input, the axes whose size is free, and their names.
    """

    inputs: Mapping[str, Tensor]
    axes: Axes

    @classmethod
    def of(cls, batches: Batches, task: str) -> Example:
        """The first batch; axes whose sizes differ between samples are free, as is the number of samples.

        Raises:
            OptionError: if the processor cannot process random samples.
        """
        alone = [one for batch in map(batches.alone, range(len(batches.rows))) for one in batch]
        axes: dict[str, dict[int, str]] = {}
        for name, first in alone[0].items():
            names = _AXES.get(task, {})
            free = [axis for axis in range(1, first.dim()) if len({one[name].shape[axis] for one in alone}) > 1]
            axes[name] = {0: BATCH, **{axis: names.get(axis, f"axis_{axis}") for axis in free}}
        numbers, inputs = max(batches[0].views[0], key=lambda group: len(group[0]))
        if len(numbers) == 1:  # one sample would fix the size of the batch
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        return cls(dict(inputs), axes)


def plain_model(model: Any) -> Any:
    """The model on the CPU in float32, its adapters merged, without caches; changed in place.

    Raises:
        OptionError: if adapters cannot be merged; the message names their kind.
    """
    model = model.to("cpu", torch.float32).eval()
    if isinstance(model, PeftModel):
        try:
            model = merge_adapters(model).eval()
        except OptionError as error:
            kind = type(next(iter(model.peft_config.values()))).__name__
            raise OptionError(
                f"adapters of {kind} cannot be merged into the weights, so the model cannot be exported ({error})."
            ) from error
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    return model.requires_grad_(False)


def traced(model: nn.Module, example: Example) -> Any:
    """The graph of a model as an ``ExportedProgram``, without the paths of its source.

    Raises:
        Exception: whatever the tracer raises.
    """
    free = {name: {axis: torch.export.Dim.DYNAMIC for axis in axes} for name, axes in example.axes.items()}
    with torch.no_grad(), quiet():
        wrapped = Logits(model, list(example.inputs)).eval()
        kwargs: dict[str, Any] = dict(example.inputs)
        program = torch.export.export(wrapped, (), kwargs=kwargs, dynamic_shapes=free, strict=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths on this machine
    return program


def write_onnx(program: Any, example: Example, file: Path) -> None:
    """Convert a traced model to ONNX; weights of more than about 2 GB go to a file next to it.

    Raises:
        Exception: whatever the exporter raises.
    """
    names: dict[str, Any] = {name: dict(axes) for name, axes in example.axes.items()}
    with quiet():
        converted: Any = torch.onnx.export(
            program,
            (),
            input_names=list(example.inputs),
            output_names=[LOGITS],
            dynamic_shapes=names,
            dynamo=True,
            verbose=False,
        )
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()  # its origin, with paths on this machine
        converted.save(str(file))


def other_attention(model: Any) -> bool:
    """Make a model compute attention step by step, which more exporters support; False if it already does or cannot."""
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used in (None, "eager") or not hasattr(model, "set_attn_implementation"):
        return False
    try:
        model.set_attn_implementation("eager")
    except Exception:  # of models that have only one
        return False
    return True


def reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines()]
    text = " ".join(" ".join(line for line in lines if line).split())
    text = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return f"{type(error).__name__}: {text}".rstrip(": ").rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what torch and onnxruntime log for their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
