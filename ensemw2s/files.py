"""Files that are either whole or absent: atomic writes, JSON lines, and one message for a full disk.

A run may be killed at any moment. Everything it keeps is first written beside its final place and then
renamed, so that a file or folder that exists is complete and a later call can trust it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

_FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT}
# safetensors, NumPy and torch ("unexpected pos 704 vs 598") report a short write in words, without an errno.
_FULL_DISK_WORDS = ("no space left on device", "disk quota exceeded", "os error 28", "requested and", "unexpected pos")


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
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a scratch file that takes the place of `path` when the block ends without an error.

    Raises:
        DiskFullError: the disk is full; `path` is as it was before.
    """
    with _aside(Path(path), _discard_file) as aside:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)


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
    with _aside(path, _discard_folder) as aside:
        aside.mkdir()
        yield aside
        share_as_usual(aside)
        aside.replace(path)


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
def _aside(path: Path, discard: Callable[[Path], None]) -> Iterator[Path]:
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        discard(aside)
        yield aside
    except BaseException as error:
        discard(aside)
        if isinstance(error, Exception) and is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(path) from error
        raise


def _discard_file(path: Path) -> None:
    path.unlink(missing_ok=True)


def _discard_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as JSON, atomically. Floats keep every bit; NaN and infinity are refused."""
    with new_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with new_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json_line(row) for row in rows)


def append_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line; a kill may tear the last line, which `read_complete_lines` then drops.

    Raises:
        DiskFullError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json_line(row) for row in rows)
    except OSError as error:
        raise (DiskFullError(path) if is_disk_full(error) else error) from error


def json_line(row: Mapping[str, Any]) -> str:
    """Return `row` as one line of JSON with its newline; NaN and infinity raise ValueError."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a file that does not parse raises ValueError with its name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). Delete it, and the step that wrote it runs again"
        ) from error


def read_complete_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the JSON lines of a file that was appended to and may have been cut off in its last line.

    The torn last line, if there is one, is removed from the file so that appending can go on.
    """
    path = Path(path)
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def write_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write one NumPy array as `.npy`, atomically and without pickle."""
    with new_file(path) as aside, aside.open("wb") as file:
        np.save(file, array, allow_pickle=False)


@contextmanager
def new_array(path: str | os.PathLike[str], size: int, dtype: Any = np.float64) -> Iterator[np.ndarray]:
    """Give an array [size] that is mapped into memory and takes the place of `path` (as `.npy`) at the block's end.

    Raises:
        DiskFullError: the disk is full; `path` is as it was before.
    """
    with new_file(path) as aside:
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=(size,))
        with aside.open("r+b") as file:
            # Now, with an error: a full disk that is met while a map is written ends the process without a word.
            os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
        yield array
        array.flush()


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an array written by `write_array`; a pickled one is refused."""
    return np.load(path, allow_pickle=False)


def map_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Map an array written by `write_array` into memory, read-only: processes share what they read."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a hash of the files' contents, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
