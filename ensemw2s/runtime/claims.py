"""Folders that are ours: claimed for one configuration, marked as such, and used by one run at a time.

A folder is ours by a marker whose content says that this package made it, and a file in it by the folder's account
(`accounts`). What is neither is never deleted and never built upon.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ensemw2s.runtime import accounts, processes
from ensemw2s.runtime.accounts import RESERVED
from ensemw2s.runtime.files import is_alive, make_folder, read_json, sweep, write_json
from ensemw2s.runtime.fingerprint import plain
from ensemw2s.runtime.values import shown_names

_MADE_BY = "ensemw2s"


class InUseError(RuntimeError):
    """Another process works in the folder, or on the file, that is asked for."""


@dataclass(frozen=True)
class Kind:
    """What a folder is claimed for: the name of the marker, and words for a reader, with the article."""

    name: str
    words: str
    # Patterns of all that such a claim writes into its folder, at the top. None of them may be there before, and with
    # `overwrite` they alone are deleted.
    files: tuple[str, ...]
    # What a reader changes to be given another folder.
    setting: str = "output_dir"
    # Whether the folder must hold nothing else when it is claimed first.
    alone: bool = False

    def marker(self, folder: Path) -> Path:
        """Return the file that says that a folder is claimed."""
        return folder / f"{RESERVED}{self.name}.json"

    def lock(self, folder: Path) -> Path:
        """Return the file that is locked while somebody works in a folder."""
        return folder / f"{RESERVED}{self.name}.lock"


@contextmanager
def claimed(
    folder: str | os.PathLike[str],
    kind: Kind,
    description: Mapping[str, Any],
    *,
    overwrite: bool = False,
    remedy: str = "delete that folder",
    on_overwrite: Callable[[Path, list[str]], None] = lambda folder, differing: None,
) -> Iterator[None]:
    """Within the block, work in a folder that is ours and nobody else's; every process must call this.

    Args:
        folder: made if it is not there.
        kind: what it is claimed for; several kinds may share a folder.
        description: what decides the results, in values that JSON or `fingerprint.plain` knows.
        overwrite: delete what a claim with another description left there, as far as it is ours.
        remedy: what a reader can do, beside choosing another folder, about such a claim.
        on_overwrite: called with the folder and what differs before such a claim's files are deleted.

    Raises:
        InUseError: another process works there; names it.
        ValueError: the folder belongs to another description (names what differs) or holds files that are not ours.
    """
    folder = Path(folder)
    mine = json.loads(json.dumps(description, default=plain))
    processes.on_main(_prepare, folder, kind)
    with held(kind.lock(folder), f"{folder}"):
        processes.on_main(_claim, folder, kind, mine, overwrite, remedy, on_overwrite)
        yield


def claim_shared(folder: Path, kind: Kind) -> None:
    """Claim a folder that several runs use at the same time, for nothing in particular, on the main process."""
    if not kind.marker(folder).exists():
        _prepare(folder, kind)
        with FileLock(kind.lock(folder)):
            _claim(folder, kind, {}, False, "", lambda *_: None)


def differing_keys(mine: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys in which two nested mappings differ, sorted."""
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return [] if mine == theirs else [prefix.rstrip(".")]
    return sorted(
        found
        for key in mine.keys() | theirs.keys()
        for found in differing_keys(mine.get(key), theirs.get(key), f"{prefix}{key}.")
    )


def description_of(folder: str | os.PathLike[str], kind: Kind) -> dict[str, Any] | None:
    """Return what a folder was claimed for, or None if it was not."""
    marker = kind.marker(Path(folder))
    if not marker.is_file():
        return None
    found = read_json(marker, f"Move {folder} away: without it nothing says whose it is")
    if not isinstance(found, dict) or found.get("made_by") != _MADE_BY or found.get("kind") != kind.name:
        raise ValueError(f"{marker} is no marker of this package: {folder} is left as it is, choose another folder")
    return dict(found["description"])


