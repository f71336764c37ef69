"""The findings of the strategies' measurements."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.utils import logging

from hf_ft.comparison.results import Contender
from hf_ft.comparison.statistics import Standing
from hf_ft.core.config import FTConfig, strategies
from hf_ft.core.context import State
from hf_ft.documents.document import Block, Heading, Section, Text
from hf_ft.documents.text import plain

logger = logging.get_logger(__name__)


def findings(standings: Sequence[Standing]) -> Section | None:
    """A part for each contender with a measurement, based on the ``info`` of its states; None if there are none."""
    blocks: list[Block] = []
    for standing in standings:
        own = _blocks(standing.contender)
        texts = [Text(text) for text in (standing.contender.learned, _chosen(standing.contender)) if text]
        if own or texts:
            blocks += [Heading(standing.name), *texts, *own]
    return Section("findings", "Findings of the strategies", tuple(blocks)) if blocks else None


def _chosen(contender: Contender) -> str:
    """The choices of the final runs after training."""
    runs = contender.finished_runs
    parts = [
        f"{name} {', '.join(plain(run.chosen[name]) for run in runs if name in run.chosen)}"
        for name in dict.fromkeys(name for run in runs for name in run.chosen)
    ]
    return f"Chosen on validation data after training, by seed: {'; '.join(parts)}." if parts else ""


def _blocks(contender: Contender) -> list[Block]:
    """The findings of a contender's strategies; strategies not registered here contribute only their text."""
    if not contender.found:
        return []
    known, state = strategies(), State(info=contender.found)
    blocks: list[Block] = []
    for content in contender.configs:
        if content.get("ft_type") not in known:
            continue
        try:
            blocks += FTConfig.from_dict(content).findings(state).blocks
        except Exception as error:  # an error in a strategy's own code must not prevent the report
            logger.warning(f"{contender.name}: its findings cannot be shown ({type(error).__name__}: {error}).")
    return blocks
