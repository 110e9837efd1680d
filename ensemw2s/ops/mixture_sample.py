"""``mixture_sample``: the next token of every row, drawn from a weighted mixture of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    check_filters,
    check_integers,
    check_weight_values,
    combine_code,
    expert_list,
    expert_weights,
)
from ensemw2s.ops.mixture_log_probs import combined, expert_log_probs
from ensemw2s.ops.randomness import gumbel_noise

# A temperature below this is 0: float32 has no room for what log-probabilities become when they are divided by it.
COLDEST = 1e-30


class MixtureSample(NamedTuple):
    """What ``mixture_sample`` returns for a batch of B rows and T experts.

    Attributes:
        tokens: int64 ``[B]``; -1 in a row that is not valid.
        log_probs: float32 ``[B]``, the token's log-probability under the mixture before temperature and filters.
        expert_log_probs: float32 ``[T, B]``, the same under each expert alone.
        valid: bool ``[B]``; False where a positive-weight expert has NaN, +inf or no finite logit, or where the
            experts allow no common token (``"logprob"``). The row's log-probabilities are then NaN.
    """

    tokens: Tensor
    log_probs: Tensor
    expert_log_probs: Tensor
    valid: Tensor


def mixture_sample(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: Tensor,
    positions: Tensor,
    combine: str = "prob",
    impl: str | None = None,
) -> MixtureSample:
    """Draw one token per row from the combined distribution of T experts, without writing anything of size V.

    Equivalent to, with transformers' warpers and Gumbel noise keyed by (seed of the row, position, token)::

        scores = mixture_log_probs(logits, weights, combine) / temperature
        scores = top_k_warper(scores); scores = top_p_warper(scores); scores = min_p_warper(scores)
        tokens = argmax(scores + gumbel(seeds, positions))

    A row's draw depends on its logits, seed and position and on nothing else: not on the batch it is in, its place
    there, the number of threads, the instruction set or the backend. Greedy takes the lowest id among equals; top-k
    keeps all that tie with the k-th; top-p admits lowest ids first. Each filter leaves the likeliest token, and where
    rounding leaves the argmax nothing to choose from, that is the token.

    Args:
        logits: T tensors ``[B, V]`` (float32, bfloat16, float16 or float64) or one stacked ``[T, B, V]``.
        weights: ``[T]``, non-negative, not all zero; normalised inside.
        temperature: 0 is greedy, and so is anything below 1e-30.
        top_k: 0 is off.
        top_p: In (0, 1]; 1 is off.
        min_p: In [0, 1]; 0 is off.
        seeds: int64 ``[B]``, such as ``draw_seeds`` gives.
        positions: int64 ``[B]``, the index of the token to be drawn in its sequence; its low 32 bits count.
        combine: ``"prob"``, ``"logprob"`` or ``"vote"``, see ``mixture_log_probs``.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A ``MixtureSample``; nothing in it carries a gradient.

    Raises:
        ValueError: Shapes, devices, settings or the values of ``weights`` are wrong.
        TypeError: A dtype is wrong.
    """
    experts = [expert.detach() for expert in expert_list(logits)]
    first = experts[0]
    if first.dim() != 2:
        raise ValueError(f"logits must be T tensors [B, V] or one [T, B, V], got experts of shape {tuple(first.shape)}")
    weights = expert_weights(weights, len(experts), first).detach()
    settings = check_filters(temperature, top_k, top_p, min_p)
    check_integers(seeds, (first.shape[0],), first, "seeds", "ops.draw_seeds(B) makes them")
    check_integers(positions, (first.shape[0],), first, "positions")
    code = combine_code(combine)
    chosen = backend._choose("mixture_sample", impl, first.device.type, first.dtype)
    if chosen == "reference":
        check_weight_values(weights)
        return reference(experts, weights, *settings, seeds, positions, combine)
    inputs = (experts, weights, *settings, seeds, positions, code)
    return MixtureSample(*backend.run("mixture_sample", chosen, *inputs))


def reference(
    experts: Sequence[Tensor],
    weights: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    positions: Tensor,
    combine: str,
) -> MixtureSample:
    """Plain torch, any device; in float64 for float64 logits, else in float32."""
    own = expert_log_probs(experts)
    log_probs = combined(experts, own, weights, combine)
    valid = ~log_probs.isnan().any(dim=-1)
    if temperature < COLDEST:
        tokens = log_probs.argmax(dim=-1)
    else:
        scores = filtered_scores(log_probs, temperature, top_k, top_p, min_p)
        ids = torch.arange(log_probs.shape[-1], device=log_probs.device)
        noise = gumbel_noise(seeds[:, None], positions[:, None], ids)
        tokens = (scores + noise.to(scores.dtype)).argmax(dim=-1)
    picked = log_probs.gather(-1, tokens[:, None])[:, 0]
    each = own.gather(-1, tokens[None, :, None].expand(len(experts), -1, 1))[..., 0]
    return MixtureSample(
        torch.where(valid, tokens, -1),
        torch.where(valid, picked, torch.nan),
        torch.where(valid, each, torch.nan),
        valid,
    )


def filtered_scores(log_probs: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """``log_probs / temperature`` with -inf for every token that top-k, top-p or min-p removes, in that order.

    A constant is added to each row, so that the likeliest token has 0: it has a chance however low the temperature is.
    The filters look at the log-probabilities, whose order a very high temperature leaves no room for in the scores.
    """
    largest = log_probs.amax(dim=-1, keepdim=True)
    scores = ((log_probs - largest) / temperature).masked_fill(log_probs == -torch.inf, -torch.inf)
    if top_k > 0:
        kth = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1).values[..., -1:]
        scores = scores.masked_fill(log_probs < kth, -torch.inf)
    if top_p < 1:
        order = log_probs.masked_fill(scores == -torch.inf, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        probs = scores.gather(-1, order).softmax(dim=-1)
        removed = probs.cumsum(dim=-1) - probs >= top_p
        removed[..., 0] = False  # no float32 is as small as some top_p
        scores = scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    if min_p > 0:
        scores = scores.masked_fill(log_probs < largest + temperature * math.log(min_p), -torch.inf)
    return scores


def _fake(
    logits: list[Tensor],
    weights: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    positions: Tensor,
    combine: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = logits[0].shape[0]
    return (
        seeds.new_empty(batch),
        logits[0].new_empty(batch, dtype=torch.float32),
        logits[0].new_empty((len(logits), batch), dtype=torch.float32),
        logits[0].new_empty(batch, dtype=torch.bool),
    )


backend.declare(
    "mixture_sample",
    "(Tensor[] logits, Tensor weights, float temperature, int top_k, float top_p, float min_p, Tensor seeds, "
    "Tensor positions, int combine) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backend.implement_in_triton("mixture_sample")
