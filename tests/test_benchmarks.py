"""Benchmarks, which nothing else runs, on tiny models: they end, and write the rows that they promise."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--model", "scratch:char-weak"]


@pytest.mark.parametrize(
    ("module", "arguments", "rows"),
    [
        ("ensemble.decode", "--experts 2 --models 2 --batches 1 2 --steps 1 --rounds 1 --threads 1", 14),
        ("ensemble.generate", "--experts 2 --batch 3 --tokens 2 --rounds 1", 4),
        ("ensemble.threads", "--batches 1 --compute-threads 1 --requests 1 --tokens 2 --rounds 1", 2),
        ("student.distill", "--experts 2 --batch 2 --top 4 --rounds 1 --threads 1", 5),
        ("training.train", "--parts steps memory --rounds 1 --batch 2 --threads 1", 12),
    ],
)
def test_a_benchmark_runs(module: str, arguments: str, rows: int, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    command = [sys.executable, "-m", f"benchmarks.{module}", *TINY, *arguments.split(), "--csv", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with file.open(newline="") as written:
        assert len(list(csv.DictReader(written))) == rows
