"""The Triton kernels on the CPU: Triton interprets only where the variable is set before its import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_kernels_under_the_interpreter(file):
    run_interpreted(FOLDER / file, "not slow")


@pytest.mark.slow
def test_slow_ones_under_the_interpreter():
    run_interpreted(FOLDER, "slow")


def run_interpreted(tests, marked):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(tests), "-m", marked, "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
