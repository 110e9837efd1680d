"""The adapters of a saved ensemble and their base, layer by layer, for an engine with layers of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from ensemw2s.ensemble.attached import plain_model
from ensemw2s.ensemble.experts import AdapterExperts
from ensemw2s.ensemble.saving import load_base
from ensemw2s.ensemble.stacked import stackable
from ensemw2s.models.base_reference import found
from ensemw2s.models.own_files import whole
from ensemw2s.models.saved import expert_folders
from ensemw2s.serving.config import ServedEnsembleConfig


@dataclass(frozen=True)
class Product:
    """What one adapter adds to one linear layer: `x first^T second^T`.

    Attributes:
        first: [rank, in].
        second: [out, rank], times the adapter's scale.
    """

    first: torch.Tensor
    second: torch.Tensor


class SavedAdapters:
    """T LoRA adapters and their base model, in float32 on the CPU, while an engine takes over their weights.

    Args:
        config: of an ensemble of adapters that was read from a folder.

    Raises:
        FileNotFoundError: the base or an adapter is missing.
        ValueError: an adapter that is more than LoRA on linear layers; names it.
    """

    def __init__(self, config: ServedEnsembleConfig) -> None:
        assert config.folder is not None
        folder = Path(config.folder)
        # An engine makes its models on its own device and in its own dtype.
        with torch.device("cpu"):
            base = load_base(found(config.base, folder), folder, {})
            self._experts = AdapterExperts(base, expert_folders(whole(folder), len(config.expert_weights)))
        plain = stackable(self._experts.base, self._experts.names)
        for number, name in enumerate(self._experts.names, start=1):
            if name not in plain:
                raise ValueError(
                    f"{folder}: expert {number} is an adapter that does more than to add LoRA products to linear "
                    "layers (DoRA, modules saved whole, embeddings, another kind), which vLLM cannot be given. Merge "
                    "each adapter into a model of its own, and build the ensemble by TokenEnsemble.from_models"
                )

    def base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the base's weights by its own names for them, tied ones once, without any adapter."""
        model = plain_model(self._experts.base)
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        return ((name, weight) for name, weight in self._experts.base_weights().items() if name not in tied)

    def products(self) -> dict[str, Mapping[int, Product]]:
        """Return what is added to each linear layer of the base, by the number of the expert (from 0) that does so."""
        modules = plain_model(self._experts.base).named_modules()
        layers: dict[str, Any] = {path: module for path, module in modules if isinstance(module, LoraLinear)}
        return {
            path: {
                t: Product(layer.lora_A[name].weight.data, layer.lora_B[name].weight.data * layer.scaling[name])
                for t, name in enumerate(self._experts.names)
                if name in layer.lora_A
            }
            for path, layer in layers.items()
        }
