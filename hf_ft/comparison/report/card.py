"""The comparison as a section of the winner's model card."""

from __future__ import annotations

from hf_ft.comparison.report.sections.calibration import card_calibration
from hf_ft.comparison.report.sections.learning import options
from hf_ft.comparison.report.sections.ranking import main_split
from hf_ft.comparison.report.sections.soup import sentence
from hf_ft.comparison.report.sections.verdict import main_caution, verdict
from hf_ft.comparison.report.text import interval, spread
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import Standing, standings, winner
from hf_ft.core.config import BASELINE
from hf_ft.documents.document import Listing, Table
from hf_ft.documents.markdown import blocks, escaped, inline, listing, pipe_table
from hf_ft.documents.text import NONE, metric_name, seconds, signed


def card_section(results: Results) -> str:
    """The ``## Comparison`` section of the winner's model card: results and procedure."""
    entries = standings(results)
    ranked = [standing for standing in entries if standing.rank is not None]
    best, split, metric = winner(results, entries), main_split(entries), metric_name(results.metric)
    parts = ["## Comparison", inline(" ".join(verdict(results, entries)))]
    if ranked:
        headers = ("strategy", "validation", *(("test",) if split == "test" else ()))
        headers += (f"difference on {split}", "95 % interval", "seconds")
        rows = tuple(_card_row(standing, split) for standing in ranked)
        about = (
            f"Mean {metric} ± standard deviation over seeds; differences are relative to `{BASELINE}`; seconds are for "
            "one training run."
        )
        parts += [pipe_table(Table(about, headers, rows)), about]
    calibrated = card_calibration(results, best) if best is not None else []
    parts += [blocks(calibrated)] if calibrated else []
    if results.soup is not None:
        parts.append(inline(sentence(results)))
    others = [standing.name for standing in entries if standing.rank is None]
    if others:
        parts.append(inline(f"Unranked: {', '.join(f'`{name}`' for name in others)}."))
    if best is not None and best.contender.chosen is not None:
        contender = best.contender
        tuned = "; ".join(f"{name} in {text}" for name, text in contender.space.items()) or "nothing"
        chosen = options(contender.trials[best.contender.chosen].params)
        parts.append(escaped(f"Tuned for the winner in {len(contender.trials)} trials: {tuned}. Chosen: {chosen}."))
    parts += [inline(main_caution(results, entries))] if ranked else []
    return "\n\n".join([*parts, listing(Listing(results.command, "bash"))]) + "\n"


def _card_row(standing: Standing, split: str) -> tuple[str, ...]:
    difference = standing.differences.get(split)
    compared = (signed(difference.mean), interval(difference)) if difference else (NONE, NONE)
    scores = [spread(standing.spreads.get(name)) for name in dict.fromkeys(("validation", split))]
    return standing.name, *scores, *compared, seconds(standing.seconds)
