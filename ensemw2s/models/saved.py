"""Saved models and ensembles, looked through before a library reads them: strangers may have written them.

A library that is handed a folder does much of what its files ask for: it runs Python files beside the weights, imports
modules by name, unpickles, fetches other models and compiled kernels from the hub, or fills in random numbers for what
is missing. Here a folder's settings may say what a model computes, and everything else is the caller's to say.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
)

from ensemw2s.runtime.parsing import parse_json
from ensemw2s.runtime.values import shown

MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Which version of a hub repository is meant: a base model lies in another repository, with versions of its own.
HUB_VERSION = ("revision", "force_download")
HUB_ACCESS = ("token", "cache_dir", "local_files_only")
REMEDY = "Save it again, or copy it whole"
# No file of settings is larger; tokenizers are, and are not read here.
_MOST_BYTES = 16 << 20
# Settings of a model that make transformers fetch or replace code, or read other files than the ones looked through.
_CALLERS = ("use_kernels", "kernel_config", "fusion_config", "distributed_config", "transformers_weights",
            "configuration_files", "custom_generate", "trust_remote_code", "use_safetensors", "tp_plan")  # fmt: skip
# How layers compute, as far as that is in transformers itself: other names, and those of packages that are missing,
# are fetched from the hub.
_IMPLEMENTATIONS = {
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
_COUNTS = re.compile(r"n(um)?_.*(layer|block|expert|head)")
_MOST_COUNTED = 10_000
# Files of distributed checkpoints, which transformers would read in place of the weights.
_DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_FLOATS = ("F16", "BF16", "F32", "F64")


def first_line(error: BaseException) -> str:
    """Return what went wrong in a library, cut to the first two of perhaps very many lines."""
    said = " ".join(line.strip() for line in str(error).splitlines()[:2])
    return said if len(said) <= 300 else said[:300] + " ..."


def read_settings(file: Path, owner: str) -> dict[str, Any]:
    """Return the JSON object in a file that a stranger may have written.

    Args:
        file: of at most 16 MiB.
        owner: whom an error names, e.g. "expert 2 of 3".

    Raises:
        FileNotFoundError: it is missing.
        OSError: it cannot be read.
        ValueError: it is no plain file, too large, or no JSON object.
    """
    size = _plain_size(file, owner)
    if size is None:
        raise FileNotFoundError(
            f"{owner}: {file.parent} has no {file.name}. The folder is incomplete: {REMEDY.lower()}"
        )
    if size > _MOST_BYTES:
        raise ValueError(f"{owner}: {file} holds {size:,} bytes, far more than settings do. {REMEDY}")
    try:
        value = parse_json(file.read_bytes(), str(file), not_finite=True)
    except OSError as error:
        raise _unreadable(file, owner, error) from error
    except ValueError as error:
        raise ValueError(f"{owner}: {error}. {REMEDY}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{owner}: {file} must hold a JSON object, got {shown(value)}. {REMEDY}")
    return value


def is_there(path: Path, owner: str) -> bool:
    """Return whether a path exists; raises OSError, which names `owner`, where that may not be seen."""
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, owner, error) from error


def _plain_size(file: Path, owner: str) -> int | None:
    """Return the size of a file, None if nothing is there; raises ValueError for what is no file, such as a pipe."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(file, owner, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "device or pipe"
        raise ValueError(f"{owner}: {file} is a {kind} in place of a file. {REMEDY}")
    return found.st_size


def _unreadable(file: Path, owner: str, error: OSError) -> OSError:
    reason = error.strerror or first_line(error)
    return OSError(error.errno or errno.EIO, f"{owner}: {file} cannot be read ({reason}): make it readable, or copy it")


def check_links(folder: Path) -> None:
    """Raise ValueError if files of a saved ensemble are links out of its folder (or its repository in the hub's cache).

    A folder that was unpacked or cloned could otherwise name any file of this machine as its own.
    """
    home = folder.resolve()
    within = next((up.parent for up in home.parents if up.name == "snapshots" and (up.parent / "blobs").is_dir()), home)
    patterns = ("*.json", "base", "base/*", "experts", "experts/*", "experts/*/*")
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if path.is_symlink() and not path.resolve().is_relative_to(within):
            raise ValueError(
                f"{path} is a link out of the ensemble's folder, to {path.resolve()}: copy what it points to into the "
                "folder, or delete it"
            )


