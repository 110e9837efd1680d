"""Files that are either whole or absent: atomic writes, JSON lines, and one message for a full disk.

A run may be killed at any moment. Everything it keeps is first written beside its final place and then
renamed, so that a file or folder that exists is complete and a later call can trust it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ensemw2s.runtime.accounts import (
    PARTIAL,
    account_around,
    append_whole,
    check,
    enter,
    enter_growing,
    files_in,
    is_partial,
)
from ensemw2s.runtime.parsing import parse_json, read_text, require_file
from ensemw2s.runtime.values import shown

_FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT}
# safetensors, NumPy and torch ("unexpected pos 704 vs 598", "iostream error") report a short write without an errno.
_FULL_DISK_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    "os error 28",
    "requested and",
    "unexpected pos",
    "iostream error",
)
# Of a name in that of what is to get it, in bytes: the rest says who writes it.
_LONGEST_STEM = 100


class DiskFullError(OSError):
    """The disk that should hold a file is full. What was complete before stays complete."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            errno.ENOSPC,
            f"no space left on the disk that holds {path}. Nothing that was finished is lost: free some space "
            "and run the same command again, it goes on from here",
        )


def is_disk_full(error: BaseException) -> bool:
    """Say whether `error`, or what it was raised from, means that a disk is full."""
    if isinstance(error, OSError) and error.errno in _FULL_DISK_ERRORS:
        return True
    if any(words in str(error).lower() for words in _FULL_DISK_WORDS):
        return True
    return error.__cause__ is not None and is_disk_full(error.__cause__)


@contextmanager
def new_file(path: str | os.PathLike[str], *, watched: bool = True) -> Iterator[Path]:
    """Give the path of a scratch file that takes the place of `path` when the block ends without an error.

    A full disk raises DiskFullError, and `path` is as it was before. `watchers` are told if it is `watched`: a file
    that does not stay is none of their business.
    """
    path = Path(path)
    with _aside(path) as aside:
        yield aside
        keep(aside, path, watchers if watched else [])
        aside.replace(path)
        sync(path.parent)


# Stands near the beginning of every page and picture of ours.
SIGNATURE = "made by ensemw2s"
_BEGINNING = 4096


