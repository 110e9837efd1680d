"""A model's predictions, from its logits or from its hidden states and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensemw2s import ops
from ensemw2s.ops.products import linear
from ensemw2s.ops.row_losses import CHUNK_ELEMENTS
from ensemw2s.ops.topk_kl import reference as topk_kl_reference


@dataclass
class HiddenPredictions:
    """A model's predictions for n tokens, as hidden states and the head behind them.

    Attributes:
        states: floating point [n, d].
        head: [V, d], of the states' dtype.
    """

    states: Tensor
    head: Tensor

    @property
    def logits(self) -> Tensor:
        """Return [n, V]."""
        return linear(self.states, self.head)

    def cross_entropy(self, labels: Tensor, token_weights: Tensor) -> Tensor:
        """Return `sum_i w_i CE_i` for int64 labels [n]."""
        return ops.linear_weighted_cross_entropy(self.states, self.head, labels, token_weights)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Return int64 [n], the likeliest tokens, some rows at a time."""
        rows = self.states.split(max(1, CHUNK_ELEMENTS // len(self.head)))
        return torch.cat([linear(some, self.head).argmax(-1) for some in rows])

    def topk_kl(self, token_ids: Tensor, log_probs: Tensor, token_weights: Tensor, temperature: float) -> Tensor:
        """Return `sum_i w_i KL_i` from a cached top-k; see `ops.topk_kl`."""
        return ops.topk_kl(self.states, self.head, token_ids, log_probs, token_weights, temperature)


@dataclass
class LogitPredictions:
    """A model's predictions for n tokens, as logits [n, V]: for heads that are no plain linear layer."""

    logits: Tensor

    def cross_entropy(self, labels: Tensor, token_weights: Tensor) -> Tensor:
        """Return `sum_i w_i CE_i` for int64 labels [n]."""
        return ops.weighted_cross_entropy(self.logits, labels, token_weights)

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """Return int64 [n], the likeliest tokens."""
        return self.logits.argmax(-1)

    def topk_kl(self, token_ids: Tensor, log_probs: Tensor, token_weights: Tensor, temperature: float) -> Tensor:
        """Return `sum_i w_i KL_i` from a cached top-k; see `ops.topk_kl`."""
        return topk_kl_reference(self.logits / temperature, token_ids, log_probs, token_weights).sum()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, token_weights: Tensor, smoothing: float) -> Tensor:
    """Return `sum_i w_i ((1-s) CE(label_i) + s mean_v CE(v))`, float32: label smoothing (Szegedy et al. 2016).

    `logits` are [n, V], `labels` int64 [n], `token_weights` [n], and s is `smoothing`, in [0, 1].
    """
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return (token_weights * losses).sum()


Predictions = HiddenPredictions | LogitPredictions
