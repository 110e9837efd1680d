"""Every kernel compiles for real GPUs, and none keeps registers in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
OF_SHAPE = ("rows", "tiles", "first_row", "inner", "capacity", "segments", "top_k", "top_count", "k")
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


# As a call compiles them, which tells Triton what is divisible by 16. With the slow tests also for odd sizes, and A100.
@pytest.mark.parametrize("hinted", ["hinted", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("capability", ["90", pytest.param("80", marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_without_spills(module, capability, hinted):
    triton = pytest.importorskip("triton")
    # The assembler gives up two registers of two kernels for one more block on a multiprocessor; that of older releases
    # six of a few kernels.
    most = 8 if Version(triton.__version__) >= Version("3.8") else 24
    spilling = [line for line in compiled(module, capability, hinted) if line["STACK"] > most or line["LOCAL"]]
    assert not spilling, spilling


@cache
def compiled(module: str, capability: str, hinted: str) -> list[dict]:
    """What ``compile_ahead`` says of the kernels of a module."""
    program = ["-W", "ignore", "-m", "tests.kernels.compile_ahead", f"ensemw2s.kernels.{module}", capability, hinted]
    run = subprocess.run(
        [sys.executable, *program],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-5_000:]
    print(run.stdout)
    return [json.loads(line) for line in run.stdout.splitlines()]


# An H100 has time for 20 instructions while it reads a logit of 16 bits. token_scores needs more, for the entropy.
@pytest.mark.parametrize(
    ("module", "shape", "most"),
    [("mixture", "T=5 COMBINE=0 HAS_LABELS=True OFFER=0", 20), ("token_scores", "TILE", 24)],
)
def test_scans_keep_up_with_memory(module, shape, most):
    pytest.importorskip("triton")
    scans = [x for x in compiled(module, "90", "hinted") if x["kernel"] == "scan_kernel" and shape in x["shape"]]
    assert len(scans) == 1
    assert scans[0]["instructions"] <= most * scans[0]["logits_per_thread"], scans


def test_another_number_of_rows_compiles_nothing_anew():
    # Triton compiles once for 1, once for what is divisible by 16 and once for the rest, unless it is told not to; that
    # takes seconds in the middle of serving, and fails while a CUDA graph is captured.
    for module in MODULES:
        for kernel, *_ in getattr(import_module(f"ensemw2s.kernels.{module}"), "AHEAD_OF_TIME", []):
            for parameter in kernel.params:
                of_shape = parameter.name in OF_SHAPE
                assert not of_shape or parameter.do_not_specialize, f"{module}.{kernel.__name__}: {parameter.name}"


def test_every_kernel_is_compiled():
    """A kernel that asks for its place in the grid is launched, and stands in its file's registry."""
    triton = pytest.importorskip("triton")
    for module in MODULES:
        contents = import_module(f"ensemw2s.kernels.{module}")
        registered = {entry[0].__name__ for entry in getattr(contents, "AHEAD_OF_TIME", [])}
        for name, kernel in vars(contents).items():
            own = isinstance(kernel, triton.runtime.jit.JITCallable) and kernel.__module__ == contents.__name__
            assert not own or "program_id" not in kernel.src or name in registered, f"{module}.{name}"
