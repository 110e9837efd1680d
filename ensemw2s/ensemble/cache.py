"""Key/value caches: those of all experts as one object, growing in place, so that no step copies what others stored."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ensemw2s.models.mixture import Experts, Pass
from ensemw2s.ops.products import FrozenWeights

# Positions kept free at least when a layer's room is made or grown.
_SPARE = 32


class GrowingLayer(DynamicLayer):
    """A cache layer like transformers' `DynamicLayer` that appends in place.

    `keys` and `values` [B, heads, length, d] are views of tensors with room for more positions. Whatever replaces them
    (reordered, selected or repeated rows) gets room of its own at the next update; what is cropped is overwritten.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: Any
        self.values: Any
        self._rooms: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states [B, heads, new, d] and return all keys and values so far."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # A backward pass needs what the earlier steps saw as it was.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._rooms = [None, None]

    def _append(self, which: int, seen: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        past = seen.shape[-2] if seen.numel() else 0
        length = past + new.shape[-2]
        room = self._rooms[which]
        if room is None or room.shape[-2] < length or not (past == 0 or _begins(room, seen)):
            room = new.new_empty(*new.shape[:2], length + max(_SPARE, length // 4), new.shape[-1])
            room[:, :, :past] = seen if past else 0
            self._rooms[which] = room
        room[:, :, past:length] = new
        return room[:, :, :length]


def _begins(room: torch.Tensor, seen: torch.Tensor) -> bool:
    """Return whether `seen` is a view of the first positions of `room`."""
    return seen.data_ptr() == room.data_ptr() and seen.shape[:2] == room.shape[:2] and seen.stride() == room.stride()


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty cache for a model; only layers that keep every position are made to grow in place."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class EnsembleCache(Cache):
    """The key/value caches of all experts as one object.

    Its `layers` are all experts' layers in a row, so what transformers does to a cache (reorder, repeat, select, crop,
    reset) reaches every expert; `caches[i]` is the cache that forward pass `passes[i]` sees, holding the same layer
    objects. Experts that run as one model have one cache, whose rows are stacked, expert after expert.

    A cache belongs to the experts that it was made for (`members`), and keeps them in memory.
    """

    def __init__(self, experts: Experts) -> None:
        self.passes = tuple(experts.passes())
        self.members = tuple(experts.members())
        # By which experts that run by themselves multiply.
        self.frozen = FrozenWeights()
        self.caches = [growing_cache(experts.expert_config(each.experts[0])) for each in self.passes]
        super().__init__(layers=[layer for cache in self.caches for layer in cache.layers])

    def require_fit(self, members: Sequence[object], rows: int) -> None:
        """Raise ValueError unless the cache was made for these experts and, if it holds anything, for `rows` rows."""
        if [id(member) for member in self.members] != [id(member) for member in members]:
            raise ValueError(
                f"the cache was made for {len(self.members)} experts that are not the {len(members)} of this ensemble "
                "now: one was added, or the cache is another ensemble's; start a new one with ensemble.new_cache()"
            )
        sizes = (_rows_of(cache) // len(each.experts) for each, cache in self.parts())
        held = next(filter(None, sizes), rows)
        if held != rows:
            raise ValueError(
                f"the cache holds {held} rows and the input has {rows}: bring it to as many, as with "
                "cache.batch_repeat_interleave(n), or start a new one with ensemble.new_cache()"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> EnsembleCache:
        # What the experts have seen is copied, they themselves are not.
        memo |= {id(kept): kept for kept in (self.passes, self.frozen, *self.members)}
        other: EnsembleCache = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i what row `beam_idx[i]` was, for every expert."""
        for each, cache in self.parts():
            cache.reorder_cache(_stacked_rows(each, cache, beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of every expert."""
        for each, cache in self.parts():
            cache.batch_select_indices(_stacked_rows(each, cache, indices))

    def parts(self) -> Iterable[tuple[Pass, DynamicCache]]:
        """Return the forward passes, each with its cache."""
        return zip(self.passes, self.caches, strict=True)


def _rows_of(cache: DynamicCache) -> int:
    """Return how many rows a cache holds, 0 if it is empty."""
    all_keys = (getattr(layer, "keys", None) for layer in cache.layers)
    return next((len(keys) for keys in all_keys if isinstance(keys, torch.Tensor) and keys.numel()), 0)


def _stacked_rows(each: Pass, cache: DynamicCache, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of a pass that belong to some rows of the batch, expert after expert."""
    count = len(each.experts)
    starts = torch.arange(count, device=rows.device) * (_rows_of(cache) // count)
    return (starts[:, None] + rows).flatten()
