"""Everything in examples/ runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ensemw2s.cli import main
from ensemw2s.config import load_config

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_valid(path: Path) -> None:
    assert load_config(path).name.startswith("reverse_words")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_script_runs(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "student: " in done.stdout


def test_the_quick_demo_runs_from_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(EXAMPLES / "reverse_words.yaml")
    assert main(["run", config, "--quick", f"output_dir={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "round 3/3" in shown
    assert "ceiling" in shown
    (run,) = tmp_path.iterdir()
    assert (run / "report.html").stat().st_size > 10_000
