"""Processes of our own that tests start, and stop in the middle."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any


def wait_for_files(process: subprocess.Popen[Any], *files: Path, seconds: float = 240) -> None:
    """Return once the process has written all files; fail if it ends, or the time is over, without."""
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert process.poll() is None, f"ended with {process.returncode} before all of {files} were there"
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"not all of {files} are there after {seconds:.0f} s")
        time.sleep(0.05)
