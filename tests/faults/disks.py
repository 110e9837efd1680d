"""Disks that are full, read-only or somebody else's: words, nothing lost, and with room again it goes on."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensemw2s.cli import main
from ensemw2s.experiments.config import build_config
from ensemw2s.experiments.experiment import Experiment
from ensemw2s.experiments.folder import PHASES
from tests.faults import runs
from tests.faults.battery import Case
from tests.running import fork, wait

# In KiB; a whole run takes about three thousand.
SIZES = (64, 160, 320, 640, 1000, 1500, 2000, 2600)
LIMITS = (1, 4, 16, 48)
_SHORT_PHASES = ("data", "boost")
# Nobody, who owns nothing.
_STRANGER = 65534


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Disks of several sizes and rights; without the right to mount or to become somebody else there are fewer."""
    generator = random.Random(f"disks {seed}")
    root = os.geteuid() == 0
    phases = PHASES if long else _SHORT_PHASES
    if root and can_mount():
        for size in SIZES if long else [generator.choice(SIZES[1:4])]:
            yield Case(f"a disk of {size} KiB", _small_disk(size, phases))
    for limit in LIMITS if long else [generator.choice(LIMITS[:2])]:
        yield Case(f"files of at most {limit} KiB", _limited(limit, phases))
    if root:
        for name in ("read-only", "foreign") if long else ("foreign",):
            yield Case(f"a folder that is {name}", _unwritable(name, phases))


def can_mount() -> bool:
    """Say whether this process may mount a disk of its own."""
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True
    )
    return probe.returncode == 0


def _run(models: Path, folder: Path, phases: tuple[str, ...]) -> None:
    Experiment(build_config(runs.settings(models, folder))).run(phases)


def _command(models: Path, folder: Path, phases: tuple[str, ...], work: Path, before: Callable[[], None]) -> int:
    """Run the command line in a process that does `before` first; return its exit status."""
    config = runs.write_config(work / "config.json", runs.settings(models, folder))
    words = ["run" if phases == PHASES else "boost", str(config)]

    def limited() -> int:
        before()
        return main(words)

    return wait(fork(limited, work / "said.txt"))


def _require_words(status: int, said: Path, *words: str) -> None:
    text = said.read_text()
    if status != 2 or "Traceback" in text or not any(word in text for word in words):
        raise AssertionError(f"ended with {status}, expected 2 and one of {words}\n{text[-3000:]}")


def _reference(models: Path, work: Path, phases: tuple[str, ...]) -> dict[str, Any]:
    _run(models, work / "reference", phases)
    return runs.results(work / "reference" / "small")


def _small_disk(size: int, phases: tuple[str, ...]) -> Callable[[Path], int]:
    def fill(work: Path) -> int:
        models = runs.sources(work)
        reference = _reference(models, work, phases)
        with disk(work / "disk", size) as folder:
            for _ in range(2):
                status = _command(models, folder, phases, work, lambda: None)
                if status == 0:
                    break
                _require_words(status, work / "said.txt", "no space left on the disk", "free some space")
            subprocess.run(["mount", "-o", "remount,size=64M", str(folder)], check=True)
            status = _command(models, folder, phases, work, lambda: None)
            assert status == 0, (work / "said.txt").read_text()[-3000:]
            runs.require_same(folder / "small", reference, f"{size} KiB")
        return 1

    return fill


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """Within the block, have a disk of so many KiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}K", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _limited(limit: int, phases: tuple[str, ...]) -> Callable[[Path], int]:
    def limit_files(work: Path) -> int:
        models = runs.sources(work)
        reference = _reference(models, work, phases)
        folder = work / "run"

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit * 1024, resource.RLIM_INFINITY))

        status = _command(models, folder, phases, work, limited)
        _require_words(status, work / "said.txt", "File too large", "no space left on the disk")
        _run(models, folder, phases)
        runs.require_same(folder / "small", reference, f"files of at most {limit} KiB")
        return 1

    return limit_files


def _unwritable(name: str, phases: tuple[str, ...]) -> Callable[[Path], int]:
    def refuse(work: Path) -> int:
        models = runs.sources(work)
        reference = _reference(models, work, phases)
        tried = 0
        for count in range(len(phases)):
            folder = work / f"run-{count}"
            folder.mkdir()
            if count:
                _run(models, folder, phases[:count])
            for path in (work, *work.parents[:1], *folder.rglob("*"), folder):
                path.chmod(0o755 if path.is_dir() else 0o644)

            def become_somebody_else() -> None:
                os.setgid(_STRANGER)
                os.setuid(_STRANGER)

            before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
            status = _command_of(name, models, folder, phases, work, become_somebody_else)
            _require_words(status, work / "said.txt", "Permission denied", "Read-only file system", "cannot write")
            assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
            _run(models, folder, phases)
            runs.require_same(folder / "small", reference, f"{name}, {count} phases before")
            shutil.rmtree(folder)
            tried += 1
        return tried

    return refuse


def _command_of(
    name: str, models: Path, folder: Path, phases: tuple[str, ...], work: Path, become: Callable[[], None]
) -> int:
    if name == "foreign":
        (work / "said.txt").touch()
        return _command(models, folder, phases, work, become)
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        return _command(models, folder, phases, work, lambda: None)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
