"""Folders in which our files lie beside others': only what we wrote is replaced, all of it or nothing.

What is written lists itself in `ensemw2s.json`, by which we know it again. A folder that is not there yet appears whole
(`files.new_folder`). In one that is there, the new files are first made whole in a scratch folder inside it; the rename
of that to `.ensemw2s-ready` is the moment from which they count. They are then linked into their places one by one
(copied where the file system has no hard links), and the scratch folder goes last. A kill between any two of these
steps leaves the old files or the new ones whole: readers take those that are ready (`whole`), the next writer does the
rest.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ensemw2s.models.saved import is_there, read_settings
from ensemw2s.runtime.accounts import digest_of
from ensemw2s.runtime.files import DiskFullError, is_disk_full, keep, new_folder, share_as_usual, sync
from ensemw2s.runtime.values import shown

MANIFEST = "ensemw2s.json"
_PARTIAL, _READY = ".ensemw2s-partial", ".ensemw2s-ready"
# People write on in it.
_CARD = "README.md"
# Who has one of these in a folder has another model there.
_MODELS = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors")  # fmt: skip


@contextmanager
def own_files(path: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """Give an empty scratch folder, whose files take the place of those that we wrote to `path` before.

    All other files in `path` stay, and so does a README that is not as we wrote it.

    Args:
        path: a folder; made if it is not there.
        kind: what the files make up, e.g. "ensemble".

    Raises:
        DiskFullError: the disk is full; what was at `path` is as it was before.
        FileExistsError: `path` is a file, holds another model, or has a file of somebody else's in the way.
        PermissionError: `path` cannot be written.
    """
    folder = Path(path).expanduser().resolve()
    if not is_there(folder, kind):
        with new_folder(folder) as aside:
            yield aside
            _write_list(aside, kind)
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder to save the {kind} in")
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(f"{folder} cannot be written: make it writable, or name another folder for the {kind}")
    settle(folder)
    aside = folder / _PARTIAL
    try:
        _discard(aside)
        aside.mkdir()
        (aside / MANIFEST).touch()
        yield aside
        _leave_out_theirs(folder, aside, kind)
        share_as_usual(aside)
        _write_list(aside, kind)
        keep(aside, folder)
    except BaseException as error:
        _discard(aside)
        if isinstance(error, Exception) and is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(folder) from error
        raise
    aside.rename(folder / _READY)
    sync(folder)
    settle(folder)


def withdraw(path: str | os.PathLike[str], kind: str) -> None:
    """Delete what we wrote to `path` before, and nothing else there; the same errors as `own_files`."""
    if (Path(path).expanduser() / MANIFEST).is_file():
        with own_files(path, kind):
            pass


def whole(folder: Path) -> Path:
    """Return where the files lie that count: in `folder`, or ready to be put there when the writer was killed."""
    return folder / _READY if _is_scratch(folder / _READY) else folder


def settle(folder: Path) -> None:
    """Put files that are ready into their places in `folder`; called again after a kill, it goes on."""
    ready = folder / _READY
    if not _is_scratch(ready):
        return
    old, new = _listed(folder), _listed(ready)
    for name in new:
        if not _is_inside(folder, name):
            raise FileExistsError(f"{folder / name} would be written through a link: move the link away")
        _put(ready / name, folder / name)
    # A README that was written on since is nobody's but its writer's.
    gone = [name for name in old.keys() - new.keys() if name != _CARD or _digest(folder / name) == old[name]]
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    for up in sorted({up for name in gone for up in (folder / name).parents if folder in up.parents}, reverse=True):
        if up.is_dir() and not any(up.iterdir()):
            up.rmdir()
    # Until here the old list says what is ours, should this have to be done again.
    _put(ready / MANIFEST, folder / MANIFEST)
    for up in {(folder / name).parent for name in [*new, MANIFEST]}:
        sync(up)
    # From here on the ready files do not count, so that a kill while they are deleted does no harm.
    _discard(folder / _PARTIAL)
    ready.rename(folder / _PARTIAL)
    _discard(folder / _PARTIAL)


def _put(source: Path, place: Path) -> None:
    if place.exists() and place.samefile(source):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.ensemw2s")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copy2(source, beside)
    beside.replace(place)


def _is_scratch(path: Path) -> bool:
    """Return whether a folder is one of ours: it has a list of files, which is the first in it and the last to go."""
    return path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file()


def _discard(path: Path) -> None:
    """Delete a scratch folder, if it is there; raises FileExistsError for what is not ours."""
    if not os.path.lexists(path):
        return
    if not _is_scratch(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is in the way, and is not ours to delete: move it away")
    for inside in path.iterdir():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside)
        elif inside.name != MANIFEST:
            inside.unlink()
    (path / MANIFEST).unlink(missing_ok=True)
    path.rmdir()


def _files_in(folder: Path) -> list[str]:
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in files if name != MANIFEST)


def _listed(folder: Path) -> dict[str, str | None]:
    """Return the files in `folder` that we wrote, with the hash of the README; ValueError for a damaged list."""
    files = _manifest(folder).get("files")
    if not isinstance(files, Mapping) or not all(_is_inside(folder, name) for name in files):
        raise ValueError(
            f"{folder / MANIFEST} is no list of the files in its folder: it is not ours, or damaged. Name another "
            "folder"
        )
    return dict(files)


def _is_inside(folder: Path, name: str) -> bool:
    parts = PurePosixPath(name).parts
    ups = (folder.joinpath(*parts[:count]) for count in range(1, len(parts)))
    return bool(parts) and not {"..", "/"} & set(parts) and not any(up.is_symlink() for up in ups)


def _manifest(folder: Path) -> dict[str, Any]:
    """Return what the list in `folder` says: `kind` and `files`; nothing if there is no list."""
    file = folder / MANIFEST
    return read_settings(file, "what was saved here before") if file.is_file() else {"files": {}}


def _write_list(folder: Path, kind: str) -> None:
    files = {name: _digest(folder / name) if name == _CARD else None for name in _files_in(folder)}
    (folder / MANIFEST).write_text(json.dumps({"kind": kind, "files": files}, indent=1) + "\n", encoding="utf-8")


def _digest(file: Path) -> str | None:
    return digest_of(file) if file.is_file() else None


def refuse_others(path: str | os.PathLike[str], kind: str) -> bool:
    """Raise FileExistsError if the folder `path` holds another model, or another thing of ours than a `kind`.

    Returns:
        Whether an earlier `kind` of ours is there.
    """
    folder = Path(path).expanduser().resolve()
    old = _listed(folder)
    theirs = _manifest(folder).get("kind")
    if theirs not in (None, kind):
        raise FileExistsError(f"{folder} holds another thing of ours, a {shown(theirs)}: name another folder")
    for name in _MODELS:
        if os.path.lexists(folder / name) and name not in old:
            _refuse(folder / name, kind)
    return bool(old)


def _leave_out_theirs(folder: Path, aside: Path, kind: str) -> None:
    """Take from `aside` what others have in `folder` with the same content; FileExistsError for what is in the way."""
    refuse_others(folder, kind)
    old, new = _listed(folder), _files_in(aside)
    for name in new:
        place = folder / name
        changed = name == _CARD and _digest(place) not in (None, old.get(name))
        if changed or (name not in old and place.is_file() and filecmp.cmp(place, aside / name, shallow=False)):
            (aside / name).unlink()
        elif os.path.lexists(place) and (name not in old or (place.is_dir() and not place.is_symlink())):
            _refuse(place, kind)
    known = {up.as_posix() for name in {*old, *new} for up in (PurePosixPath(name), *PurePosixPath(name).parents)}
    for up in {up.as_posix() for name in new for up in PurePosixPath(name).parents} - {"."}:
        if os.path.lexists(folder / up) and ((folder / up).is_symlink() or not (folder / up).is_dir()):
            _refuse(folder / up, kind)
        for inside in (folder / up).glob("*"):
            if inside.relative_to(folder).as_posix() not in known:
                _refuse(inside, kind)


def _refuse(path: Path, kind: str) -> None:
    raise FileExistsError(
        f"{path} is in the way of the {kind}, and no earlier save of it wrote that. Nothing is replaced that is not "
        "ours: move it away, or name another folder"
    )
