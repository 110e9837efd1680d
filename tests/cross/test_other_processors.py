"""The CPU kernels as programs without torch: on this processor, and on ARM where its tools are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.cases import run_cases
from tests.cuda.emulated import EMULATION, ROOT, find_compiler

KERNELS = ("mixture_log_probs.cpp", "mixture_sample.cpp")
# As setup.py compiles them; warnings of GCC about vectors that this processor has no registers for are none of ours.
FLAGS = ("-std=c++17", "-O3", "-fno-trapping-math", "-Wno-psabi", "-static")


def compile_program(compiler: str, folder: Path) -> Path:
    """A program that runs the cases of a file through the CPU kernels."""
    files = [*(ROOT / "csrc" / "cpu" / name for name in KERNELS), EMULATION / "run_cases.cpp"]
    files.append(Path(__file__).with_name("cpu_library.cpp"))
    includes = [f"-I{path}" for path in (ROOT / "csrc" / "include", ROOT / "csrc" / "cpu", EMULATION)]
    program = folder / "cases"
    command = [compiler, *FLAGS, *includes, "-o", str(program), *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return program


def test_this_processor(tmp_path):
    assert run_cases(compile_program(find_compiler(), tmp_path)) == ""


@pytest.mark.slow
def test_arm(tmp_path):
    tools = [shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64-static")]
    if None in tools:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user-static")
    program = compile_program(tools[0], tmp_path)
    assert program.read_bytes()[18] == 0xB7, "no program for ARM"  # the machine in its ELF header
    assert run_cases(program, tools[1]) == ""
