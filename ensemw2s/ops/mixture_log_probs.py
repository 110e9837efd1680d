"""``mixture_log_probs``: the log-probabilities of a weighted mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    COMBINES,
    accumulation_dtype,
    check_weight_values,
    combine_code,
    expert_list,
    expert_weights,
)

# exp of this is far from float32's largest value, and no weight of an expert with weight 0 needs more.
_LARGEST_EXPONENT = 80.0


def mixture_log_probs(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float],
    combine: str = "prob",
    *,
    impl: str | None = None,
) -> Tensor:
    """Log-probability of every token under T experts combined (EnsemW2S, Phase 2).

    Equivalent to, with ``w = weights / weights.sum()`` and ``p_t = softmax(logits[t])``::

        "prob"     log(sum_t w[t] * p_t)                            the paper's mixture
        "logprob"  log_softmax(sum_t w[t] * log(p_t))               a product of experts
        "vote"     log(sum_t w[t] * one_hot(argmax(p_t)))           discrete AdaBoost; ties go to the lowest id

    Weights ``[..., T]`` are those of each row. An expert of weight 0 drops out, whatever its logits. A row in which an
    expert of positive weight has NaN, +inf or no finite logit is NaN.

    Args:
        logits: T tensors ``[..., V]`` (float32, bfloat16, float16 or float64) or one stacked ``[T, ..., V]``.
            Leading strides are free; a last stride other than 1 costs a copy.
        weights: Non-negative; normalised inside. ``[T]``, not all zero, or a tensor ``[..., T]`` of each row's, where
            a row of zeros gives NaN.
        combine: ``"prob"``, ``"logprob"`` or ``"vote"``.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        float32 ``[..., V]`` (float64 for float64 logits). Differentiable in ``logits`` and ``weights``, except
        ``"vote"``, which is piecewise constant.

    Raises:
        ValueError: Shapes, devices, ``combine`` or the values of ``weights`` are wrong, or a gradient of ``"vote"``
            is asked for.
        TypeError: A dtype is wrong.
    """
    experts = expert_list(logits)
    weights = expert_weights(weights, len(experts), experts[0], per_row=True)
    code = combine_code(combine)
    needs_grad = torch.is_grad_enabled() and (weights.requires_grad or any(x.requires_grad for x in experts))
    if combine == "vote" and needs_grad:
        raise ValueError("combine='vote' has no gradient: use 'prob' or 'logprob', or wrap the call in torch.no_grad()")
    chosen = backend.choose_for_mixture("mixture_log_probs", impl, experts)
    if chosen == "reference":
        check_weight_values(weights)
        return reference(experts, weights, combine)
    return backend.run("mixture_log_probs", chosen, experts, weights, code)


def reference(experts: Sequence[Tensor], weights: Tensor, combine: str) -> Tensor:
    """Plain torch, any device; in float64 for float64 logits, else in float32."""
    return combined(experts, expert_log_probs(experts) if combine == "prob" else None, weights, combine)


def expert_log_probs(experts: Sequence[Tensor]) -> Tensor:
    """Each expert's own log-probabilities, ``[T, ..., V]``."""
    return torch.stack([torch.log_softmax(x.to(accumulation_dtype(x)), dim=-1) for x in experts])


def combined(experts: Sequence[Tensor], log_probs: Tensor | None, weights: Tensor, combine: str) -> Tensor:
    """The mixture's log-probabilities ``[..., V]``; ``log_probs`` are the experts' own, which ``"prob"`` needs."""
    w = _beside_rows(shares(weights), experts[0])
    active = w > 0
    if combine == "prob":
        assert log_probs is not None
        return _log_mean_probs(log_probs, w, active)
    logits = torch.stack([x.to(accumulation_dtype(x)) for x in experts])
    return _log_product(logits, w, active) if combine == "logprob" else _log_votes(logits, w, active)


def shares(weights: Tensor) -> Tensor:
    """``weights / weights.sum(-1)``, where the sum may be more than float32 holds or less than its normal numbers."""
    scaled = weights / weights.detach().amax(-1, keepdim=True)
    return scaled / scaled.sum(-1, keepdim=True)


def _beside_rows(weights: Tensor, logits: Tensor) -> Tensor:
    """Weights ``[T]`` or ``[..., T]`` in a shape that broadcasts with T logits ``[..., V]``, stacked."""
    if weights.dim() == 1:
        return weights.view(-1, *[1] * logits.dim())
    return weights.movedim(-1, 0)[..., None]


