"""The configuration of a saved ensemble as an engine wants it: with those of its experts."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ensemw2s.ensemble.config import EnsembleConfig
from ensemw2s.models.base_reference import arguments, found
from ensemw2s.models.loading import parse_layers, resolve, thin_config
from ensemw2s.models.own_files import whole
from ensemw2s.models.saved import check_links, check_model_folder, expert_folders

_SECOND_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class ServedEnsembleConfig(EnsembleConfig):
    """An `EnsembleConfig` that also knows its folder and the configurations of its experts.

    An engine sizes its caches by one model's configuration, which is that of the expert with the shortest context.

    Attributes:
        folder: where the ensemble was read from; None in a configuration that was not.
        expert_configs: T configurations, of one base model T times where the experts are adapters.
        experts_served: T of the ensemble that this process serves, None before there is one. A server's front asks for
            it when requests come in.
    """

    experts_served: ClassVar[int | None] = None

    def __init__(self, **kwargs: Any) -> None:
        # First: transformers asks for the text configuration while it makes one.
        self.folder: str | None = None
        self.expert_configs: list[PreTrainedConfig] = []
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Read a saved ensemble's configuration, as `from_dict` does."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> ServedEnsembleConfig:
        """Read the experts' configurations beside the ensemble's own.

        Raises:
            FileNotFoundError: an expert, or the base of adapters, is missing.
            ValueError: settings that no ensemble has, or one that cannot be served; names it.
        """
        read: Any = super().from_dict(config_dict, **kwargs)
        config = read[0] if isinstance(read, tuple) else read
        place = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        if place and Path(place).is_dir():
            config.folder = str(Path(place).resolve())
            config.expert_configs = _expert_configs(config, Path(config.folder))
            _choose_model_runner()
            ServedEnsembleConfig.experts_served = len(config.expert_configs)
        return read

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        ServedEnsembleConfig.experts_served = len(self.expert_configs) or None

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved ensemble holds, without what was found beside it."""
        saved: dict[str, Any] = super().to_dict()
        return {key: value for key, value in saved.items() if key not in ("folder", "expert_configs")}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the configuration of the expert with the shortest context."""
        if not self.expert_configs:
            return super().get_text_config(decoder, encoder)
        texts = [config.get_text_config(decoder=True) for config in self.expert_configs]
        return min(texts, key=lambda text: getattr(text, "max_position_embeddings", None) or float("inf"))


def _choose_model_runner() -> None:
    """Have vLLM run ensembles by the model runner that says which request is in which row before it is computed.

    Raises:
        ValueError: the environment asks for the other one.
    """
    if os.environ.setdefault(_SECOND_RUNNER, "0") not in ("0", "false", "False"):
        raise ValueError(
            f"{_SECOND_RUNNER}={os.environ[_SECOND_RUNNER]}: ensembles are run by vLLM's first model runner, since the "
            "second one cannot give a request its own expert weights; unset it, or set it to 0"
        )


def _expert_configs(config: EnsembleConfig, folder: Path) -> list[PreTrainedConfig]:
    if config.combine == "vote":
        raise ValueError(
            f'{folder}/config.json: combine="vote" cannot be served, since a vote is no distribution to draw from: '
            'save the ensemble with combine="prob" or "logprob"'
        )
    files = whole(folder)
    check_links(files)
    folders = expert_folders(files, len(config.expert_weights))
    if config.kind == "models":
        return [_config_in(path, f"expert {number} of {len(folders)}") for number, path in enumerate(folders, start=1)]
    base = found(config.base, folder)
    if base is None:
        shared = _config_in(files / "base", "the experts' base model")
    else:
        named = arguments(base, {})
        shared = _config_in(Path(resolve(named["source"])), "the experts' base model")
        if named.get("keep_layers") is not None:
            thin_config(shared, parse_layers(named["keep_layers"], shared.num_hidden_layers))
    return [copy.deepcopy(shared) for _ in folders]


def _config_in(folder: Path, owner: str) -> PreTrainedConfig:
    check_model_folder(folder, owner)
    config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return config
