"""`ffr-verl report`: predictions, or a run, as a page to look at. docs/report.md says how to read it."""

from __future__ import annotations

from ffr_verl.evaluation.report.build import ReportSettings, ReportSummary, write_report
from ffr_verl.evaluation.report.run import RunPageSettings, RunPageSummary, write_run_page

__all__ = [
    "ReportSettings",
    "ReportSummary",
    "RunPageSettings",
    "RunPageSummary",
    "write_report",
    "write_run_page",
]
