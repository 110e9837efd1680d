"""How an ensemble of adapters names the base model that it was saved without.

A path never looks like the name of a model on the hub: what was a folder when it was saved is a folder or an error when
it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ensemw2s.models.loading import check_dtype, hub_folder
from ensemw2s.models.saved import HUB_ACCESS
from ensemw2s.runtime.values import shown

KEYS = ("source", "keep_layers", "dtype")
# Arguments of `ensemw2s.load_model` that say where a model is put and how it is reached, not what it computes.
_PLACING = {"device_map", "max_memory", "offload_folder", "low_cpu_mem_usage", "attn_implementation", *HUB_ACCESS}
_LAYERS = re.compile(r"\d+(-\d+)?( *, *\d+(-\d+)?)*")
_MADE_HERE = re.compile(r"(package|scratch):[\w-]+")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def reference_to(source: Any, model_init_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the reference to a base model that `loading.load_model(source, **model_init_kwargs)` loads.

    None if a reference cannot say how (`quantization_config`, `revision`, ...): the base is then saved with the
    ensemble.
    """
    settings = {name: value for name, value in model_init_kwargs.items() if name not in _PLACING and value is not None}
    return {"source": source, **settings} if settings.keys() <= set(KEYS) else None


def check_base(base: Any, where: str) -> dict[str, Any] | None:
    """Return a reference as plain JSON: `source`, and perhaps `keep_layers` and `dtype`.

    Raises:
        ValueError: anything else, or a value that cannot be meant; `where` begins the message.
    """
    if base is None:
        return None
    if not isinstance(base, Mapping):
        raise ValueError(f"{where}: base must be null or hold the `source` of a model, got {shown(base)}")
    for key in base:
        if key not in KEYS:
            raise ValueError(f"{where}: base may hold {', '.join(KEYS)} alone, got {shown(key)}: pass it yourself")
    source, layers, dtype = (base.get(key) for key in KEYS)
    if not isinstance(source, str | os.PathLike) or not str(source) or "\0" in str(source):
        raise ValueError(f"{where}: base: source must name a model, got {shown(source)}")
    if layers is not None and not (isinstance(layers, str) and _LAYERS.fullmatch(layers)):
        raise ValueError(f'{where}: base: keep_layers must look like "0-11,22-29", got {shown(layers)}')
    checked = {"source": str(source), "keep_layers": layers}
    if dtype is not None:
        name = checked["dtype"] = str(dtype).removeprefix("torch.")
        try:
            check_dtype(dtype if isinstance(dtype, torch.dtype) else name)
        except ValueError as error:
            raise ValueError(f"{where}: base: {error}") from error
    return {key: value for key, value in checked.items() if value is not None}


def settled(base: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a reference whose source, if it is a folder, is named in full: the working directory may change."""
    if base is None:
        return None
    folder = Path(base["source"]).expanduser()
    return dict(base, source=str(folder.resolve())) if folder.is_dir() else dict(base)


def stored(base: Mapping[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """Return the reference that an ensemble saved in `folder` keeps."""
    if base is None or not Path(base["source"]).is_absolute():
        return None if base is None else dict(base)
    home, source = folder.resolve(), Path(base["source"]).resolve()
    if not source.is_relative_to(home.parent) or home.parent == Path(home.anchor):
        return dict(base)
    relative = os.path.relpath(source, home)
    return dict(base, source=relative if relative.startswith("..") else f"./{relative}")


def found(base: Mapping[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """Return the reference that the ensemble in `folder` keeps, its source named in full if it is a folder.

    Raises:
        FileNotFoundError: the folder of the base is not there, or the source could be the name of a folder or of a
            model on the hub.
    """
    if base is None:
        return None
    source = base["source"]
    if source.startswith(("./", "../", "/")):
        place = (folder / source).resolve()
        if not place.is_dir():
            raise FileNotFoundError(
                f"{folder}/config.json: the experts' base model was saved as the folder {place}, which does not exist: "
                "put it there, or pass source=... to from_pretrained. To hand an ensemble on, save it with its base: "
                "build it without base_reference"
            )
        return dict(base, source=str(place))
    if not (_MADE_HERE.fullmatch(source) or _HUB_ID.fullmatch(source)):
        raise FileNotFoundError(
            f"{folder}/config.json: base: {shown(source)} is neither a path (./, ../ or / in front), nor package:NAME, "
            "scratch:NAME or the id of a model on the hub (owner/name)"
        )
    return dict(base)


def arguments(base: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `ensemw2s.load_model` for a reference that was `found`; `hub` says how to reach it."""
    if not _HUB_ID.fullmatch(base["source"]):
        return dict(base)
    # Never a folder of that name in the working directory.
    access = {name: hub[name] for name in HUB_ACCESS if name in hub}
    return dict(base, source=hub_folder(base["source"], access))
