"""Every kernel compiles for real GPUs, and none keeps registers in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


# H100, and with the slow tests A100.
@pytest.mark.parametrize("capability", ["90", pytest.param("80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_without_spills(module, capability):
    triton = pytest.importorskip("triton")
    program = ["-W", "ignore", "-m", "tests.kernels.compile_ahead", f"ensemw2s.kernels.{module}", capability]
    run = subprocess.run(
        [sys.executable, *program],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5_000:]
    print(run.stdout)
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    # The assembler of older releases keeps up to six registers of a few kernels on the stack.
    most = 0 if Version(triton.__version__) >= Version("3.8") else 24
    spilling = [line for line in compiled if line["STACK"] > most or line["LOCAL"]]
    assert not spilling, spilling


def test_every_kernel_is_compiled():
    """A kernel that asks for its place in the grid is launched, and stands in its file's registry."""
    triton = pytest.importorskip("triton")
    for module in MODULES:
        contents = import_module(f"ensemw2s.kernels.{module}")
        registered = {entry[0].__name__ for entry in getattr(contents, "AHEAD_OF_TIME", [])}
        for name, kernel in vars(contents).items():
            own = isinstance(kernel, triton.runtime.jit.JITCallable) and kernel.__module__ == contents.__name__
            assert not own or "program_id" not in kernel.src or name in registered, f"{module}.{name}"
