"""What decides the outputs of a model, of many and of a tokenizer, as hashes and plain JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ensemw2s.models.mixture import Experts
from ensemw2s.runtime.files import digest_of_files
from ensemw2s.runtime.fingerprint import digest_json, plain

# Where a model was loaded from and by which version says nothing of what it computes.
_NO_SETTINGS = {"_name_or_path", "transformers_version"}
# Nor what saving and loading a model writes into its configuration, or what is about training alone.
_NO_PART_OF_A_MODEL = {
    *_NO_SETTINGS, "architectures", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_NO_PART_OF_AN_ADAPTER = {
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type",
    "init_lora_weights", "lora_dropout",
}  # fmt: skip


def describe_model(model: str | os.PathLike[str] | PreTrainedModel) -> str:
    """Name a model: one in memory or in a folder by a hash of its weights and configuration, another source by itself.

    What lies in a folder may be replaced, and a folder may be moved: its name says nothing of the model.
    """
    if isinstance(model, PreTrainedModel):
        return f"{type(model).__name__}:{digest_tensors(model.state_dict().items())}"
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(model)
    return f"folder:{digest_of_files(sorted([*folder.glob('*.safetensors'), *folder.glob('config.json')]))}"


def digest_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *more: Any) -> str:
    """Name tensors by a hash of their names and bytes, in their order, and of `more`, in values of JSON."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in tensors:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if more:
        digest.update(json.dumps(more, sort_keys=True, default=plain).encode())
    return digest.hexdigest()


def describe_experts(experts: Experts) -> dict[str, Any]:
    """Return what decides the distributions of T experts: `experts`, a hash for each, and that of a shared `base`.

    By content: neither where they lie nor how they are called plays a part, nor whether they were saved and loaded.
    """
    if experts.kind == "adapters":
        return _describe_adapters(experts)
    found = []
    for index in range(len(experts)):
        with experts.expert(index) as model:
            found.append(digest_tensors(model.state_dict().items(), _settings(experts.expert_config(index))))
    return {"base": None, "experts": found}


def _describe_adapters(experts: Any) -> dict[str, Any]:
    plain_model = experts.base.get_base_model()
    # Those that put a prompt in front have none.
    prefix = getattr(experts.base.base_model, "prefix", "\0")
    # peft moves what it wraps to `.base_layer`, or `.original_module` beside a whole copy, and puts its own there.
    weights = (
        (name.replace(".base_layer.", ".").replace(".original_module.", "."), value)
        for name, value in plain_model.state_dict().items()
        if prefix not in name and ".modules_to_save." not in name
    )
    found = []
    for name in experts.names:
        own = get_peft_model_state_dict(experts.base, adapter_name=name, save_embedding_layers=False)
        settings = _without(_chosen(experts.base.peft_config[name]), _NO_PART_OF_AN_ADAPTER)
        found.append(digest_tensors(sorted(own.items()), settings))
    return {"base": digest_tensors(weights, _settings(plain_model.config)), "experts": found}


def _settings(config: Any) -> dict[str, Any]:
    # Without defaults, of which every release adds some.
    return _without(config.to_diff_dict(), _NO_PART_OF_A_MODEL)


def _chosen(config: Any) -> dict[str, Any]:
    """Return the fields of a data class that are not at their defaults."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    return {name: getattr(config, name) for name in defaults if getattr(config, name) != defaults[name]}


def _without(settings: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def digest_tokenizer(processing_class: PreTrainedTokenizerBase) -> str:
    """Name a tokenizer by a hash of its vocabulary, its end token and how it turns tokens into text."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else type(processing_class).__name__
    special = processing_class.eos_token_id, sorted(processing_class.all_special_ids)
    return digest_json([sorted(processing_class.get_vocab().items()), special, decoder])


def computes(model: Any) -> dict[str, Any]:
    """Return what decides a loaded model's outputs: its weights (as a hash), settings and kind of attention."""
    settings = _without(model.config.to_dict(), _NO_SETTINGS)
    weights = digest_tensors(model.state_dict().items())
    return {"weights": weights, "settings": settings, "attention": model.config._attn_implementation}
