"""The commands about studies where the packages that only the report needs are not installed."""

import subprocess
import sys

CODE = """
import sys
sys.modules |= {"jinja2": None, "vl_convert": None}
from gmsop_jax.main import main
print(*[main(arguments) for arguments in (["report", "runs"], ["summary"], ["sweep", "no_such_configuration"])])
"""


def test_only_the_report_needs_them():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == "2 2 2\n"
    report, summary, sweep = done.stderr.splitlines()
    assert report == "error: the report needs jinja2: pip install 'gmsop-jax[report]'"
    assert "give one or more configurations" in summary
    assert "configuration file no_such_configuration does not exist" in sweep