def require_weights(folder: str | os.PathLike[str], names: Sequence[str], owner: str) -> Path:
    """Return the first of `names` that is in a folder; raises FileNotFoundError if none is there or it is empty."""
    for name in names:
        if _plain_size(Path(folder) / name, owner):
            return Path(folder) / name
    raise FileNotFoundError(
        f"{owner}: {folder} holds no weights (expected {' or '.join(names)}). The folder is incomplete or not "
        "a saved expert: save it again, or copy it whole"
    )


def require_whole(folder: str | os.PathLike[str], names: Sequence[str], owner: str) -> dict[str, str]:
    """Check that a folder's weights are all there and not cut off, from the headers of the files alone.

    Args:
        folder: written by `save_pretrained`, of transformers or peft.
        names: the file that holds the weights, or lists the files that do; any of these.
        owner: whom an error names, e.g. "expert 2 of 3".

    Returns:
        The dtype of each tensor by its name, in safetensors' spelling ("F32", "BF16", ...).

    Raises:
        FileNotFoundError: a file is missing.
        OSError: a file cannot be read.
        ValueError: a file is damaged, or a part of the weights lies elsewhere.
    """
    folder = Path(folder)
    found = require_weights(folder, names, owner)
    parts = listed_parts(found, owner) if found.suffix == ".json" else [found.name]
    dtypes: dict[str, str] = {}
    for part in parts:
        if _plain_size(folder / part, owner) is None:
            raise FileNotFoundError(
                f"{owner}: {folder} lacks {part}, one of the {len(parts)} files that {found.name} lists. The folder is "
                "incomplete: save it again, or copy it whole"
            )
        try:
            # safetensors takes what it may not read for missing.
            (folder / part).open("rb").close()
            with safe_open(folder / part, framework="pt") as weights:
                dtypes |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{owner}: {folder / part} is damaged ({first_line(error)}). {REMEDY}") from error
        except OSError as error:
            raise _unreadable(folder / part, owner, error) from error
    return dtypes


def listed_parts(index: Path, owner: str) -> list[str]:
    """Return the names of the files that an index lists; raises ValueError for anything but safetensors beside it."""
    listed = read_settings(index, owner)
    places = listed.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(listed.get("metadata"), dict):
        raise ValueError(f"{owner}: {index} must hold a `weight_map` and `metadata`. {REMEDY}")
    for part in places.values():
        if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
            raise ValueError(
                f"{owner}: {index} says that weights are in {shown(part)}, which is no safetensors file beside it. "
                f"{REMEDY}"
            )
    return sorted(set(places.values()))


def check_model_folder(folder: Path, owner: str) -> None:
    """Look through a folder that holds a whole model, before transformers reads it.

    Raises:
        FileNotFoundError: `config.json` or weights are missing.
        OSError: a file cannot be read.
        ValueError: a file is damaged, or asks for more than a model of transformers' own with these weights: another
            kind of model, a setting that is the caller's to make, or one that no model has.
    """
    dtypes = require_whole(folder, MODEL_WEIGHTS, owner)
    config = read_settings(folder / "config.json", owner)
    _check_model_config(config, f"{owner}: {folder / 'config.json'}", len(dtypes))
    if "quantization_config" not in config:
        odd = next((name for name, dtype in dtypes.items() if name.endswith(".weight") and dtype not in _FLOATS), None)
        if odd is not None:
            raise ValueError(f"{owner}: {folder} holds {odd} as {dtypes[odd]}, not in floating point. {REMEDY}")
    for file in folder.iterdir():
        if file.name == "adapter_config.json" or _DISTRIBUTED.fullmatch(file.name):
            raise ValueError(
                f"{owner}: {folder} holds {file.name} beside a whole model, and transformers would read that too: give "
                "a folder with one model alone"
            )
    if _plain_size(folder / "generation_config.json", owner) is not None:
        # Which tokens the vocabulary has is not asked: models of the hub name such as were never added to it.
        read_generation_config(folder / "generation_config.json", owner, {})


