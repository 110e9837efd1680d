"""Build, test and measure on the GPU of this machine: `make gpu-check`, at most eight and a half minutes.

Uses the Python that runs it and the packages that it has; nothing is installed. Without a GPU it says so and ends with
exit code 0, claiming nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Seconds that a step may take; in this order, so that what is cut off, if anything, is what says least about speed.
LIMITS = {
    "build": 150,
    "tests on the GPU": 110,
    "benchmarks": 150,
    "tests of the CPU kernels": 50,
    "memcheck": 25,
    "racecheck": 25,
}


class Steps:
    """Commands one after the other within the time that is left, with how each ended."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, float]] = []

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> bool:
        """Run a command; whether it ended with 0 in time."""
        began = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            code = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=limit).returncode
            outcome = "passed" if code == 0 else f"FAILED (exit code {code})"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: not done after {limit:.0f} s"
        self.lines.append((name, outcome, time.monotonic() - began))
        return outcome == "passed"

    def table(self) -> str:
        """One line per step."""
        width = max(len(name) for name, _, _ in self.lines)
        return "\n".join(f"{name.ljust(width)}  {seconds:6.1f} s  {outcome}" for name, outcome, seconds in self.lines)

    def failed(self) -> bool:
        """Whether any step did not pass."""
        return any(outcome != "passed" for _, outcome, _ in self.lines)


def card_name() -> str:
    """The card's name as part of a file's name, such as ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    beside_nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside_nvcc) if beside_nvcc.exists() else None)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing was built, tested or measured")
        return 0
    steps, python = Steps(), sys.executable

    def run(name: str, command: list[str], **environment: str) -> bool:
        return steps.run(name, command, LIMITS[name], **environment)

    if run("build", [python, "setup.py", "-q", "build_ext", "--inplace"], ENSEMW2S_BUILD="cuda"):
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "8"]
        run("tests on the GPU", [*pytest, "tests/gpu", "-m", "gpu"])
        files = [f"--{kind}={RESULTS / f'gpu-{card_name()}.{end}'}" for kind, end in (("csv", "csv"), ("plot", "png"))]
        run("benchmarks", [python, "-m", "benchmarks.ops.gpu", *files])
        run("tests of the CPU kernels", [*pytest, "tests/ops", "-x", "-m", "not slow"])
        for tool in ("memcheck", "racecheck") if sanitizer() else ():
            command = [sanitizer(), "--tool", tool, "--error-exitcode", "1", python, "-m", "tests.gpu.under_sanitizer"]
            # A caching allocator would hide what is read past the end of a tensor.
            run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n{steps.table()}")
    return int(steps.failed())


if __name__ == "__main__":
    sys.exit(main())