def _log_mean_probs(log_probs: Tensor, w: Tensor, active: Tensor) -> Tensor:
    largest = log_probs.detach().masked_fill(~active, -torch.inf).amax(dim=0)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    exponents = log_probs - largest
    idle = exponents.nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp(max=_LARGEST_EXPONENT)
    total = (w * torch.where(active, exponents, idle).exp()).sum(dim=0)
    # Where no expert gives a token any mass the derivative of log is infinite; the token is constant instead.
    possible = total != 0
    return torch.where(possible, torch.where(possible, total, 1.0).log() + largest, -torch.inf)


def _log_product(logits: Tensor, w: Tensor, active: Tensor) -> Tensor:
    """Of each row's logits less the largest: a constant in them changes nothing, and neither do their normalisers."""
    # By halves, because two float32 may lie further apart than float32 holds.
    halves = logits / 2
    fall = halves - halves.detach().amax(dim=-1, keepdim=True)
    impossible = fall == -torch.inf
    finite = torch.where(active, fall, fall.nan_to_num(nan=0.0)).masked_fill(impossible, 0.0)
    scores = (2 * w * finite).sum(dim=0).masked_fill((impossible & active).any(dim=0), -torch.inf)
    return torch.log_softmax(scores, dim=-1)


def _log_votes(logits: Tensor, w: Tensor, active: Tensor) -> Tensor:
    largest, winners = logits.max(dim=-1, keepdim=True)
    ballots = torch.zeros_like(logits).scatter_(-1, winners, 1.0)
    broken = (~largest.isfinite() & active).any(dim=0)
    return (w * ballots).sum(dim=0).log().masked_fill(broken, torch.nan)


def _fake(logits: list[Tensor], weights: Tensor, combine: int) -> Tensor:
    return logits[0].new_empty(logits[0].shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, weights, ctx.combine = inputs
    ctx.save_for_backward(weights, output, *logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], Tensor, None]:
    """Gradients of ``log p`` with ``w`` normalised, ``r_t = w_t p_t / p`` and ``g`` the incoming gradient.

    ``"prob"``:    ``dL/dz_t = r_t g - p_t sum(r_t g)`` and ``dL/dw_t = sum(g p_t / p)``.
    ``"logprob"``: with ``h = g - p sum(g)``, which sums to 0 over the vocabulary, ``dL/dz_t = w_t h`` and
    ``dL/dw_t = sum(h log p_t)``.
    Normalising gives ``dL/dweights_t = (dL/dw_t - sum_s w_s dL/dw_s) / sum(weights)``.
    """
    weights, output, *logits = ctx.saved_tensors
    w = _beside_rows(shares(weights), output)
    probs = output.exp()
    impossible = output == -torch.inf
    grad = grad.masked_fill(impossible, 0.0)
    grad_logits, grad_w = [], []
    if COMBINES[ctx.combine] == "logprob":
        grad = grad - probs * grad.sum(dim=-1, keepdim=True)
    for index, expert in enumerate(logits):
        log_probs = torch.log_softmax(expert.float(), dim=-1)
        # An expert that has no say may hold NaN.
        unread = ~(w[index] > 0) & log_probs.isnan()
        if COMBINES[ctx.combine] == "prob":
            ratios = (log_probs - output).masked_fill(impossible | unread, -torch.inf)
            grad_w.append((grad * ratios.clamp(max=_LARGEST_EXPONENT).exp()).sum(dim=-1))
            responsible = grad * (ratios + w[index].log()).exp()
            inner = responsible - log_probs.exp() * responsible.sum(dim=-1, keepdim=True)
        else:
            grad_w.append((grad * log_probs.masked_fill(impossible | unread, 0.0)).sum(dim=-1))
            inner = w[index] * grad
        grad_logits.append(torch.where(w[index] > 0, inner, 0.0).to(expert.dtype))
    return grad_logits, _gradient_of_weights(weights, torch.stack(grad_w, -1)), None


def _gradient_of_weights(weights: Tensor, grad_shares: Tensor) -> Tensor:
    """From the gradient of each row's shares ``[..., T]`` to that of the weights, ``[T]`` or ``[..., T]``."""
    if weights.dim() == 1:
        grad_shares = grad_shares.flatten(0, -2).sum(0) if grad_shares.dim() > 1 else grad_shares
    largest = weights.amax(-1, keepdim=True)
    inner = (shares(weights) * grad_shares).sum(-1, keepdim=True)
    return (grad_shares - inner) / (weights / largest).sum(-1, keepdim=True) / largest


backend.declare(
    "mixture_log_probs",
    "(Tensor[] logits, Tensor weights, int combine) -> Tensor",
    _fake,
    gradient=(_backward, _setup_context),
)
backend.implement_in_triton("mixture_log_probs")
