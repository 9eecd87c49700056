"""A self-contained HTML report about trained networks."""

from gmsop_jax.analysis.report.page import build_report
from gmsop_jax.analysis.report.runs import Run, read_run
from gmsop_jax.analysis.report.study import Study

__all__ = ["Run", "Study", "build_report", "read_run"]