@contextmanager
def new_page(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Do as `new_file` for a page or picture; one without `SIGNATURE` in it is not ours and raises ValueError."""
    path = Path(path)
    if path.is_file() and SIGNATURE.encode() not in path.read_bytes()[:_BEGINNING]:
        raise ValueError(f"{path} was not made by ensemw2s and is left as it is: name another file, or move it away")
    with new_file(path) as aside:
        yield aside


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty scratch folder that becomes folder `path` when the block ends without an error.

    Nothing is replaced: `own_files.own_files` replaces what it made itself.

    Raises:
        DiskFullError: the disk is full; nothing is at `path`.
        FileExistsError: something other than an empty folder is at `path`.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists, and is not deleted: move it away, or name another folder")
    with _aside(path) as aside:
        aside.mkdir()
        yield aside
        share_as_usual(aside)
        keep(aside, path)
        aside.replace(path)
        sync(path.parent)


# Called with each file or folder that is about to get its name, and with what tells it from another of that name.
watchers: list[Callable[[Path, str], None]] = []


def keep(aside: Path, path: Path, told: list[Callable[[Path, str], None]] = watchers) -> None:
    """Bring what is written in `aside` to the disk and enter it in the account, before its name becomes `path`."""
    if any(map(is_partial, path.parts)):
        # A part of something that will be kept as a whole.
        return
    for root, _, _ in os.walk(aside):
        sync(Path(root))
    for file in files_in(aside) if aside.is_dir() else [aside]:
        sync(file)
    if told or account_around(path):
        digest = enter(path, aside)
        for watcher in told:
            watcher(path, digest)


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk: a power cut does not undo them any more."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, to last."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def share_as_usual(folder: Path) -> None:
    """Let those read the files in a new folder who read any new file; safetensors keeps its own to the user."""
    usual = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        mode = file.lstat().st_mode
        if stat.S_ISREG(mode) and usual & ~mode:
            # A link to what another user keeps stays as that user wants it.
            with suppress(PermissionError):
                file.chmod(stat.S_IMODE(mode) | usual)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a name beside `path` that no other process uses; what dead processes have left under such is deleted."""
    aside = path.with_name(f"{_stem(path.name)}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        make_folder(path.parent)
        for left_over in path.parent.glob(f"{glob.escape(_stem(path.name))}.*.*.*{PARTIAL}"):
            if _is_dead(left_over):
                _discard(left_over)
        yield aside
    except BaseException as error:
        _discard(aside)
        if isinstance(error, Exception) and is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(path) from error
        raise


def _stem(name: str) -> str:
    # Names may have 255 bytes.
    long = len(os.fsencode(name)) > _LONGEST_STEM
    return f".{hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest() if long else name}"


def _host() -> str:
    return re.sub(r"\W", "-", platform.node(), flags=re.ASCII)[:_LONGEST_STEM]


def _is_dead(partial: Path) -> bool:
    """Say whether the process that wrote something not yet complete is known to be gone."""
    written_by = re.fullmatch(rf"\..*\.{re.escape(_host())}\.(\d+)\.[^.]*{re.escape(PARTIAL)}", partial.name)
    return written_by is not None and not is_alive(int(written_by[1]))


def is_alive(pid: int) -> bool:
    """Say whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _discard(path: Path) -> None:
    """Delete what is ours and not complete."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any, *, watched: bool = True) -> None:
    """Write `value` to `path` as JSON, as `new_file` does. Floats keep every bit; NaN and infinity are refused."""
    with new_file(path, watched=watched) as aside:
        aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with new_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(f"{_json_line(row)}\n" for row in rows)


def append_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line; a kill may tear the last line, which the next reader or writer drops."""
    path, lines = Path(path), [_json_line(row) for row in rows]
    try:
        make_folder(path.parent)
        enter_growing(path)
        if watchers:
            size = path.stat().st_size if path.exists() else 0
            size += sum(len(line.encode()) + 1 for line in lines)
            for watcher in watchers:
                watcher(path, f"up to {size}")
        append_whole(path, lines)
    except OSError as error:
        raise (DiskFullError(path) if is_disk_full(error) else error) from error


def settle(path: str | os.PathLike[str]) -> None:
    """Enter a file that was appended to, or a folder that was written in place, as it is: it is checked from now on."""
    enter(path, Path(path))


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def read_json(path: str | os.PathLike[str], remedy: str | None = None) -> Any:
    """Read a JSON file, of which `accounts.check` is asked first.

    Raises:
        FileNotFoundError, ValueError: it is gone, damaged or refused by `parsing.parse_json`; names it and says what to
            do (`remedy`).
    """
    check(path, remedy)
    try:
        return parse_json(read_text(path), str(path))
    except ValueError as error:
        raise ValueError(f"{error}. {remedy or 'Delete it, and the step that wrote it runs again'}") from error


def read_json_lines(path: str | os.PathLike[str], remedy: str | None = None) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line, that was written whole; see `read_json` for what it raises."""
    check(path, remedy)
    try:
        # Bytes break at newlines only; text also breaks at U+2028 and the like.
        lines = require_file(path, "name a file with one JSON object a line").read_bytes().split(b"\n")
        return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    except ValueError as error:
        remedy = remedy or f"Delete {path} and run the same command again, which makes it anew"
        raise ValueError(f"{error}. {remedy}") from error


def read_complete_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the JSON lines of a file that was appended to and may have been cut off in its last line.

    The torn last line, if there is one, is removed from the file so that appending can go on; not from a file that
    holds anything but such lines.

    Raises:
        ValueError: a line is no JSON object; names file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = require_file(path, "name a file with one JSON object a line").read_bytes()
    end = text.rfind(b"\n") + 1
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(text[:end].splitlines(), start=1)]
    torn = text[end:]
    # All lines that we write begin like this.
    if torn and not torn.startswith(b'{"'[: len(torn)]):
        raise ValueError(f"{path} is no file of ours: its end {shown(torn)} is no part of a line with a JSON object")
    if torn:
        with path.open("r+b") as file:
            file.truncate(end)
    return rows


def _row(line: bytes, place: str) -> dict[str, Any]:
    row = parse_json(line, place)
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {shown(row)}")
    return row


def write_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write one NumPy array as `.npy`, atomically and without pickle."""
    with new_file(path) as aside, aside.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def new_array(path: str | os.PathLike[str], size: int, dtype: Any = np.float64) -> Iterator[np.ndarray]:
    """Give an array [size] that is mapped into memory and is `path` (as `.npy`) at the block's end; see `new_file`."""
    with new_file(path) as aside:
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=(size,))
        with aside.open("r+b") as file:
            # Now, with an error: a full disk that is met while a map is written ends the process without a word.
            os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
        yield array
        array.flush()


def map_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Map an array written by `write_array` into memory, read-only: processes share what they read."""
    return read_array(path, "r")


def read_array(path: str | os.PathLike[str], mode: Literal["r"] | None = None) -> np.ndarray:
    """Read an array written by `write_array`; a damaged or pickled one is refused by a ValueError that names it."""
    check(path)
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of ours ({error}). Delete it and run the same command again") from error


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a hash of the files' contents, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Delete what dead processes of this machine left unfinished anywhere in a folder of ours."""
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            if _is_dead(Path(root) / name):
                _discard(Path(root) / name)


def cache_folder() -> Path:
    """Return where converted and self-made models are kept: `$ENSEMW2S_CACHE`, or `~/.cache/ensemw2s`."""
    named = os.environ.get("ENSEMW2S_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "ensemw2s"
    except RuntimeError as error:
        raise FileNotFoundError(
            f"there is no home folder to keep models in ({error}): set ENSEMW2S_CACHE to a folder that can be written"
        ) from error
