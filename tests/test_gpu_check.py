from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu_check import LIMITS, Steps


def test_without_a_gpu_nothing_is_claimed():
    script = Path(__file__).parent / "gpu_check.py"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, str(script)], env=hidden, capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout == "no GPU here: nothing was built, tested or measured\n"


def test_it_fits_into_the_time_of_one_loan():
    assert sum(LIMITS.values()) <= 8.5 * 60
    steps = list(LIMITS)
    assert steps.index("benchmarks") < steps.index("memcheck")


def test_the_table_says_how_each_step_ended():
    steps = Steps()
    python = [sys.executable, "-c"]
    assert steps.run("good", [*python, "pass"], 60)
    assert not steps.failed()
    assert not steps.run("bad", [*python, "raise SystemExit(3)"], 60)
    assert not steps.run("slow", [*python, "import time; time.sleep(60)"], 0.5)
    lines = steps.table().splitlines()
    assert lines[0].endswith("passed") and lines[1].endswith("FAILED (exit code 3)") and "not done after" in lines[2]
    assert steps.failed()
