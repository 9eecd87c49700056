"""A self-contained HTML report about trained networks."""

from gmsop_jax.analysis.report.page import build_report
from gmsop_jax.analysis.report.predictions import Predictions, predict_split
from gmsop_jax.analysis.report.runs import Run, read_run

__all__ = ["Predictions", "Run", "build_report", "predict_split", "read_run"]
