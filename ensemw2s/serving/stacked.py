"""LoRA experts in vLLM as one model: the base's weights once, T rows a token, T caches a layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.parameter import ModelWeightParameter

from ensemw2s.serving.adapters import Product, SavedAdapters

_QKV = ("q", "k", "v")


class ExpertAttention(nn.Module):
    """One attention layer of T experts, each with a cache of its own.

    Args:
        layer: expert 0's, which the model was made with.
        count: T.
        vllm_config: where vLLM looks for layers with caches.
    """

    def __init__(self, layer: Attention, count: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        known = vllm_config.compilation_config.static_forward_context
        layers = [layer]
        for index in range(1, count):
            # All but the cache is the same for all experts.
            other = copy.copy(layer)
            other.layer_name = layer.layer_name.replace("expert0", f"expert{index}", 1)
            other.kv_cache = torch.tensor([])
            known[other.layer_name] = other
            layers.append(other)
        self.layers = nn.ModuleList(layers)

    def forward(self, query: torch.Tensor, key: Any, value: Any, **kwargs: Any) -> torch.Tensor:
        """Attend within each expert's rows; all tensors are [T * tokens, ...]."""
        count = len(self.layers)
        parts = [[None] * count if rows is None else rows.chunk(count) for rows in (query, key, value)]
        return torch.cat([layer(*own, **kwargs) for layer, *own in zip(self.layers, *parts, strict=True)])


class AdaptedLinear(LinearMethodBase):
    """How a linear layer multiplies: as before, and each expert's adapter adds its product to that expert's rows.

    The products are part of what tensor-parallel ranks sum up.

    Args:
        inner: how it multiplied before.
        first: [T, in, rank].
        second: [T, rank, out], 0 where an expert has no adapter.
    """

    def __init__(self, inner: Any, first: torch.Tensor, second: torch.Tensor) -> None:
        self.inner, self.first, self.second = inner, first, second

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are there."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Let the layer's own way of multiplying rearrange its weights."""
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the product of rows [T * tokens, in] with the layer's weights and the experts' adapters."""
        result = self.inner.apply(layer, x, bias)
        rows = x.view(len(self.first), -1, x.shape[-1])
        added = torch.bmm(torch.bmm(rows, self.first), self.second)
        return result + added.view(result.shape)


def attach(model: nn.Module, adapters: SavedAdapters, count: int) -> None:
    """Make the linear layers of an engine's model add the products of `count` adapters.

    Raises:
        ValueError: an adapter changes a layer that this model does not have under the name it has in transformers.
    """
    modules = dict(model.named_modules())
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    by_layer: dict[str, dict[int, Mapping[int, Product]]] = {}
    for path, products in adapters.products().items():
        if not products:
            continue
        parent, _, name = path.rpartition(".")
        fused, place = next(((own, names.index(name)) for own, names in packed.items() if name in names), (name, 0))
        place_of_layer = f"{parent}.{fused}"
        if not isinstance(modules.get(place_of_layer), LinearBase):
            raise ValueError(
                f"{path} has an adapter, and {type(model).__name__}, as vLLM has it, no linear layer of that name: "
                "merge each adapter into a model of its own, and build the ensemble by TokenEnsemble.from_models"
            )
        by_layer.setdefault(place_of_layer, {})[place] = products
    for path, of_parts in by_layer.items():
        layer: Any = modules[path]
        layer.quant_method = AdaptedLinear(layer.quant_method, *_stacked(layer, of_parts, count))


def _stacked(
    layer: Any, of_parts: Mapping[int, Mapping[int, Product]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the products of all experts with all parts of a layer, as `AdaptedLinear` takes them.

    Parts of a fused layer (query, key, value) have their own columns of the first factor, and rows of the second that
    are 0 outside their own outputs.
    """
    out, into = layer.weight.shape
    ranks = {part: max(len(one.first) for one in experts.values()) for part, experts in of_parts.items()}
    first = layer.weight.new_zeros(count, into, sum(ranks.values()))
    second = layer.weight.new_zeros(count, sum(ranks.values()), out)
    start = 0
    for part, rank in ranks.items():
        for index, product in of_parts[part].items():
            end = start + len(product.first)
            first[index, :, start:end] = _own_part(layer, "in", product.first, part).T
            second[index, start:end] = _own_part(layer, "out", product.second, part).T
        start += rank
    return first, second


def _own_part(layer: Any, side: str, factor: torch.Tensor, part: int) -> torch.Tensor:
    """Return what this tensor-parallel rank has of a factor: the layer's own loader cuts it as it cuts its weights."""
    is_cut = (side == "in") == isinstance(layer, RowParallelLinear)
    if not is_cut:
        return factor.to(layer.weight)
    shape = (len(factor), layer.weight.shape[1]) if side == "in" else (layer.weight.shape[0], factor.shape[1])
    loader = layer.weight.weight_loader
    held = ModelWeightParameter(data=layer.weight.new_zeros(shape), input_dim=1, output_dim=0, weight_loader=loader)
    own: tuple[str | int, ...] = ()
    if isinstance(layer, QKVParallelLinear):
        own = (_QKV[part],)
    elif isinstance(layer, MergedColumnParallelLinear):
        own = (part,)
    loader(held, factor.to(layer.weight), *own)
    return held.data
