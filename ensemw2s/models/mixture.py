"""What may be asked of T models, and one model asked in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ensemw2s.models.loading import CACHE
from ensemw2s.runtime.meter import count


class _Alone:
    """One causal language model with as much of a `TokenEnsemble`'s face as is needed here."""

    num_experts = 1

    @dataclass(frozen=True)
    class Config:
        """One vote for the one model."""

        expert_weights: tuple[float, ...] = (1.0,)
        combine: str = "prob"

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = self.Config()
        self.device = next(model.parameters()).device

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def expert_logits(
        self,
        indices: Sequence[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cache: DynamicCache,
        last_only: bool,
    ) -> list[torch.Tensor]:
        kept = 1 if last_only else 0
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache, "use_cache": True}
        logits = self.model(input_ids=input_ids, logits_to_keep=kept, **inputs).logits
        count(self.model, input_ids, attention_mask, logits.shape[:-1].numel())
        return [logits]


def repeat_rows(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """Return a model's inputs with the rows of its tensors [B, ...] stacked `copies` times, one batch per expert."""
    return {
        name: value.repeat(copies, 1) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def damaged(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return bool [T, ...]: where an expert's logits [..., V] have NaN, +inf or no finite value."""
    return torch.stack([~expert.amax(-1).isfinite().to(logits[0].device) for expert in logits])


def refuse_damaged(damage: torch.Tensor, owners: Sequence[str], places: Sequence[str]) -> None:
    """Raise FloatingPointError if any of `damage` (bool [T, n]) is true, naming which of T owners and n places."""
    said = []
    for owner, places_of_one in zip(owners, damage.tolist(), strict=True):
        bad = list(dict.fromkeys(place for place, is_bad in zip(places, places_of_one, strict=True) if is_bad))
        if bad:
            more = " and more" if len(bad) > 5 else ""
            said.append(f"{owner} gave NaN, infinity or no finite logit for {', '.join(bad[:5])}{more}")
    if said:
        raise FloatingPointError(
            f"{'; '.join(said[:5])}: the weights are damaged or overflow in their dtype; load the experts in float32, "
            "or train what is damaged again"
        )


def expert_names(indices: Iterable[int]) -> list[str]:
    """Return how messages call the experts `indices` (from 0)."""
    return [f"expert {index + 1}" for index in indices]
