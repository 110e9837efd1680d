"""The folder of a saved ensemble: written, and read again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ensemw2s.ensemble.config import EnsembleConfig, check_described, check_settings
from ensemw2s.ensemble.experts import AdapterExperts, ModelExperts
from ensemw2s.ensemble.model_card import model_card
from ensemw2s.inference.decoding import require_tokenizer
from ensemw2s.models.base_reference import arguments, check_base, found, settled, stored
from ensemw2s.models.loading import load_model, load_saved_model, with_dtype
from ensemw2s.models.mixture import ExpertMixture, Experts
from ensemw2s.models.own_files import own_files, whole
from ensemw2s.models.saved import (
    HUB_ACCESS,
    HUB_VERSION,
    MODEL_WEIGHTS,
    check_links,
    expert_folders,
    local_folder,
    read_generation_config,
    read_settings,
    require_whole,
)
from ensemw2s.runtime.console import no_model_bars
from ensemw2s.runtime.files import write_json
from ensemw2s.runtime.values import shown

RECORD_FILE = "boosting.json"
# Arguments of transformers' `save_pretrained` that name what is done anyway, and the values with which they do.
_DONE_ANYWAY = {
    "state_dict": None, "push_to_hub": False, "variant": None, "token": None, "safe_serialization": True,
    "save_peft_format": True, "save_original_format": True, "distributed_checkpoint": False,
}  # fmt: skip


def check_saving_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that transformers does not have, ValueError for values that change the folder."""
    for name, value in options.items():
        if name not in _DONE_ANYWAY:
            raise TypeError(f"an ensemble's save_pretrained does not know {name}: leave it out")
        if value is not _DONE_ANYWAY[name]:
            raise ValueError(
                f"{name}={shown(value)} cannot be honoured: an ensemble writes the weights that its experts hold, as "
                "plain safetensors, into a folder; leave it out, and upload with ensemble.push_to_hub"
            )


def save_ensemble(
    ensemble: ExpertMixture,
    save_directory: str | os.PathLike[str],
    processing_class: PreTrainedTokenizerBase | None,
    record: Mapping[str, Any] | None,
    max_shard_size: int | str | None,
) -> None:
    """Write an ensemble to one folder, whole or not at all; see `TokenEnsemble.save_pretrained`."""
    if processing_class is not None:
        require_tokenizer(processing_class, ensemble.config.vocab_size)
    experts: Any = ensemble.experts
    config = copy.deepcopy(ensemble.config)
    config.architectures = [type(ensemble).__name__]
    config.base = stored(config.base, Path(save_directory).expanduser())
    check_settings(json.loads(config.to_json_string()), "the ensemble's config")
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with own_files(save_directory, "ensemble") as folder, no_model_bars():
        config.save_pretrained(folder)
        ensemble.generation_config.save_pretrained(folder)
        for index in range(len(experts)):
            experts.save_expert(index, folder / "experts" / str(index + 1), **options)
        if isinstance(experts, AdapterExperts) and ensemble.config.base is None:
            experts.save_base(folder / "base", **options)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        if record is not None:
            write_json(folder / RECORD_FILE, record)
        (folder / "README.md").write_text(model_card(ensemble, record), encoding="utf-8")


def load_parts(
    pretrained_model_name_or_path: str | os.PathLike[str],
    config: EnsembleConfig | None,
    subfolder: str,
    model_init_kwargs: dict[str, Any],
) -> tuple[EnsembleConfig, Experts, GenerationConfig | None]:
    """Load what an ensemble is built of from a folder or the hub; see `TokenEnsemble.from_pretrained`.

    Returns:
        The configuration, the experts, and the generation config if one was saved.
    """
    if (model_init_kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path"):
        raise ValueError(f"{pretrained_model_name_or_path} holds an adapter_config.json beside an ensemble: delete it")
    model_init_kwargs = with_dtype(model_init_kwargs)
    if config is not None and config._attn_implementation is not None:
        # Where transformers' own classes put what they were given.
        model_init_kwargs = {"attn_implementation": config._attn_implementation, **model_init_kwargs}
    hub = {name: model_init_kwargs.pop(name) for name in HUB_VERSION if name in model_init_kwargs}
    hub |= {name: model_init_kwargs[name] for name in HUB_ACCESS if name in model_init_kwargs}
    folder = local_folder(pretrained_model_name_or_path, subfolder, hub)
    files = whole(folder)
    check_links(files)
    # transformers' own classes read the settings themselves, from files that may not count any more.
    if config is None or (files != folder and config._name_or_path == str(pretrained_model_name_or_path)):
        settings = read_settings(files / "config.json", "the ensemble")
        config = EnsembleConfig.from_dict(settings, name_or_path=str(files))
    folders = expert_folders(files, len(config.expert_weights))
    experts: Experts
    if config.kind == "models":
        experts = _load_models(folders, model_init_kwargs)
    else:
        source = model_init_kwargs.pop("source", None)
        if source is None:
            config.base = found(config.base, folder)
        else:
            config.base = settled(check_base({**(config.base or {}), "source": source}, "from_pretrained"))
        experts = AdapterExperts(load_base(config.base, folder, model_init_kwargs), folders)
    check_described(config, experts, files)
    file = files / "generation_config.json"
    if not file.exists():
        return config, experts, None
    return config, experts, read_generation_config(file, "the ensemble", {"vocab_size": config.vocab_size})


def _load_models(folders: Sequence[Path], model_init_kwargs: Mapping[str, Any]) -> ModelExperts:
    owners = [f"expert {number} of {len(folders)}" for number in range(1, len(folders) + 1)]
    for path, owner in zip(folders, owners, strict=True):
        require_whole(path, MODEL_WEIGHTS, owner)
    models = [load_saved_model(path, owner, **model_init_kwargs) for path, owner in zip(folders, owners, strict=True)]
    return ModelExperts(models)


def load_base(base: Mapping[str, Any] | None, folder: Path, model_init_kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """Load the base model of the ensemble in `folder`: the one that it refers to, or its own."""
    if base is None:
        return load_saved_model(whole(folder) / "base", "the experts' base model", **model_init_kwargs)
    try:
        return load_model(**{**arguments(base, model_init_kwargs), **model_init_kwargs})
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise type(error)(f"{folder / 'config.json'}: the experts' base model cannot be had: {error}") from error