def _prepare(folder: Path, kind: Kind) -> None:
    """Make the folder, or refuse one with files that are not ours before anything is written into it."""
    if not kind.marker(folder).exists() and folder.is_dir():
        patterns = ("*",) if kind.alone else kind.files
        found = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
        found = [name for name in found if not name.removeprefix(".").startswith(RESERVED)]
        if found:
            raise ValueError(
                f"{folder} is not empty and holds no {kind.words.removeprefix('a ')} of ours (no "
                f"{kind.marker(folder).name}), but {shown_names(found, 3)}, which is left as it is: choose another "
                f"{kind.setting}"
            )
    make_folder(folder)


def _claim(
    folder: Path,
    kind: Kind,
    mine: dict[str, Any],
    overwrite: bool,
    remedy: str,
    on_overwrite: Callable[[Path, list[str]], None],
) -> None:
    theirs = description_of(folder, kind)
    differing = [] if theirs is None else differing_keys(mine, theirs)
    if differing and not overwrite:
        raise ValueError(
            f"{folder} holds {kind.words} of another configuration; differing: {', '.join(differing)}. Choose "
            f"another {kind.setting}, or {remedy}"
        )
    if differing:
        on_overwrite(folder, differing)
        discard(folder, kind)
    if theirs is None or differing:
        accounts.append_whole(folder / accounts.ACCOUNT, [])
        write_json(kind.marker(folder), {"made_by": _MADE_BY, "kind": kind.name, "description": mine})
    sweep(folder)


def discard(folder: Path, kind: Kind) -> None:
    """Delete all that a claim left in its folder, but its marker; nothing, and ValueError, if some is not ours."""
    found = [str(path.relative_to(folder)) for path in accounts.strangers(folder, kind.files)]
    if found:
        raise ValueError(
            f"{folder} holds {kind.words}, and among its files some that are not ours: {shown_names(found, 3)}. "
            f"Nothing was deleted: move them away, or choose another {kind.setting}"
        )
    accounts.delete(folder, kind.files)


@contextmanager
def held(lock: Path, what: str) -> Iterator[None]:
    """Within the block, hold a lock on behalf of all processes of this run; every process must call this.

    The kernel lets go of it when the process ends, however it does.

    Raises:
        InUseError: another process holds it; names the process and its machine.
    """
    own = FileLock(lock, timeout=0)
    processes.on_main(_take, own, what)
    try:
        yield
    finally:
        _let_go(own)


@contextmanager
def held_file(file: str | os.PathLike[str] | None) -> Iterator[None]:
    """Within the block, hold the lock of a single file (None: of nothing), which lies beside it; see `held`."""
    if file is None:
        yield
        return
    path = Path(file)
    processes.on_main(make_folder, path.parent)
    with held(path.with_name(f".{path.name}.lock"), str(path)):
        yield


def _take(lock: FileLock, what: str) -> None:
    file = Path(lock.lock_file)
    try:
        lock.acquire()
    except Timeout:
        raise InUseError(_in_use(file, what)) from None
    if not _is_native(file):
        return
    holder = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.write_text(json.dumps(holder) + "\n", encoding="utf-8")


def _let_go(lock: FileLock) -> None:
    if lock.is_locked:
        file = Path(lock.lock_file)
        if _is_native(file):
            # Who waits for it sees that the file is gone, and makes a new one.
            file.unlink(missing_ok=True)
        lock.release()


def _is_native(file: Path) -> bool:
    """Say whether a lock is the kernel's, so that its file's content is ours; elsewhere filelock writes into it."""
    return file.exists() and file.read_bytes()[:1] in (b"", b"{")


def _in_use(lock: Path, what: str) -> str:
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        host, pid, since = str(holder["host"]), int(holder["pid"]), str(holder["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{what} is in use by another process, says {lock}: wait until it has finished"
    holder = f"{what} is in use by process {pid} on {host}, since {since}: wait until it has finished, or end it"
    if host != platform.node():
        return f"{holder}. If it is certain that {host} is gone, delete {lock}"
    if not is_alive(pid):
        return f"{holder} (the process itself is gone, one that it started still holds the lock)"
    return holder
