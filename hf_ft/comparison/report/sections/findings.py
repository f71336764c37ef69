"""What strategies measured before they trained: scores of blocks, of frozen layers, and of a disentangling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_ft.comparison.statistics import Standing
from hf_ft.documents.document import Block, Heading, Section, Text
from hf_ft.strategies.amcf.findings import _swarm
from hf_ft.strategies.blockwise.findings import _block_scores
from hf_ft.strategies.tred.findings import _disentangling


def findings(found: Sequence[Standing]) -> Section | None:
    """A part for each contender that measured something, from its states' ``info``; None where none did."""
    blocks: list[Block] = []
    for standing in found:
        own = _of_one(standing.contender.found)
        learned = standing.contender.learned
        if own or learned:
            blocks += [Heading(standing.name), *([Text(learned)] if learned else []), *own]
    return Section("findings", "What strategies found in the data", tuple(blocks)) if blocks else None


def _of_one(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for key, show in (("scores", _block_scores), ("swarm", _swarm), ("history", _disentangling)):
        if key in found:
            try:
                blocks += show(found)
            except (ValueError, KeyError, TypeError, AttributeError):  # a strategy from elsewhere means another thing
                continue
    return blocks
