"""Results kept by what they were computed from: runs that need the same one compute it once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ensemw2s import processes
from ensemw2s.files import new_folder
from ensemw2s.identity import plain


class Store:
    """A folder of folders, each under the hash of all that decides its content.

    Files are hard links where the disk allows it, so that a result takes its space once; they are never written to.

    Args:
        folder: made on first use.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def obtain(self, target: Path, key: Any, make: Callable[[], None]) -> None:
        """Put the result for `key` into the folder `target`; every process must call this.

        Args:
            target: where it shall be; nothing happens if it exists.
            key: what decides the result, in values that JSON or `identity.plain` knows.
            make: computes it and writes `target`, whole or not at all.
        """
        kept = self.folder / _hash(key)
        if processes.on_main(self._is_there, kept, target):
            return
        make()
        processes.on_main(_link, target, kept)

    def _is_there(self, kept: Path, target: Path) -> bool:
        if not target.exists() and kept.exists():
            _link(kept, target)
        return target.exists()


def obtain(store: Store | None, target: Path, key: Callable[[], Any], make: Callable[[], None]) -> None:
    """Do as `Store.obtain`, or without a store make what is not there."""
    if processes.on_main(target.exists):
        return
    if store is None:
        make()
    else:
        store.obtain(target, key(), make)


def _hash(key: Any) -> str:
    text = json.dumps(key, sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    with new_folder(target) as aside:
        shutil.copytree(source, aside, copy_function=_link_file, dirs_exist_ok=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
