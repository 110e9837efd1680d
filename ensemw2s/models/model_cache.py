"""The folder of models that are made on this machine, each once: converted from a package, or trained from scratch."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ensemw2s.models.saved import is_there
from ensemw2s.runtime.files import cache_folder, new_folder

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def cached_folder(name: str) -> Path:
    """Return where the folder `name` of the model cache is, or would be."""
    return cache_folder() / name


def cached_model(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the model cache, which `make` fills on first use; what is there is only read.

    Raises:
        DiskFullError: the disk is full.
        OSError: the folder is not there yet and cannot be written.
    """
    folder = cached_folder(name)
    if is_there(folder, "the model cache"):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may want the model at once: one makes it, the others wait for it.
        with FileLock(folder.with_name(f".{name}.lock")):
            if not folder.exists():
                with new_folder(folder) as aside:
                    make(aside)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise OSError(
            error.errno,
            f"the model cache {folder.parent} does not hold {name} yet and cannot be written ({error.strerror}): set "
            "ENSEMW2S_CACHE to a folder that can be",
        ) from error
    return folder
