"""The account of a folder that is ours: every file that this package wrote there, with its size and hash.

It says two things that a look at the disk cannot: which files are ours, so that nothing else is ever deleted, and
what was in them, so that a damaged, emptied or foreign one is never used. `files` enters whatever it writes into the
account of the nearest folder around it that has one; `claims` begins it.

An entry is made before the file gets its name. So a process that is killed leaves at most entries of files that are
not there (or are as they were before), and never a file of ours without an entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ensemw2s.runtime.fingerprint import digest_json

ACCOUNT = "ensemw2s.files.jsonl"
# The files by which a folder is ours are named with this: account, lock and markers.
RESERVED = "ensemw2s."
# How a file or folder is called until it is complete.
PARTIAL = ".partial"
# A reader may write into the texts that lie beside the weights.
_FREE_TEXT = ".md"

Path_ = str | os.PathLike[str]


class Entry(NamedTuple):
    """A file's size in bytes and its hash; both None for what grows (a folder: all that is in it)."""

    size: int | None
    digest: str | None


_GROWS = Entry(None, None)


class _Account(NamedTuple):
    """What was written under each name, the last entry last, and what was promised to a store under which name."""

    entries: dict[str, list[Entry]]
    promises: dict[str, str]


# What was read, with what tells that a file was not touched since (`_signature`).
_READ: dict[Path, tuple[tuple[int, ...], _Account]] = {}
_FOUND_WHOLE: dict[Path, tuple[tuple[int, ...], Entry]] = {}


def account_around(path: Path_) -> Path | None:
    """Return the nearest folder around `path` that keeps an account, or None; for what is not complete yet, None."""
    owner = _owner(path)
    return None if owner is None or any(map(is_partial, absolute(path).relative_to(owner).parts)) else owner


def _owner(path: Path_) -> Path | None:
    return next((folder for folder in absolute(path).parents if (folder / ACCOUNT).is_file()), None)


def absolute(path: Path_) -> Path:
    """Return the whole path, where a link keeps its own name."""
    path = Path(path)
    # Where ".." leads behind a link is for the system to say.
    return path.resolve() if ".." in path.parts else Path.cwd() / path


def is_partial(name: str) -> bool:
    """Say whether a file of this name, or a folder, is one that is not complete yet."""
    return name.startswith(".") and name.endswith(PARTIAL)


def digest_of(file: Path) -> str:
    """Return a hash of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, links among them, in the order of their names."""
    found = []
    for root, folders, names in os.walk(folder):
        found += [Path(root) / name for name in names]
        found += [Path(root) / name for name in folders if (Path(root) / name).is_symlink()]
    return sorted(found)


def enter(path: Path_, made: Path) -> str:
    """Enter what was `made`, about to be called `path`, into the account around that, if any; return its hash."""
    names = {file.relative_to(made).as_posix(): file for file in files_in(made)} if made.is_dir() else {"": made}
    found = {name: {"bytes": file.stat().st_size, "blake2b": digest_of(file)} for name, file in names.items()}
    owner = account_around(path)
    if owner is not None:
        own = _name(owner, path)
        rows = {f"{own}/{name}" if name else own: values for name, values in found.items()}
        replaced = [old for old, written in _account(owner).entries.items() if old.startswith(f"{own}/") and written]
        rows |= {old: {"replaced": True} for old in replaced if old not in rows}
        append_whole(owner / ACCOUNT, (json.dumps({"file": name, **values}) for name, values in rows.items()))
    return digest_json(found)


def enter_growing(path: Path_) -> None:
    """Enter a file that is appended to, or a folder that others fill: it is ours, whatever is in it."""
    owner = account_around(path)
    if owner is not None and _account(owner).entries.get(_name(owner, path), [])[-1:] != [_GROWS]:
        append_whole(owner / ACCOUNT, [json.dumps({"file": _name(owner, path)})])


def promise(path: Path_, name: str) -> None:
    """Say, before it is made, under which name a store will keep what is about to be at `path`."""
    owner = account_around(path)
    if owner is not None:
        append_whole(owner / ACCOUNT, [json.dumps({"file": _name(owner, path), "promised": name})])


def promised(path: Path_) -> str | None:
    """Return the name under which a store was to keep what is at `path`, if it was promised to one."""
    owner = account_around(path)
    return None if owner is None else _account(owner).promises.get(_name(owner, path))


def append_whole(path: Path, lines: Iterable[str], *, lasting: bool = True) -> None:
    """Append lines to a file so that all of them are on the disk, or none is in the file.

    Without `lasting` a power cut may undo it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = _whole_lines(descriptor)
        os.ftruncate(descriptor, size)
        data = "".join(f"{line}\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            if lasting:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _whole_lines(descriptor: int) -> int:
    """Return the size of an open file without the last line, if that was cut off."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return end if size else 0


