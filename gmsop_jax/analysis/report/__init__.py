"""One self-contained HTML page about what networks learnt."""

from gmsop_jax.analysis.report.page import build_report
from gmsop_jax.analysis.report.runs import Run, read_run
from gmsop_jax.analysis.report.study import Study

__all__ = ["Run", "Study", "build_report", "read_run"]
