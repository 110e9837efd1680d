"""``mixture_scores``: how a weighted mixture of experts judges given labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    check_integers,
    check_weight_values,
    combine_code,
    expert_list,
    expert_weights,
    without_gradient,
)
from ensemw2s.ops.mixture_log_probs import reference as mixture_reference
from ensemw2s.ops.token_scores import TokenScores, fake_scores, scores_of


def mixture_scores(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float],
    labels: Tensor,
    combine: str = "prob",
    *,
    impl: str | None = None,
) -> TokenScores:
    """``token_scores`` of the combined distribution of T experts, without writing anything of size V.

    Equivalent to, with ``log_probs = mixture_log_probs(logits, weights, combine)``::

        log_probs.gather(-1, labels[..., None]), log_probs.argmax(-1) == labels, -(log_probs.exp() * log_probs).sum(-1)

    Rows whose label is -100 are not read. A row that ``mixture_log_probs`` makes NaN has NaN, False and NaN.

    Args:
        logits: T tensors ``[..., V]`` (float32, bfloat16, float16 or float64) or one stacked ``[T, ..., V]``.
        weights: ``[T]`` or a tensor ``[..., T]``, non-negative, see ``mixture_log_probs``.
        labels: int64 ``[...]``, in ``[0, V)`` or -100 (masked).
        combine: ``"prob"``, ``"logprob"`` or ``"vote"``, see ``mixture_log_probs``.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        ``TokenScores``; nothing in it carries a gradient.

    Raises:
        ValueError: Shapes or devices differ, or values of ``weights`` or ``labels`` are out of range.
        TypeError: A dtype is wrong.
    """
    experts = expert_list(logits, detached=True)
    weights = without_gradient(expert_weights(weights, len(experts), experts[0], per_row=True))
    check_integers(labels, tuple(experts[0].shape[:-1]), experts[0], "labels")
    code = combine_code(combine)
    chosen = backend._choose("mixture_scores", impl, experts[0].device, experts[0].dtype)
    if chosen == "reference":
        check_weight_values(weights)
        log_probs = mixture_reference(experts, weights, combine)
        return scores_of(log_probs, labels, log_probs.argmax(-1))
    return TokenScores(*backend.run("mixture_scores", chosen, experts, weights, labels.contiguous(), code))


def _fake(logits: list[Tensor], weights: Tensor, labels: Tensor, combine: int) -> tuple[Tensor, Tensor, Tensor]:
    return fake_scores(logits[0])


backend.declare(
    "mixture_scores",
    "(Tensor[] logits, Tensor weights, Tensor labels, int combine) -> (Tensor, Tensor, Tensor)",
    _fake,
)
backend.implement_in_triton("mixture_scores")
