"""How good predictions are: reading them, the published metrics, intervals and break-downs. Imports no torch."""

from __future__ import annotations

from ffr_verl.evaluation.predictions import Prediction, read_predictions

__all__ = ["Prediction", "read_predictions"]
