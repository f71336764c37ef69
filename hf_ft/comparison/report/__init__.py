"""The report of a comparison as HTML and Markdown."""

from hf_ft.comparison.report.write import write_report

__all__ = ["write_report"]
