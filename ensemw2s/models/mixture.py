"""What may be asked of T models, and one model asked in the same way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, Self, TypeGuard, TypeVar

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig

from ensemw2s.models.loading import CACHE
from ensemw2s.ops.products import FrozenWeights, faster_linear_layers
from ensemw2s.runtime.meter import count

Result = TypeVar("Result")


class MixtureConfig(Protocol):
    """How the distributions of T models become one.

    Attributes:
        expert_weights: T non-negative numbers, not normalised.
        combine: one of `ops.checks.COMBINES`: "prob", "logprob" or "vote".
    """

    expert_weights: Sequence[float]
    combine: str


class Mixture(Protocol):
    """What may be asked of T causal language models over one vocabulary of V tokens, B texts at a time."""

    @property
    def num_experts(self) -> int:
        """Return T."""

    @property
    def config(self) -> MixtureConfig:
        """Return the weights and how they are used."""

    @property
    def device(self) -> torch.device:
        """Return where token ids are wanted."""

    def snapshot(self) -> Self:
        """Return the mixture as it is now: what is added later is not in it."""

    def mixture_weights(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the weights as float32 [T] on `device`, not normalised."""

    def new_cache(self) -> Cache:
        """Return an empty cache for all T models, which has B rows once they have read something."""

    def expert_logits(
        self,
        indices: Iterable[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cache: Any,
        last_only: bool,
    ) -> list[torch.Tensor]:
        """Run the models `indices` and return the logits of each, [B, L, V], or [B, 1, V] with `last_only`.

        Args:
            indices: which models, from 0.
            input_ids: int64 [B, L], what the models have not seen yet.
            attention_mask: int64 [B, past + L].
            position_ids: int64 [B, L].
            cache: what `new_cache` returned; it grows by L.
            last_only: whether to compute logits of the last position alone.
        """


class StackedExperts(Protocol):
    """T experts (`count`) on one model (`base`), run as one on T batches of rows, one expert's after the other's."""

    base: nn.Module
    count: int

    def model(self) -> AbstractContextManager[nn.Module]:
        """Within the block, the yielded module takes the stacked rows."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass runs.

    Attributes:
        experts: the numbers of its experts, in the order of their rows.
        stacked: they as one model for stacked rows; None for one expert that runs by itself.
    """

    experts: tuple[int, ...]
    stacked: StackedExperts | None = None


class Experts(nn.Module, ABC):
    """T causal language models over one vocabulary, each by itself. Experts are numbered from 0.

    Any number of threads may run the same experts, and add to them.
    """

    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @abstractmethod
    def __len__(self) -> int:
        """Return T."""

    @abstractmethod
    def members(self) -> Sequence[object]:
        """Return what tells each expert from any other; it keeps the expert's weights in memory."""

    @abstractmethod
    def expert(self, index: int) -> AbstractContextManager[nn.Module]:
        """Within the block, the yielded module runs as expert `index`. Others may run it too: do not change it."""

    @abstractmethod
    def carrier(self, index: int) -> nn.Module:
        """Return the model that carries expert `index`: itself, or the base that its adapter is on."""

    @abstractmethod
    def selected(self, indices: Sequence[int]) -> Experts:
        """Return the named experts, sharing their weights with these."""

    @abstractmethod
    def save_expert(self, index: int, folder: Path, **options: Any) -> None:
        """Write expert `index` to `folder` as safetensors; `options` are those of transformers' `save_pretrained`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise TypeError: experts have no body in common, which is what `base_model` is of other models."""
        raise TypeError(
            "the experts of an ensemble have no common body to run: call the ensemble for its distribution, or one "
            "expert, as in `with ensemble.experts.expert(0) as model: model(...)`. As a teacher in TRL, an ensemble "
            "works with GKDTrainer, which asks for its distribution, and not with DistillationTrainer, which needs one "
            'body and one head; ours is StudentTrainer with variant="soft"'
        )

    def expert_config(self, index: int) -> PreTrainedConfig:
        """Return the model configuration of expert `index`."""
        config: Any = self.carrier(index).config
        return config

    def passes(self) -> list[Pass]:
        """Return the forward passes that run all experts as they are now; each expert is in one of them."""
        return [Pass((index,)) for index in range(len(self))]

    def run(
        self,
        passes: Sequence[Pass],
        alone: Callable[[nn.Module, int], Result],
        together: Callable[[Pass], Sequence[Result]],
    ) -> dict[int, Result]:
        """Return what each expert of some passes gives: `alone(expert, index)`, or its part of `together(stacked)`."""
        results: dict[int, Result] = {}
        for stack in passes:
            if stack.stacked is not None:
                results |= zip(stack.experts, together(stack), strict=True)
        singles = [one.experts[0] for one in passes if one.stacked is None]
        return results | dict(zip(singles, self.map(alone, singles), strict=True))

    def map(self, run: Callable[[nn.Module, int], Result], indices: Sequence[int]) -> list[Result]:
        """Return `run(expert, index)` for some experts, one after the other."""
        results = []
        for index in indices:
            with self.expert(index) as model:
                results.append(run(model, index))
        return results


class ExpertMixture(Mixture, Protocol):
    """A mixture that also gives its experts, one by one, and says how its texts are decoded: a `TokenEnsemble`.

    Attributes:
        config: what a `MixtureConfig` has, and the `vocab_size` and `max_position_embeddings` of all.
        experts: the T experts.
        generation_config: how texts are decoded where nothing else is said.
    """

    config: PreTrainedConfig
    experts: Experts
    generation_config: GenerationConfig

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of all experts."""

    def expert_logits(
        self,
        indices: Iterable[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        last_only: bool = False,
    ) -> list[torch.Tensor]:
        """Return logits as `Mixture` does; with `positions` (bool [B, L]), [n, V] at its n true entries."""


class OneModel:
    """One causal language model as a mixture of one.

    Args:
        model: the model, in evaluation mode.
    """

    num_experts = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config: Any = SimpleNamespace(expert_weights=(1.0,), combine="prob")
        self.device: torch.device = next(model.parameters()).device
        self._frozen = FrozenWeights()

    def snapshot(self) -> Self:
        """Return the mixture itself, to which nothing is ever added."""
        return self

    def mixture_weights(self, device: torch.device | None = None) -> torch.Tensor:
        """Return float32 [1]."""
        return torch.ones(1, device=device)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache for the model."""
        return DynamicCache(config=self.model.config)

    def expert_logits(
        self,
        indices: Iterable[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        position_ids: torch.Tensor,
        cache: Any,
        last_only: bool,
    ) -> list[torch.Tensor]:
        """Run the model; see `Mixture.expert_logits`."""
        kept = 1 if last_only else 0
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache, "use_cache": True}
        with faster_linear_layers(self.model, input_ids.numel(), self._frozen):
            logits = self.model(input_ids=input_ids, logits_to_keep=kept, **inputs).logits
        count(self.model, input_ids, attention_mask, logits.shape[:-1].numel())
        return [logits]


def is_mixture(model: Any) -> TypeGuard[ExpertMixture]:
    """Return whether a model is a mixture whose experts can be asked one by one."""
    return hasattr(model, "expert_logits")


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
