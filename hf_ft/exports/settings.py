"""What to export, into which files, and how to check it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hf_ft.data.sounds import SECONDS
from hf_ft.errors import OptionError
from hf_ft.exports.record import RECORD
from hf_ft.exports.runtimes import check_installed

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = get_args(Format)
ONNX, PROGRAM, INT8 = "model.onnx", "model.pt2", "model.int8.onnx"
CHECKED = 64  # samples that are compared by default


@dataclass(frozen=True)
class Settings:
    """What to export, and how to check it.

    Attributes:
        formats: ``onnx``, and ``pt2`` for ``torch.export``.
        quantize: ``int8`` also writes an ONNX file with 8-bit weights.
        overwrite: replace an earlier export.
        tolerance: how far logits may differ from those of the model, as :class:`~hf_ft.exports.check.Difference`
            measures it.
        samples: number of samples to compare on, spread over the data; by default 64, and all for ``int8``.
        batch_size: batch size of the comparison.
        max_length: maximum text length in tokens; by default that of the model, at most 512.
        seconds: length to which sounds are cut.

    Raises:
        OptionError: for a value that cannot work.
    """

    formats: tuple[Format, ...] = ("onnx",)
    quantize: Literal["int8"] | None = None
    overwrite: bool = False
    tolerance: float = 1e-4
    samples: int | None = None
    batch_size: int = 32
    max_length: int | None = None
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise _refused("formats", unknown[0] if unknown else "", f"choose {' or '.join(FORMATS)}, or both")
        if self.quantize not in (None, "int8"):
            raise _refused("quantize", self.quantize, "only int8 is supported: choose that, or leave it out")
        if self.quantize and "onnx" not in self.formats:
            raise _refused("quantize", self.quantize, "it is only for ONNX: add onnx to the formats, or leave it out")
        if not 0 < self.tolerance < 1:
            raise _refused("tolerance", self.tolerance, "set it between 0 and 1")
        for name in ("samples", "batch_size", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise _refused(name, getattr(self, name), "set it to at least 1")

    @property
    def files(self) -> list[str]:
        """The files of graphs to write."""
        names = {"onnx": ONNX, "pt2": PROGRAM}
        return [names[name] for name in FORMATS if name in self.formats] + ([INT8] if self.quantize else [])

    @property
    def sampled(self) -> int | None:
        """The number of samples to compare on; None for all."""
        return self.samples if self.samples or self.quantize else CHECKED


def check_target(folder: Path, settings: Settings) -> None:
    """Refuse early what would otherwise be refused after minutes.

    Raises:
        OptionError: if the folder is a file, or a file in it would be replaced.
        ImportError: if the packages for ONNX are missing.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is a file: name a folder.")
    there = [name for name in (*settings.files, RECORD) if (folder / name).exists()]
    if there and not settings.overwrite:
        raise OptionError(
            f"{folder / there[0]} exists: name another folder, or set overwrite=True.", arguments=("overwrite",)
        )
    if "onnx" in settings.formats:
        check_installed()


def _refused(name: str, value: Any, fix: str) -> OptionError:
    return OptionError(f"{name}={value!r}: {fix}.", arguments=(name,))
