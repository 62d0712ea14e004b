"""How good predictions are: reading them, the published metrics, intervals and break-downs. Imports no torch."""

from __future__ import annotations

from ffr_verl.evaluation.bootstrap import BootstrapSettings
from ffr_verl.evaluation.comparison import Comparison, compare
from ffr_verl.evaluation.result import EvaluationResult, Part, count_file, count_records, evaluate, evaluate_file
from ffr_verl.metrics import Confusion, Scores, confusion, f1, mcc, precision, recall
from ffr_verl.predictions import Prediction, read_predictions, read_verl_dump

__all__ = [
    "BootstrapSettings",
    "Comparison",
    "Confusion",
    "EvaluationResult",
    "Part",
    "Prediction",
    "Scores",
    "compare",
    "confusion",
    "count_file",
    "count_records",
    "evaluate",
    "evaluate_file",
    "f1",
    "mcc",
    "precision",
    "read_predictions",
    "read_verl_dump",
    "recall",
]