def _check_model_config(config: Mapping[str, Any], where: str, count: int) -> None:
    """Check the settings of a model of `count` tensors; `where` begins an error."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not known or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{where}: model_type {shown(kind)} is no causal language model of this version of transformers. If it "
            "comes with code of its own, and you trust that, pass trust_remote_code=True"
        )
    if kind == "ensemw2s":
        raise ValueError(f"{where} is an ensemble's, not a model's: load it with TokenEnsemble.from_pretrained")
    for key, value in _settings_in(config):
        _check_setting(key, value, where)
        if key == "num_hidden_layers" and isinstance(value, int) and value > count:
            raise ValueError(f"{where}: num_hidden_layers is {shown(value)}, but there are {count} tensors. {REMEDY}")


def _settings_in(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of nested JSON."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key, inner
            yield from _settings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings_in(inner)


def _check_setting(key: str, value: Any, where: str) -> None:
    known = _IMPLEMENTATIONS.get(key)
    chosen = value.values() if isinstance(value, dict) else [value]
    if known is not None and any(name is not None and name not in known for name in chosen):
        raise ValueError(f"{where}: {key} may be {' or '.join(known)} in a file, got {shown(value)}: pass it yourself")
    if key in _CALLERS and value:
        raise ValueError(f"{where}: {key} is not for a file to say, got {shown(value)}: delete it, or pass it yourself")
    if key == "quantization_config" and value is not None:
        method = value.get("quant_method") if isinstance(value, dict) else value
        # Other formats bring kernels from the hub, or leave it to further packages whether they do.
        if method != "bitsandbytes":
            raise ValueError(
                f"{where}: weights compressed by {shown(method)} may bring code from the hub. If you trust that, pass "
                "quantization_config yourself"
            )
    if key.startswith("__") or callable(getattr(PreTrainedConfig, key, None)):
        raise ValueError(f"{where}: {shown(key)} is no setting of a model. {REMEDY}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value}, which is no number. {REMEDY}")
    if isinstance(value, int) and (abs(value) >= 2**63 or (_COUNTS.match(key) and value > _MOST_COUNTED)):
        raise ValueError(f"{where}: {key} is {shown(value)}, more than any model has. {REMEDY}")


def read_generation_config(file: Path, owner: str, config: Mapping[str, Any]) -> GenerationConfig:
    """Return the saved generation settings of a model with the configuration `config`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `read_settings`; a setting that transformers refuses, or a token that
            the vocabulary does not have.
    """
    settings = read_settings(file, owner)
    where = f"{owner}: {file}"
    for key, value in settings.items():
        if key in _CALLERS or key.startswith("__") or callable(getattr(GenerationConfig, key, None)):
            raise ValueError(f"{where}: {shown(key)} is not for a file to say: delete it")
        if key in ("eos_token_id", "pad_token_id", "bos_token_id"):
            check_tokens(key, value, config, where)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {key} is {value}, which is no number. {REMEDY}")
    try:
        return GenerationConfig.from_dict(settings)
    except Exception as error:
        raise ValueError(f"{where} is no set of generation settings ({first_line(error)}). {REMEDY}") from error


def check_tokens(key: str, value: Any, config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless a token, or each of a list, is one of the vocabulary of `config`; None is none."""
    size = config.get("vocab_size")
    size = size if isinstance(size, int) else 2**31
    # Only ends may be several.
    several = isinstance(value, list) and key == "eos_token_id"
    for token in value if several else [value]:
        # Padding that there is no token for is -1 in some models.
        if token is not None and not (type(token) is int and -1 <= token < size):
            raise ValueError(f"{where}: {key} is {shown(value)}, not a token of the vocabulary of {size}. {REMEDY}")


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
        FileNotFoundError: a folder without config.json, or none at all where `name` is a path; a hub id that the hub
            does not know, or that cannot be reached.
    """
    folder = Path(name).expanduser() / subfolder
    there = is_there(folder, "the ensemble")
    if is_there(folder / "config.json", "the ensemble") and (folder / "config.json").is_file():
        return folder
    if there or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        inside = folder / "ensemble"
        hint = f"; one lies in {inside}" if (inside / "config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} is not a saved ensemble: it has no config.json{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), **hub)) / subfolder
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither the folder of a saved ensemble nor one that the hub gives out ({first_line(error)})"
        ) from error
