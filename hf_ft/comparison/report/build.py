"""Builds the report from its sections, for HTML and Markdown."""

from __future__ import annotations

from hf_ft.comparison.report.sections.appendix import record_sections
from hf_ft.comparison.report.sections.calibration import calibration
from hf_ft.comparison.report.sections.distortions import distortion
from hf_ft.comparison.report.sections.findings import findings
from hf_ft.comparison.report.sections.learning import process_sections
from hf_ft.comparison.report.sections.ranking import outcome_sections
from hf_ft.comparison.report.sections.soup import soup
from hf_ft.comparison.results import Results
from hf_ft.comparison.statistics import standings
from hf_ft.documents.document import Document, Section
from hf_ft.documents.text import duration, metric_name


def present(*sections: Section | None) -> list[Section]:
    """Those that are not empty."""
    return [section for section in sections if section is not None]


def document(results: Results) -> Document:
    """The whole report; empty sections are omitted."""
    entries = standings(results)
    optional = (findings(entries), distortion(entries))
    sections: list[Section] = [
        *outcome_sections(results, entries),
        *present(calibration(results, entries), soup(results)),
        *process_sections(results, entries),
        *present(*optional),
        *record_sections(results, entries),
    ]
    ranked = sum(standing.rank is not None for standing in entries)
    metric, took = metric_name(results.metric), duration(results.seconds)
    subtitle = f"{ranked} of {len(entries)} strategies finished; {metric}; {took} in total"
    return Document(results.title, subtitle, tuple(sections))