def check(path: Path_, remedy: str | None = None) -> None:
    """Refuse a file or folder whose content is not what this package wrote; outside of any account, nothing is known.

    The remedy is a sentence on what its reader shall do; None says to delete it.

    Raises:
        FileNotFoundError: it is not there, or one of its files.
        ValueError: it has another content, or is none of our files; names it and says what to do.
    """
    path = Path(path)
    owner = account_around(path)
    remedy = remedy or f"Delete {path} and run the same command again, which makes it anew"
    if owner is None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        return
    name = _name(owner, path)
    known = {other: written for other, written in _account(owner).entries.items() if written}
    if any(known.get(up.as_posix(), [])[-1:] == [_GROWS] for up in Path(name).parents):
        return
    below = [other for other in known if other.startswith(f"{name}/")]
    if name not in known and not below and path.exists():
        raise ValueError(f"{path} was not written here by this package, which trusts its own files alone. {remedy}")
    for entry in [name] if name in known else below or [name]:
        if not (below and entry.endswith(_FREE_TEXT)):
            _check_file(owner / entry, known.get(entry, []), remedy)


def _check_file(file: Path, written: list[Entry], remedy: str) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{file} is gone. {remedy}")
    if written[-1:] == [_GROWS]:
        return
    signature, key = _signature(file), file.absolute()
    _, size, *_ = signature
    if (known := _FOUND_WHOLE.get(key)) is not None and known[0] == signature and known[1] in written:
        return
    if size not in [entry.size for entry in written]:
        raise ValueError(f"{file} is damaged: it has {size} bytes, written were {written[-1].size}. {remedy}")
    found = Entry(size, digest_of(file))
    if found not in written:
        raise ValueError(f"{file} is damaged: its content is not what was written. {remedy}")
    _FOUND_WHOLE[key] = signature, found


def _signature(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _account(owner: Path) -> _Account:
    """Return a folder's account; one that is damaged raises ValueError."""
    file = owner / ACCOUNT
    signature = _signature(file)
    known = _READ.get(file.absolute())
    if known is not None and known[0] == signature:
        return known[1]
    found = _Account({}, {})
    for number, line in enumerate(_rows(file), start=1):
        try:
            row = json.loads(line)
            if "promised" in row:
                found.promises[row["file"]] = row["promised"]
                continue
            written = found.entries.setdefault(row["file"], [])
            if row.get("replaced"):
                # Nothing is left of a file that was replaced together with its folder, but that it was ours.
                written.clear()
            else:
                written.append(Entry(row.get("bytes"), row.get("blake2b")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number}, is damaged ({error}): it says which files in {owner} are whole, so nothing "
                f"in there can be trusted any more. Move {owner} away and run the same command again"
            ) from error
    _READ[file.absolute()] = signature, found
    return found


def _rows(file: Path) -> list[bytes]:
    """Return the lines of an account without the last one, if a kill cut it off."""
    text = file.read_bytes()
    return text[: text.rfind(b"\n") + 1].splitlines()


def entered(folder: Path_, pattern: str) -> list[Path]:
    """Return the files in a folder with an account of its own that were written under names of a pattern, sorted."""
    names = [Path(name) for name, written in _account(Path(folder)).entries.items() if written]
    return sorted(Path(folder) / name for name in names if name.match(pattern))


def strangers(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files, among those in a folder that match, which are not ours."""
    matches = _matching(folder, patterns)
    files = (files_in(match) if match.is_dir() and not match.is_symlink() else [match] for match in matches)
    return [file for found in files for file in found if not is_ours(file)]


def is_ours(path: Path_) -> bool:
    """Say whether this package wrote a file, or is writing it: by its account, never by its name alone."""
    owner = _owner(path)
    if owner is None:
        return False
    name, known = Path(_name(owner, path)), _account(owner).entries
    locked = name.parent / name.name.removeprefix(".").removesuffix(".lock")
    named = {name.as_posix(), locked.as_posix()} & known.keys()
    reserved = len(name.parts) == 1 and name.name.startswith(RESERVED)
    inside = any(_GROWS in known.get(folder.as_posix(), []) for folder in name.parents)
    return bool(named) or reserved or inside or any(map(is_partial, name.parts))


def delete(folder: Path, patterns: Iterable[str]) -> None:
    """Delete what matches in a folder with an account, and strike it off the account."""
    patterns = tuple(patterns)
    for match in _matching(folder, patterns):
        if match.is_dir() and not match.is_symlink():
            shutil.rmtree(match)
        else:
            match.unlink()
    rows = [(row.decode(), Path(Path(json.loads(row)["file"]).parts[0])) for row in _rows(folder / ACCOUNT)]
    kept = [row for row, top in rows if not any(top.match(pattern) for pattern in patterns)]
    aside = folder / f".{ACCOUNT}{PARTIAL}"
    aside.unlink(missing_ok=True)
    append_whole(aside, kept)
    aside.replace(folder / ACCOUNT)


def _matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    return (match for pattern in patterns for match in sorted(folder.glob(pattern)))


def _name(owner: Path, path: Path_) -> str:
    return absolute(path).relative_to(owner).as_posix()
