"""Processes of our own that tests start, and stop in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ensemw2s.runtime.console import quiet_libraries


def wait_for_files(process: subprocess.Popen[Any], *files: Path, seconds: float = 240) -> None:
    """Return once the process has written all files; fail if it ends, or the time is over, without."""
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert process.poll() is None, f"ended with {process.returncode} before all of {files} were there"
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"not all of {files} are there after {seconds:.0f} s")
        time.sleep(0.05)


def fork(work: Callable[[], int | None], said: Path) -> int:
    """Begin `work` in a process of its own, which says everything to a file, and return its number.

    It has all that is imported here already, which takes a new interpreter seconds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        with said.open("w", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            quiet_libraries()
            try:
                status = work() or 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """Wait for a process to end and return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before(number: int) -> Callable[[], int]:
    """Kill this process right before a path takes another's place for the time with this number.

    Returns how to ask for the number of times until then, which number 0 lets one count.
    """
    replace, done = Path.replace, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = counted  # type: ignore[method-assign,assignment]
    return lambda: done
