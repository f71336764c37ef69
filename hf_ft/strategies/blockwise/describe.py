"""Text overview of a scheme's candidates, without a search."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from hf_ft.core.findings import Table
from hf_ft.models.anatomy import anatomy
from hf_ft.models.weight_layers import weight_layers
from hf_ft.strategies.blockwise.candidates import candidates, last_quarter
from hf_ft.strategies.blockwise.scores import layers_shown

HEADERS = ("candidate", "quarter", "layers", "parameters", "share", "modules")


def describe_candidates(
    model: nn.Module, scheme: str, *, length: int = 3, head: str | None = None, blocks: str | None = None
) -> tuple[Table, Table]:
    """List the candidates from the output to the input, what trains with them, and the choice without a search.

    Raises:
        OptionError: as for :func:`~hf_ft.strategies.blockwise.candidates.candidates`.
    """
    where = {"head": head, "blocks": blocks}
    choices = candidates(model, scheme, length=length, **where)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = tuple(
        (
            candidate.name,
            f"Q{candidate.quarter}",
            layers_shown(candidate.layers),
            f"{candidate.parameters:,}",
            f"{candidate.parameters / max(1, total):.1%}",
            _shortened(candidate.modules),
        )
        for candidate in choices
    )
    layers, chosen = weight_layers(model, **where), last_quarter(choices)
    remark = (
        "the last of the fourth quarter" if chosen.quarter == 4 else "the last; none is centred in the fourth quarter"
    )
    title = (
        f"{type(model).__name__}: {total:,} parameters, {len(layers)} layers outside the head; {len(choices)} "
        f"{'candidate' if len(choices) == 1 else 'candidates'} by {scheme}, from output to input"
    )
    facts = (
        ("head", "trains with every candidate: " + ", ".join(anatomy(model, **where).head.modules)),
        ("without search", f"{chosen.name}, {remark}"),
    )
    return Table(title, HEADERS, rows), Table("", (), facts)


def _shortened(modules: Sequence[str]) -> str:
    """Module names with their common prefix factored out: ``encoder.layers.{0, 1}``; long lists show first and last."""
    if len(modules) == 1:
        return modules[0]
    common = os.path.commonprefix([name.rpartition(".")[0] + "." for name in modules]).rpartition(".")[0]
    tails = [name[len(common) + 1 :] if common else name for name in modules]
    if len(tails) > 3:
        tails = [tails[0], "...", tails[-1]]
    return f"{common}.{{{', '.join(tails)}}}" if common else ", ".join(tails)
