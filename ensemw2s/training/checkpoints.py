"""Checkpoints of one fine-tuning run: whole or never used, and never another run's.

transformers writes a checkpoint file by file, so a kill or a full disk leaves a torn folder that looks like the newest
one. Here a checkpoint counts once a list of its files, with their sizes, lies in it, which is written last.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ensemw2s.runtime import processes
from ensemw2s.runtime.accounts import ACCOUNT, files_in, is_ours
from ensemw2s.runtime.claims import Kind, claimed, description_of, discard, held
from ensemw2s.runtime.files import read_json, sync, write_json

FOLDER = "checkpoints"
_KIND = Kind("checkpoints", "checkpoints", files=(f"{PREFIX_CHECKPOINT_DIR}-*",))
_SEAL = "complete.json"
# Enough of each weight to tell two models apart without reading all of a large one.
_SAMPLED_VALUES = 4096

logger = logging.getLogger(__name__)


def seal_checkpoint(folder: Path, spent: Mapping[str, float]) -> None:
    """Declare that `folder` is complete, once it is on the disk; `spent` says what training has taken until then."""
    for file in files_in(folder):
        sync(file)
    sync(folder)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files_in(folder)}
    known = {name: None if math.isnan(value) else value for name, value in spent.items()}
    # What it took is entered with what training leads to, not with what is deleted then.
    write_json(folder / _SEAL, {"spent": known, "files": sizes}, watched=False)
    sync(folder.parent)


def spent_until(folder: Path) -> dict[str, float]:
    """Return what training had taken when it wrote the checkpoint `folder`; NaN is not known."""
    return {name: math.nan if value is None else value for name, value in read_json(folder / _SEAL)["spent"].items()}


@contextmanager
def claimed_checkpoints(output_dir: str | Path | None, owner: Mapping[str, Any]) -> Iterator[Path | None]:
    """Within the block, keep one run's checkpoints in `output_dir`; gives the newest complete one, if there is any.

    Checkpoints of another run and incomplete ones are deleted, with a warning in the log. Every process must call this.

    Args:
        output_dir: holds a folder `checkpoints` with `checkpoint-<step>` folders.
        owner: what defines the run, in values that JSON or `fingerprint.plain` knows.

    Raises:
        InUseError: another process trains there.
        ValueError: there are checkpoints that are not ours.
    """
    folder = Path(str(output_dir)) / FOLDER
    with claimed(folder, _KIND, owner, overwrite=True, on_overwrite=_warn):
        yield processes.on_main(_newest, folder)


def _warn(folder: Path, differing: list[str]) -> None:
    if _by_step(folder):
        logger.warning(
            "%s holds checkpoints of another training (differing: %s): they are deleted, training begins anew",
            folder,
            ", ".join(differing),
        )


def _newest(folder: Path) -> Path | None:
    found = _by_step(folder)
    for checkpoint in found:
        if not is_ours(checkpoint):
            raise ValueError(
                f"{checkpoint} was not written by this training, which would delete it: move it away, or choose "
                "another output_dir"
            )
    for checkpoint in found:
        if _is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete (its writing was cut off) and is deleted", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def discard_checkpoints(output_dir: str | Path | None) -> None:
    """Delete our checkpoints in `output_dir`: what they led to is saved."""
    folder = Path(str(output_dir)) / FOLDER
    if description_of(folder, _KIND) is None:
        return
    with held(_KIND.lock(folder), str(folder)):
        discard(folder, _KIND)
        for file in (_KIND.marker(folder), folder / ACCOUNT):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def digest(arrays: Iterable[np.ndarray | torch.Tensor]) -> str:
    """Return a hash over shapes and first values of `arrays`."""
    value = hashlib.blake2b(digest_size=16)
    for array in arrays:
        tensor = torch.as_tensor(array).detach()
        value.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        value.update(tensor.flatten()[:_SAMPLED_VALUES].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return value.hexdigest()


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, the newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _is_complete(checkpoint: Path) -> bool:
    try:
        listed = read_json(checkpoint / _SEAL)["files"]
    except (FileNotFoundError, ValueError):
        return False
    present = {str(file.relative_to(checkpoint)): file.stat().st_size for file in files_in(checkpoint)}
    return all(present.get(name) == size for name, size in listed.items())
