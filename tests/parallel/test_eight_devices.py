from pathlib import Path

import pytest
from eight_devices import run_cases


@pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cases_with_eight_devices(cases):
    result = run_cases(Path(__file__).parent / "eight_devices" / "cases.py", "-m", cases)
    assert result.returncode == 0, result.stdout + result.stderr
