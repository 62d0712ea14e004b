"""`ffr-verl report`: predictions as a page to look at. docs/evaluation.md says how to read it."""

from __future__ import annotations

from ffr_verl.evaluation.report.build import ReportSettings, ReportSummary, write_report

__all__ = ["ReportSettings", "ReportSummary", "write_report"]
