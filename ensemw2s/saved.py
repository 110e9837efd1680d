"""Saved experts and ensembles, looked through before anything is loaded: what is missing or damaged is named."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ensemw2s.experts import ADAPTER_WEIGHTS, AdapterExperts, require_weights
from ensemw2s.files import read_json

# Which version of a hub repository is meant: a base model lies in another repository, with versions of its own.
HUB_VERSION = ("revision", "force_download")
HUB_ACCESS = ("token", "cache_dir", "local_files_only")


def require_one_dtype(models: Sequence[PreTrainedModel], numbers: Sequence[int]) -> None:
    """Raise ValueError unless all models have the dtype of the first; `numbers` are theirs, for the message."""
    for model, number in zip(models, numbers, strict=True):
        if model.dtype != models[0].dtype:
            raise ValueError(
                f"expert {number} is in {model.dtype}, expert {numbers[0]} in {models[0].dtype}: load all in one dtype"
            )


def require_whole(folder: str | os.PathLike[str], names: Sequence[str], owner: str) -> None:
    """Check that a folder's weights are all there and not cut off, from the headers of the files alone.

    Args:
        folder: written by `save_pretrained`, of transformers or peft.
        names: the file that holds the weights, or lists the files that do; any of these.
        owner: whom an error names, e.g. "expert 2 of 3".

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    require_weights(folder, names, owner)
    found = next(folder / name for name in names if (folder / name).is_file())
    parts = sorted(set(read_json(found)["weight_map"].values())) if found.suffix == ".json" else [found.name]
    for part in parts:
        if not (folder / part).is_file():
            raise FileNotFoundError(
                f"{owner}: {folder} lacks {part}, one of the {len(parts)} files that {found.name} lists. The folder is "
                "incomplete: save it again, or copy it whole"
            )
        try:
            with safe_open(folder / part, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{owner}: {folder / part} is damaged ({error}). Save it again, or copy it whole"
            ) from error


def add_adapter(experts: AdapterExperts, folder: str | os.PathLike[str]) -> None:
    """Append a saved adapter to `experts`; an error names it and leaves the experts as they were.

    Raises:
        FileNotFoundError: weights or `adapter_config.json` are missing.
        ValueError: the weights are damaged, do not fit the base model, or would replace weights that all share.
    """
    owner = f"expert {len(experts) + 1}"
    require_whole(folder, (ADAPTER_WEIGHTS,), owner)
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{owner}: {folder} has no adapter_config.json. The folder is incomplete: save it again, or copy it whole"
        )
    _check_shared(experts.base, Path(folder), owner)
    known = set(getattr(experts.base, "peft_config", ()))
    try:
        experts.add(Path(folder))
    except (RuntimeError, ValueError) as error:
        for name in set(getattr(experts.base, "peft_config", ())) - known:
            experts.base.delete_adapter(name)
        # The first of many lines, and the first parameter that does not fit.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(
            f"{owner}: the adapter in {folder} does not fit the base model ({reason}): load the base that it was "
            "trained on"
        ) from error


def _check_shared(base: Any, folder: Path, owner: str) -> None:
    """Raise ValueError for an adapter that holds weights of the base itself, unless they are the base's own.

    peft saves whole embeddings with an adapter where the vocabulary was resized or the head is adapted, and loads them
    into the base, where they would replace those of every other expert.
    """
    plain = base.get_base_model() if isinstance(base, PeftModel) else base
    shared = {name.replace(".base_layer.", "."): weight for name, weight in plain.named_parameters()}
    own = PeftConfig.from_pretrained(str(folder))
    copied = tuple(getattr(own, "modules_to_save", None) or ())
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as saved:
        for key in saved.keys():  # noqa: SIM118  (not a dict)
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            weight = shared.get(name)
            if weight is None or not weight.is_floating_point():
                continue
            shape = tuple(saved.get_slice(key).get_shape())
            if shape != tuple(weight.shape):
                raise ValueError(
                    f"{owner}: the adapter in {folder} was trained on another base or a resized vocabulary, its "
                    f"{name} being {list(shape)} and the base model's {list(weight.shape)}: experts mix token by "
                    "token, so they must share one base and one tokenizer"
                )
            is_copy = any(part in name.split(".") for part in copied)
            if not is_copy and not torch.equal(saved.get_tensor(key).to(weight), weight):
                raise ValueError(
                    f"{owner}: the adapter in {folder} brings its own {name}, which would replace the base model's for "
                    f'all experts: train it with modules_to_save=["{name.split(".")[-2]}"], or save whole models'
                )


def expert_folders(folder: Path, count: int) -> list[Path]:
    """Return where `count` experts are saved; raises ValueError if there are more."""
    saved = sorted(path.name for path in (folder / "experts").glob("*") if path.is_dir())
    wanted = [str(t + 1) for t in range(count)]
    if set(saved) > set(wanted):
        raise ValueError(
            f"config.json of {folder} has {count} expert_weights but experts/ holds {len(saved)} folders "
            f"({', '.join(saved)}): give each expert its weight, or delete what does not belong"
        )
    return [folder / "experts" / name for name in wanted]


def local_folder(name: str | os.PathLike[str], subfolder: str, hub: Mapping[str, Any]) -> Path:
    """Return the folder of a saved ensemble, downloaded (`hub` says how) if `name` is a hub id.

    Raises:
        FileNotFoundError: a folder without config.json, or none at all where `name` is a path.
    """
    folder = Path(name) / subfolder
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or str(name).count("/") > 1 or str(name).startswith((".", "/")):
        raise FileNotFoundError(f"{folder} is not a saved ensemble: it has no config.json")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), **hub)) / subfolder
