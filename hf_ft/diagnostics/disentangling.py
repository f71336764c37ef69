"""A plot of how TRED's disentangler was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_ft.documents.figure import new_figure
from hf_ft.errors import OptionError


def plot_disentangling(info: Mapping[str, Any], file: str | Path) -> None:
    """Plot the terms of TRED's first stage over its epochs, and how much of F the components P and N retain.

    Args:
        info: info of the measured state, ``trainer.states["tred"].info``.
        file: output file; its suffix determines the format.

    Raises:
        OptionError: if nothing was disentangled.
        ImportError: if matplotlib is not installed.
    """
    if "history" not in info:
        raise OptionError("plot_disentangling: the state has no disentangling (criterion='none').")
    figure, history, figures = new_figure("plot_disentangling"), info["history"], info["figures"]
    terms, shares = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for name in history[0]:
        terms.plot(epochs, [epoch[name] for epoch in history], label=name, marker="." if len(history) < 3 else None)
    terms.set_title("unweighted terms of the first stage")
    terms.set_xlabel("epoch")
    terms.grid(alpha=0.3)
    terms.legend(fontsize="small")
    rows = {
        "norm of P / norm of F": figures["p_share"],
        "norm of N / norm of F": figures["n_share"],
        "label's share of the variance of F": figures["f_label"],
        "of P": figures["p_label"],
        "of N": figures["n_label"],
        "error of P + N": figures["reconstruction"],
    }
    bars = shares.barh(list(rows), list(rows.values()), color=["C0", "C1", "C7", "C0", "C1", "C3"])
    shares.bar_label(bars, fmt="%.2f", padding=2)
    shares.set_xlim(0, 1.15 * max(1.0, *rows.values()))
    shares.invert_yaxis()
    shares.set_title(info["verdict"].partition(":")[0] or "sound", color="C3" if info["verdict"] else "C2")
    figure.savefig(file)
