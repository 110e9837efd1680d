"""A saved ensemble as a model of vLLM: T experts with caches of their own, whose distributions are mixed by our op."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import init_vllm_registered_model

from ensemw2s import ops
from ensemw2s.models.own_files import whole
from ensemw2s.models.saved import MODEL_WEIGHTS, expert_folders, listed_parts
from ensemw2s.serving.adapters import SavedAdapters
from ensemw2s.serving.config import ServedEnsembleConfig
from ensemw2s.serving.stacked import ExpertAttention, attach
from ensemw2s.serving.weights import check_expert_weights, row_weights

Weights = Iterable[tuple[str, torch.Tensor]]


class SideBySide(nn.Module):
    """T inner models, each of its own architecture and size."""

    def __init__(self, vllm_config: VllmConfig, config: ServedEnsembleConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        names = [f"{prefix}expert{index}" for index in range(len(config.expert_configs))]
        self.models: Any = nn.ModuleList(
            _inner(vllm_config, own, name) for own, name in zip(config.expert_configs, names, strict=True)
        )
        self.widths = [own.get_text_config(decoder=True).hidden_size for own in config.expert_configs]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the experts' final states of each token, [tokens, sum of their widths]."""
        return torch.cat([model(input_ids, positions) for model in self.models], dim=-1)

    def expert_logits(self, states: torch.Tensor) -> list[torch.Tensor] | None:
        """Return T logits [rows, V] for rows of what `forward` returned; None on ranks that have none."""
        parts = states.split(self.widths, dim=-1)
        logits = [model.compute_logits(own) for model, own in zip(self.models, parts, strict=True)]
        return None if logits[0] is None else logits

    def load(self) -> set[str]:
        """Load each expert from its folder, and return the names of what was loaded."""
        assert self.config.folder is not None
        states = map(_tensors_in, expert_folders(whole(Path(self.config.folder)), len(self.models)))
        each = zip(self.models, states, strict=True)
        return {f"models.{t}.{name}" for t, (model, state) in enumerate(each) for name in model.load_weights(state)}


class Stacked(nn.Module):
    """T LoRA adapters on one inner model, which runs every token T times."""

    def __init__(self, vllm_config: VllmConfig, config: ServedEnsembleConfig, prefix: str) -> None:
        super().__init__()
        self.config, self.count = config, len(config.expert_configs)
        self.model: Any = _inner(vllm_config, config.expert_configs[0], f"{prefix}expert0")
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Attention):
                    setattr(parent, name, ExpertAttention(child, self.count, vllm_config))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the experts' final states of each token, [tokens, T * width]."""
        states = self.model(input_ids.repeat(self.count), positions.repeat(self.count))
        return torch.cat(states.chunk(self.count), dim=-1)

    def expert_logits(self, states: torch.Tensor) -> list[torch.Tensor] | None:
        """Return T logits [rows, V] for rows of what `forward` returned; None on ranks that have none."""
        logits = self.model.compute_logits(torch.cat(states.chunk(self.count, dim=-1)))
        return None if logits is None else list(logits.chunk(self.count))

    def load(self) -> set[str]:
        """Load the base and attach the adapters, and return the names of what was loaded."""
        adapters = SavedAdapters(self.config)
        loaded = {f"model.{name}" for name in self.model.load_weights(adapters.base_weights())}
        attach(self.model, adapters, self.count)
        return loaded


class ServedEnsemble(nn.Module):
    """What vLLM makes of a saved ensemble: `compute_logits` gives the log-probabilities of the experts' mixture.

    The experts' final states of a token lie behind one another in one row, since vLLM passes one tensor from `forward`
    to `compute_logits`, some rows of it.

    Args:
        vllm_config: whose model configuration is a `ServedEnsembleConfig`.
        prefix: what vLLM puts in front of the names of layers.

    Raises:
        ValueError: a folder that is no ensemble, or settings of vLLM that an ensemble cannot honour; names it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        _check(vllm_config, config)
        self.config: ServedEnsembleConfig = config
        kind = SideBySide if config.kind == "models" else Stacked
        self.experts = kind(vllm_config, config, prefix)
        self.expert_weights: torch.Tensor
        self._is_first = False
        self.register_buffer("expert_weights", torch.tensor(config.expert_weights, dtype=torch.float32), False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Raise NotImplementedError: every expert has an embedding of its own."""
        raise NotImplementedError("the experts of an ensemble share no embedding: give token ids, not embeddings")

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the experts' final states of each token, [tokens, sum of their widths]."""
        if input_ids is None or inputs_embeds is not None:
            self.embed_input_ids(positions)
        self._is_first = True
        states: torch.Tensor = self.experts(input_ids, positions)
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the mixture's log-probabilities, float32 [rows, V]; None on ranks that have no logits."""
        logits = self.experts.expert_logits(hidden_states)
        # Of the calls after one forward pass, the first is for the rows that are sampled from, one for each request;
        # others are for prompts.
        weights = row_weights(self.expert_weights, len(hidden_states)) if self._is_first else self.expert_weights
        self._is_first = False
        if logits is None:
            return None
        return ops.mixture_log_probs(logits, weights, combine=self.config.combine)

    def set_expert_weights(self, expert_weights: Sequence[float]) -> None:
        """Mix with other weights from the next token on. No cache depends on them.

        Raises:
            ValueError: not T numbers that are finite and at least 0, or all of them 0.
        """
        check_expert_weights(expert_weights, len(self.expert_weights))
        self.expert_weights.copy_(torch.tensor(expert_weights, dtype=torch.float32))

    def load_weights(self, weights: Weights) -> set[str]:
        """Load every expert from its own folder.

        `weights`, which vLLM would read from the ensemble's own folder, is not touched: no weights lie there.
        """
        return {f"experts.{name}" for name in self.experts.load()}


def _check(vllm_config: VllmConfig, config: Any) -> None:
    if not isinstance(config, ServedEnsembleConfig) or not config.expert_configs:
        raise ValueError(
            f"{vllm_config.model_config.model} is no folder of a saved ensemble: give one written by "
            "TokenEnsemble.save_pretrained; an ensemble on the hub has to be downloaded first"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("pipeline_parallel_size: an ensemble has no layers that could follow one another; leave it 1")
    if vllm_config.lora_config is not None:
        raise ValueError("enable_lora: an adapter on a whole ensemble would change every expert; leave it out")
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config: the experts of an ensemble have no draft model; leave it out")
    if vllm_config.quant_config is not None and config.kind == "adapters":
        raise ValueError(
            "quantization: adapters on a quantised base cannot be served; leave it out, or merge each adapter into a "
            "model of its own and build the ensemble by TokenEnsemble.from_models"
        )


def _inner(vllm_config: VllmConfig, expert_config: Any, name: str) -> nn.Module:
    inner = vllm_config.with_hf_config(expert_config)
    # Or identical experts would share one compiled graph, with the first one's caches in it.
    inner.additional_config = {**(inner.additional_config or {}), "expert": name}
    model: nn.Module = init_vllm_registered_model(inner, prefix=name)
    return model


def _tensors_in(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    names = [MODEL_WEIGHTS[0]]
    if (folder / MODEL_WEIGHTS[1]).is_file():
        names = listed_parts(folder / MODEL_WEIGHTS[1], str(folder))
    for name in names:
        with safe_open(folder / name, framework="pt") as tensors:
            yield from ((key, tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118 - it is no dict
