"""Runs as a report or a comparison reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemw2s.runtime.files import read_json
from ensemw2s.runtime.records import CONFIG_FILE, Run, read_records


def load_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Load runs, each named by its folder, and by the folder's whole path where names repeat."""
    if not paths:
        raise ValueError("no path: give at least one folder of a run or a study, or a study's .jsonl file")
    names = [Path(path).resolve().name.removesuffix(".jsonl") for path in paths]
    return [
        Run(name if names.count(name) == 1 else os.fspath(path), read_records(path), _read_config(path))
        for path, name in zip(paths, names, strict=True)
    ]


def _read_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    file = Path(path) / CONFIG_FILE
    if not file.exists():
        return None
    config = read_json(file)
    mappings = (
        (config, *(config.get(key, {}) for key in ("weak", "strong", "boosting"))) if isinstance(config, dict) else ()
    )
    if not mappings or not all(isinstance(part, dict) for part in mappings):
        raise ValueError(
            f"{file} is no configuration of a run: expected an object with the objects weak, strong, boosting"
        )
    return config


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names and values of settings, those that are None left out."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flatten(item, f"{prefix}{key}.")
        elif item is not None:
            # White space that nobody would see is put in quotes.
            seen = not isinstance(item, str) or (item and item == item.strip())
            yield f"{prefix}{key}", str(item) if seen else repr(item)
