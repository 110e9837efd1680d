"""The CUDA kernels under nvcc: they compile for every architecture and spill no register. No GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.cuda.emulated import KERNELS, ROOT

# Sampling alone takes as long as all others together. What it says in C++ is compiled, and run, by the emulation.
SOURCES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == "mixture_sample" else ())
    for path in sorted(KERNELS.glob("*.cu"))
]
# H100, and with the slow tests A100.
ARCHITECTURES = (90, pytest.param(80, marks=pytest.mark.slow))
SETUP = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.find_cuda_toolkit() or '')"


def toolkit() -> str:
    """What setup.py finds; the empty string if there is none."""
    environment = os.environ | {"ENSEMW2S_BUILD": "none"}
    run = subprocess.run(
        [sys.executable, "-c", SETUP], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = toolkit()
    if not found:
        pytest.skip("no CUDA toolkit is installed")
    return f"{found}/bin/nvcc"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(nvcc, source, architecture, tmp_path):
    flags = ["-std=c++17", "-O3", "-Xptxas=-v", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    flags += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc' / 'include'}", f"-I{KERNELS}"]
    flags += [f"-isystem={path}" for path in include_paths()]
    command = [nvcc, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    reports = run.stderr.split("Compiling entry function ")[1:]
    assert bool(reports) == ("ENSEMW2S_KERNEL" in source.read_text())
    for report in reports:
        name = re.match(r"'(\w+)' for ", report)[1]
        print(f"sm_{architecture} {name}: {re.search(r'Used [0-9]+ registers', report)[0]}")
        assert "0 bytes spill stores, 0 bytes spill loads" in report, report


def test_a_wrapper_script_is_seen_through(nvcc, tmp_path, monkeypatch):
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert toolkit() == str(Path(nvcc).parents[1])
