"""Checkpoints of one fine-tuning run: whole or never used, and never another run's.

transformers writes a checkpoint file by file, so a kill or a full disk leaves a torn folder that looks like the newest
one. Here a checkpoint counts once a list of its files, with their sizes, lies in it, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ensemw2s.files import read_json, write_json

FOLDER = "checkpoints"
_SEAL, _OWNER = "complete.json", "run.json"
# Enough of each weight to tell two models apart without reading all of a large one.
_SAMPLED_VALUES = 4096

logger = logging.getLogger(__name__)


def seal_checkpoint(folder: Path, spent: Mapping[str, float]) -> None:
    """Declare that `folder` is complete; `spent` says what training has taken until then."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
    write_json(folder / _SEAL, {"spent": spent, "files": files})


def spent_until(folder: Path) -> dict[str, float]:
    """Return what training had taken when it wrote the checkpoint `folder`."""
    return dict(read_json(folder / _SEAL)["spent"])


def claim_checkpoints(folder: Path, owner: Mapping[str, Any]) -> Path | None:
    """Make `folder` the place of one run's checkpoints and return its newest complete one, if there is any.

    Checkpoints of another run and incomplete ones are deleted, with a warning in the log.

    Args:
        folder: holds `checkpoint-<step>` folders.
        owner: what defines the run, as plain JSON values.
    """
    owner = json.loads(json.dumps(owner, default=str))
    file = folder / _OWNER
    theirs = read_json(file) if file.exists() else None
    if theirs != owner:
        if theirs is not None and _by_step(folder):
            differing = sorted(key for key in owner.keys() | theirs.keys() if owner.get(key) != theirs.get(key))
            logger.warning(
                "%s holds checkpoints of another training (differing: %s): they are deleted, training begins anew",
                folder,
                ", ".join(differing),
            )
        shutil.rmtree(folder, ignore_errors=True)
        write_json(file, owner)
        return None
    for checkpoint in _by_step(folder):
        if _is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete (its writing was cut off) and is deleted", checkpoint)
        shutil.rmtree(checkpoint)
    return None


def discard_checkpoints(output_dir: str | Path | None) -> None:
    """Delete the checkpoints in `output_dir`: what they led to is saved."""
    shutil.rmtree(Path(str(output_dir)) / FOLDER, ignore_errors=True)


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
    present = {str(file.relative_to(checkpoint)): file.stat().st_size for file in _files(checkpoint)}
    return all(present.get(name) == size for name, size in listed.items())


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]
