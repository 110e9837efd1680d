"""Results kept by what they were computed from: runs that need the same one compute it once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from ensemw2s.runtime import accounts, processes
from ensemw2s.runtime.claims import Kind, claim_shared
from ensemw2s.runtime.files import new_folder
from ensemw2s.runtime.fingerprint import digest_json

_KIND = Kind("store", "a store", files=(), setting="store", alone=True)


class Store:
    """A folder of folders, each under the hash of all that decides its content.

    Files are hard links where the disk allows it, so that a result takes its space once; they are never written to.
    Several runs may use a store at the same time; `folder` is made on first use.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def obtain(self, target: Path, key: Any, make: Callable[[], None]) -> None:
        """Put the result for `key` into the folder `target`, unless that exists; every process must call this.

        The key is what decides the result, in values that JSON or `fingerprint.plain` knows; `make` computes it and
        writes `target`, whole or not at all. What the store keeps under the key and is damaged, and a store's folder
        with files that are not ours, raise ValueError.
        """
        kept = self.folder / digest_json(key)
        if processes.on_main(self._is_there, kept, target):
            return
        processes.on_main(accounts.promise, target, kept.name)
        make()
        processes.on_main(self._keep, target, kept)

    def fulfil(self, target: Path) -> None:
        """Keep what is at `target` if the process that made it died before it did; every process must call this."""
        name = processes.on_main(accounts.promised, target)
        if name is not None:
            processes.on_main(self._keep, target, self.folder / name)

    def _is_there(self, kept: Path, target: Path) -> bool:
        if not target.exists() and kept.exists():
            _link(kept, target)
        return target.exists()

    def _keep(self, target: Path, kept: Path) -> None:
        if not kept.exists():
            claim_shared(self.folder, _KIND)
            # Two runs may have made the same.
            with FileLock(_KIND.lock(self.folder)):
                _link(target, kept)


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    accounts.check(source)
    with new_folder(target) as aside:
        shutil.copytree(source, aside, copy_function=_link_file, dirs_exist_ok=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
