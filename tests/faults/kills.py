"""Processes that are killed: at every change of the disk, and at random moments; the same command ends as if never.

A process that is killed leaves the disk as it is at that moment, so the first kind needs no kill: a run stops before
each of its operations on files and in the middle of each append, and what lies on the disk is copied and gone on with.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.folder import PHASES
from ensemw2s.runtime.accounts import is_partial
from tests.faults import runs
from tests.faults.battery import Case
from tests.running import fork, wait

# What changes a disk, by the names of Python's audit events; a file is opened for writing, too.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
# A report is made anew by each command, from what the phases before it left.
_MEASURED = PHASES[:-1]
_LONG_MOMENTS, _SHORT_MOMENTS = 12, 1
# A run's disk has some 900 states. The short pass goes on from every 400th; the long one from all of adapters, and from
# every 25th of the others.
_SHORT_STEP, _OTHER_STEP = 400, 25


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Kills of whole runs, in the long pass of all kinds of them and at all their writes."""
    for variant in runs.VARIANTS if long else ("adapters",):
        yield Case(f"{variant}, seed {seed}", _killing(variant, long, seed))


def _killing(variant: str, long: bool, seed: int) -> Callable[[Path], int]:
    def kill(folder: Path) -> int:
        generator = random.Random(f"{variant} {seed}")
        models = runs.sources(folder)
        reference = _uninterrupted(models, folder / "reference", variant)
        step = _SHORT_STEP if not long else 1 if variant == "adapters" else _OTHER_STEP
        tried = _at_writes(folder, variant, reference, range(generator.randrange(step), 1_000_000, step))
        for number in range(_LONG_MOMENTS if long else _SHORT_MOMENTS):
            _at_moments(folder / f"moment-{number}", models, variant, reference, generator)
            tried += 1
        return tried

    return kill


def _uninterrupted(models: Path, folder: Path, variant: str) -> dict[str, Any]:
    """Run in this process, which warms up all that the others inherit."""
    _run(models, folder, variant)
    return runs.results(folder / "small")


def _run(models: Path, folder: Path, variant: str) -> None:
    Experiment(build_config(runs.settings(models, folder, variant))).run(_MEASURED)


def _go_on(models: Path, folder: Path, variant: str, reference: dict[str, Any], what: str) -> None:
    said = folder.with_name(f"{folder.name}.txt")
    status = wait(fork(lambda: _run(models, folder, variant), said))
    if status:
        raise AssertionError(f"{what}: it does not go on ({status})\n{said.read_text()[-3000:]}")
    runs.require_same(folder / "small", reference, what)
    shutil.rmtree(folder)


# At every write


def _at_writes(folder: Path, variant: str, reference: dict[str, Any], kept: range) -> int:
    """Go on from the states of the disk whose numbers are in `kept`; return from how many."""
    for name in ("watched", "states"):
        shutil.rmtree(folder / name, ignore_errors=True)
    states = _states(folder, variant, kept)
    for state in states:
        _go_on(folder, state, variant, reference, f"killed before {(state / 'event').read_text()}")
    return len(states)


def _states(folder: Path, variant: str, kept: range) -> list[Path]:
    """Run in a process of its own and return a copy of its folder for each kept state that was on the disk."""
    watched = folder / "watched"

    def work() -> None:
        watcher = _Watcher(watched, folder / "states", kept)
        sys.addaudithook(watcher.hear)
        write = os.write

        def torn(descriptor: int, data: bytes) -> int:
            file = Path(f"/proc/self/fd/{descriptor}").readlink()
            if len(data) > 1 and file.is_relative_to(watched):
                half = write(descriptor, data[: len(data) // 2])
                watcher.look("the second half of an append")
                return half
            return write(descriptor, data)

        os.write = torn
        _run(folder, watched, variant)

    said = folder / "watched.txt"
    status = wait(fork(work, said))
    assert status == 0, said.read_text()[-3000:]
    return sorted((folder / "states").iterdir())


class _Watcher:
    """Copies a folder when it differs from what it was at the last operation, where that state's number is kept."""

    def __init__(self, folder: Path, copies: Path, kept: range) -> None:
        self.folder, self.copies, self.kept = folder, copies, kept
        self.seen: Any = None
        self.count, self.busy = 0, False

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in _CHANGES or writes) and not self.busy:
            self.look(f"{event} {args[:2]}")

    def look(self, event: str) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            files = [path for path in self.folder.rglob("*") if self._counts(path)]
            state = sorted((str(path), 0 if path.is_dir() else path.stat().st_size) for path in files)
            if state and state != self.seen:
                if self.count in self.kept:
                    copy = self.copies / f"{self.count:05}"
                    shutil.copytree(self.folder, copy)
                    (copy / "event").write_text(event)
                self.seen, self.count = state, self.count + 1
        finally:
            self.busy = False

    def _counts(self, path: Path) -> bool:
        """Say whether a change of a file makes another state: what is in something unfinished is deleted with it."""
        parts = path.relative_to(self.folder).parts
        return not (any(map(is_partial, parts)) or path.name.endswith((".lock", "costs.jsonl")))


# At random moments


def _at_moments(folder: Path, models: Path, variant: str, reference: dict[str, Any], generator: random.Random) -> None:
    """Kill a run again and again, each time after it has lived for a while, until it ends."""
    folder.mkdir()
    run = folder / "run"
    for attempt in range(5):
        pid = fork(lambda: _run(models, run, variant), folder / f"{attempt}.txt")
        end = time.monotonic() + generator.expovariate(1 / 1.5)
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            time.sleep(0.005)
        else:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
    _go_on(models, run, variant, reference, f"killed at random moments in {folder}")
