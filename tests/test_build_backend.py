"""What an isolated build fetches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("hook", ["wheel", "editable", "sdist"])
@pytest.mark.parametrize(("mode", "fetched"), [("none", False), ("auto", True), ("cpu", True)])
def test_torch_is_fetched_for_kernels_only(hook: str, mode: str, fetched: bool) -> None:
    code = f"import build_backend; print(build_backend.get_requires_for_build_{hook}())"
    environment = {"ENSEMW2S_BUILD": mode, "PATH": ""}
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert ("torch" in told.stdout.decode()) == fetched
