"""The report of a comparison: one document, as an HTML page and as Markdown."""

from hf_ft.comparison.report.write import write_report

__all__ = ["write_report"]
