"""Build, test and measure on the GPU of this machine: `make gpu-check`, at most nine minutes.

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
SECONDS = 540


class Steps:
    """Commands one after the other within the time that is left, with how each ended."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.lines: list[tuple[str, str, float]] = []

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> bool:
        """Run a command; whether it ended with 0."""
        left = min(limit, SECONDS - (time.monotonic() - self.start))
        began = time.monotonic()
        print(f"== {name}", flush=True)
        if left <= 0:
            outcome = "not run: no time left"
        else:
            try:
                code = subprocess.run(command, cwd=ROOT, env=os.environ | environment, timeout=left).returncode
                outcome = "passed" if code == 0 else f"FAILED (exit code {code})"
            except subprocess.TimeoutExpired:
                outcome = f"FAILED: not done after {left:.0f} s"
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
    built = steps.run("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 200, ENSEMW2S_BUILD="cuda")
    if built:
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        steps.run("tests of the CPU kernels", [*pytest, "tests/ops", "-x", "-m", "not slow"], 120)
        steps.run("tests on the GPU", [*pytest, "tests/gpu", "-m", "gpu"], 240)
        for tool in ("memcheck", "racecheck") if sanitizer() else ():
            command = [sanitizer(), "--tool", tool, "--error-exitcode", "1", python, "-m", "tests.gpu.under_sanitizer"]
            # A caching allocator would hide what is read past the end of a tensor.
            steps.run(tool, command, 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        files = [f"--{kind}={RESULTS / f'gpu-{card_name()}.{end}'}" for kind, end in (("csv", "csv"), ("plot", "png"))]
        steps.run("benchmarks", [python, "-m", "benchmarks.ops.gpu", *files], 240)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n{steps.table()}")
    return int(steps.failed())


if __name__ == "__main__":
    sys.exit(main())
