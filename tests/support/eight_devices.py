"""Runs test cases in a process that has eight CPU devices, because their number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path


def run_cases(cases: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on the file, without the options of this session."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # tiny networks take longer to compile than to run
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib", *options, str(cases)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
