from pathlib import Path

from eight_devices import run_cases


def test_cases_with_eight_devices():
    result = run_cases(Path(__file__).parent / "eight_devices" / "cases.py")
    assert result.returncode == 0, result.stdout + result.stderr
