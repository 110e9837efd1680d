"""``token_scores``: how one model's logits judge given labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import MASKED_LABEL, accumulation_dtype, check_integers, check_label_values, check_logits


class TokenScores(NamedTuple):
    """Scores of the labels, each of the labels' shape. A masked label has 0, False and 0.

    Attributes:
        log_probs: float32, the label's log-probability.
        correct: bool, whether the label is the argmax (of equals, the lowest id).
        entropy: float32, entropy of the distribution in nats.
    """

    log_probs: Tensor
    correct: Tensor
    entropy: Tensor


def token_scores(logits: Tensor, labels: Tensor, *, impl: str | None = None) -> TokenScores:
    """Log-probability of each label, whether it is the argmax, and the entropy, in one read of the logits.

    Equivalent to::

        log_probs = logits.float().log_softmax(-1)
        log_probs.gather(-1, labels[..., None]), logits.argmax(-1) == labels, -(log_probs.exp() * log_probs).sum(-1)

    Rows whose label is -100 are not read. A row with NaN, +inf or no finite logit has NaN, False and NaN.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        labels: int64 ``[...]``, in ``[0, V)`` or -100 (masked).
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        ``TokenScores``; nothing in it carries a gradient.

    Raises:
        ValueError: Shapes or devices differ, or a label is out of range.
        TypeError: A dtype is wrong.
    """
    logits = check_logits(logits).detach()
    check_integers(labels, tuple(logits.shape[:-1]), logits, "labels")
    chosen = backend._choose("token_scores", impl, logits.device, logits.dtype)
    if chosen == "reference":
        return reference(logits, labels)
    return TokenScores(*backend.run("token_scores", chosen, logits, labels.contiguous()))


def reference(logits: Tensor, labels: Tensor) -> TokenScores:
    """Plain torch, any device; in float64 for float64 logits, else in float32."""
    return scores_of(logits.to(accumulation_dtype(logits)).log_softmax(-1), labels, logits.argmax(-1))


def scores_of(log_probs: Tensor, labels: Tensor, likeliest: Tensor) -> TokenScores:
    """The scores under log-probabilities ``[..., V]`` with the likeliest tokens ``[...]``, in plain torch."""
    check_label_values(labels, log_probs.shape[-1])
    masked = labels == MASKED_LABEL
    picked = log_probs.gather(-1, labels.masked_fill(masked, 0)[..., None])[..., 0]
    correct = (likeliest == labels) & ~log_probs.isnan().any(-1)
    entropy = -torch.where(log_probs == -torch.inf, 0.0, log_probs.exp() * log_probs).sum(-1)
    return TokenScores(picked.masked_fill(masked, 0.0), correct, entropy.masked_fill(masked, 0.0))


def fake_scores(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty scores for logits ``[..., V]``."""
    shape = logits.shape[:-1]
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.bool),
        logits.new_empty(shape, dtype=torch.float32),
    )


def _fake(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fake_scores(logits)


backend.declare("token_scores", "(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)", _fake)
backend.implement_in_triton("token_scores")
