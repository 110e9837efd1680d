"""``mixture_sample``: the next token of every row, drawn from a weighted mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
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
from ensemw2s.ops.expert_first import of_drawn_experts, refuse_beside_expert_first
from ensemw2s.ops.mixture_log_probs import combined, expert_log_probs
from ensemw2s.ops.randomness import gumbel_noise
from ensemw2s.ops.sample_settings import SampleSettings, check_top_logprobs, sample_settings
from ensemw2s.ops.token_adjustments import (
    TokenAdjustments,
    adjusted,
    check_adjustments,
    check_listed_tokens,
    check_mask,
    unpack_mask,
)

# A temperature below this is 0: float32 has no room for what log-probabilities become when they are divided by it.
COLDEST = 1e-30


class MixtureSample(NamedTuple):
    """What ``mixture_sample`` returns for a batch of B rows and T experts.

    Attributes:
        tokens: int64 ``[B]``; -1 in a row that is not valid.
        log_probs: float32 ``[B]``, the token's log-probability under the mixture, before adjustments, mask,
            temperature and filters.
        expert_log_probs: float32 ``[T, B]``, the same under each expert alone; NaN for an expert that has weight 0 in
            the row, since it is not read.
        valid: bool ``[B]``; False where a positive-weight expert has NaN, +inf or no finite logit, or where the
            experts allow no common token (``"logprob"``), or the mask none that is possible. The row's
            log-probabilities are then NaN.
        top_tokens: int64 ``[B, n]``, the n likeliest tokens of the mixture, before adjustments, mask, temperature and
            filters, the likeliest first, of equals the lowest id; -1 where fewer are possible, and in a row that is not
            valid.
        top_log_probs: float32 ``[B, n]``, their log-probabilities, falling; -inf where fewer are possible, and NaN in
            a row that is not valid.
    """

    tokens: Tensor
    log_probs: Tensor
    expert_log_probs: Tensor
    valid: Tensor
    top_tokens: Tensor
    top_log_probs: Tensor


def mixture_sample(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float],
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    combine: str = "prob",
    top_logprobs: int = 0,
    adjustments: TokenAdjustments | None = None,
    mask: Tensor | None = None,
    sample: str = "mixture",
    impl: str | None = None,
) -> MixtureSample:
    """Draw one token per row from the combined distribution of T experts, which is written down nowhere.

    Equivalent to, with transformers' warpers and Gumbel noise keyed by (seed of the row, position, token)::

        scores = mixture_log_probs(logits, weights, combine)
        scores = adjusted(scores, adjustments); scores[~mask] = -inf
        scores = scores / temperature
        scores = top_k_warper(scores); scores = top_p_warper(scores); scores = min_p_warper(scores)
        tokens = argmax(scores + gumbel(seeds, positions))

    A row's draw depends on its logits, settings, weights, seed and position and on nothing else: not on the batch it is
    in, the other rows' settings, its place there, the number of threads, the instruction set or the backend. Greedy
    takes the lowest id among equals; top-k keeps all that tie with the k-th; top-p admits lowest ids first. Each filter
    leaves the likeliest token, and where rounding leaves the argmax nothing to choose from, that is the token.

    ``temperature``, ``top_k``, ``top_p`` and ``min_p`` are each one number for all rows or a tensor ``[B]`` on the
    logits' device. Values inside tensors are looked at on the CPU; on a GPU, which nothing waits for, a row with a
    value out of its range, or with a negative weight, is not valid.

    Args:
        logits: T tensors ``[B, V]`` (float32, bfloat16, float16 or float64) or one stacked ``[T, B, V]``.
        weights: Non-negative; normalised inside. ``[T]``, not all zero, or a tensor ``[B, T]`` of each row's, where a
            row of zeros is not valid. An expert that has weight 0 in a row is not read there.
        temperature: 0 is greedy, and so is anything below 1e-30. A tensor is float32 or float64.
        top_k: 0 is off. A tensor is int32 or int64.
        top_p: In (0, 1]; 1 is off. A tensor is float32 or float64.
        min_p: In [0, 1]; 0 is off. A tensor is float32 or float64.
        seeds: int64 ``[B]``, such as ``draw_seeds`` gives; only ``temperature=0`` for all rows does without.
        positions: int64 ``[B]``, the index of the token to be drawn in its sequence; its low 32 bits count. Goes
            with ``seeds``.
        combine: ``"prob"``, ``"logprob"`` or ``"vote"``, see ``mixture_log_probs``.
        top_logprobs: How many of the likeliest tokens to return, at most 64 and at most V; 0 is off.
        adjustments: Biases and penalties of single tokens, from ``token_adjustments``.
        mask: int32 ``[B, ceil(V / 32)]``, as grammar libraries fill it: token v may be drawn if bit ``v % 32`` of word
            ``v // 32`` is 1. ``pack_mask`` makes one of a bool ``[B, V]``.
        sample: ``"mixture"``, or ``"expert_first"``, which draws an expert by its weight (``draw_experts``) and the
            token from that expert alone: the same distribution, where temperature is 1 and nothing else is asked for.
            Only the drawn expert is read; log-probabilities are its own, and NaN for the others.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A ``MixtureSample``; nothing in it carries a gradient.

    Raises:
        ValueError: Shapes, devices, settings or the values of ``weights`` are wrong; of a tensor the message names the
            row.
        TypeError: A dtype is wrong.
    """
    experts = expert_list(logits, detached=True)
    first = experts[0]
    if first.dim() != 2:
        raise ValueError(f"logits must be T tensors [B, V] or one [T, B, V], got experts of shape {tuple(first.shape)}")
    batch, vocabulary = first.shape
    weights = without_gradient(expert_weights(weights, len(experts), first, per_row=True))
    settings = sample_settings(temperature, top_k, top_p, min_p, first)
    if seeds is None and positions is None and is_greedy(settings.temperature):
        seeds = positions = torch.zeros(batch, dtype=torch.int64, device=first.device)
    keys = {
        "seeds": check_integers(seeds, (batch,), first, "seeds", "ops.draw_seeds(B) makes them"),
        "positions": check_integers(positions, (batch,), first, "positions", "the index of each token to be drawn"),
    }
    count = check_top_logprobs(top_logprobs, vocabulary)
    if sample != "mixture":
        refuse_beside_expert_first(sample, combine, settings, count, adjustments, mask)
        weights = of_drawn_experts(weights, **keys)
    return sample_rows(experts, weights, settings, keys, combine, count, adjustments, mask, impl)


def sample_rows(
    experts: list[Tensor],
    weights: Tensor,
    settings: SampleSettings,
    keys: Mapping[str, Tensor],
    combine: str,
    top_logprobs: int,
    adjustments: TokenAdjustments | None,
    mask: Tensor | None,
    impl: str | None,
) -> MixtureSample:
    """``mixture_sample`` of checked arguments, for experts ``[..., V]`` whose leading axes are the rows, in order."""
    first, code = experts[0], combine_code(combine)
    rows = first.shape[:-1].numel()
    mask = check_mask(mask, rows, first)
    changes = check_adjustments(adjustments, rows, first)
    chosen = backend.choose_for_mixture("mixture_sample", impl, experts)
    if chosen == "reference":
        check_weight_values(weights)
        settings.check_values()
        check_listed_tokens(adjustments, first.shape[-1])
        flat = [expert.reshape(rows, expert.shape[-1]) for expert in experts]
        return reference(
            flat,
            weights,
            settings,
            **keys,
            combine=combine,
            top_logprobs=top_logprobs,
            adjustments=adjustments,
            mask=mask,
        )
    inputs = (experts, weights, *settings.arguments(), *keys.values(), code, top_logprobs, *changes, mask)
    return MixtureSample(*backend.run("mixture_sample", chosen, *inputs))


def reference(
    experts: Sequence[Tensor],
    weights: Tensor,
    settings: SampleSettings,
    seeds: Tensor,
    positions: Tensor,
    combine: str,
    top_logprobs: int,
    adjustments: TokenAdjustments | None = None,
    mask: Tensor | None = None,
) -> MixtureSample:
    """Plain torch, any device; in float64 for float64 logits, else in float32."""
    own = expert_log_probs(experts)
    log_probs = combined(experts, own, weights, combine)
    valid = ~log_probs.isnan().any(dim=-1) & settings.usable()
    offered = log_probs
    if adjustments is not None:
        offered, is_usable = adjusted(log_probs, adjustments)
        valid = valid & is_usable
    if mask is not None:
        offered = offered.masked_fill(~unpack_mask(mask, offered.shape[-1]), -torch.inf)
    valid = valid & (offered > -torch.inf).any(dim=-1)
    tokens = _draw(offered, settings, seeds, positions)
    picked = log_probs.gather(-1, tokens[:, None])[:, 0]
    each = own.gather(-1, tokens[None, :, None].expand(len(experts), -1, 1))[..., 0]
    is_read = weights.T != 0 if weights.dim() > 1 else weights[:, None] != 0
    return MixtureSample(
        torch.where(valid, tokens, -1),
        torch.where(valid, picked, torch.nan),
        torch.where(valid & is_read, each, torch.nan),
        valid,
        *likeliest(log_probs, valid, top_logprobs),
    )


def is_greedy(temperature: float | Tensor) -> bool:
    """Whether one temperature for all rows leaves nothing to be drawn."""
    return not isinstance(temperature, Tensor) and temperature < COLDEST


def _draw(log_probs: Tensor, settings: SampleSettings, seeds: Tensor, positions: Tensor) -> Tensor:
    temperature = settings.temperature
    if is_greedy(temperature):
        return log_probs.argmax(dim=-1)
    ids = torch.arange(log_probs.shape[-1], device=log_probs.device)
    noise = gumbel_noise(seeds[:, None], positions[:, None], ids)
    scores = filtered_scores(log_probs, *settings)
    drawn = (scores + noise.to(scores.dtype)).argmax(dim=-1)
    if not isinstance(temperature, Tensor):
        return drawn
    return torch.where(temperature < COLDEST, log_probs.argmax(dim=-1), drawn)


def likeliest(log_probs: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens ``[B, count]`` and their log-probabilities, see ``MixtureSample``."""
    if not count:
        return torch.empty_like(log_probs[:, :0], dtype=torch.int64), log_probs[:, :0]
    # torch.topk says nothing of the order of equals.
    ordered, tokens = (each[:, :count] for each in log_probs.sort(dim=-1, descending=True, stable=True))
    tokens = tokens.masked_fill((ordered == -torch.inf) | ~valid[:, None], -1)
    return tokens, ordered.masked_fill(~valid[:, None], torch.nan)


def filtered_scores(
    log_probs: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
) -> Tensor:
    """``log_probs / temperature`` with -inf for every token that top-k, top-p or min-p removes, in that order.

    A constant is added to each row, so that the likeliest token has 0: it has a chance however low the temperature is.
    The filters look at the log-probabilities, whose order a very high temperature leaves no room for in the scores.
    """
    vocabulary = log_probs.shape[-1]
    largest = log_probs.amax(dim=-1, keepdim=True)
    divisor = _column(temperature, log_probs.dtype).clamp(min=COLDEST)
    scores = ((log_probs - largest) / divisor).masked_fill(log_probs == -torch.inf, -torch.inf)
    if isinstance(top_k, Tensor) or top_k > 0:
        kept = _column(top_k, torch.int64).expand(len(log_probs), 1)
        kept = torch.where((kept <= 0) | (kept > vocabulary), vocabulary, kept)
        kth = log_probs.sort(dim=-1, descending=True).values.gather(-1, kept - 1)
        scores = scores.masked_fill(log_probs < kth, -torch.inf)
    if isinstance(top_p, Tensor) or top_p < 1:
        order = log_probs.masked_fill(scores == -torch.inf, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        probs = scores.gather(-1, order).softmax(dim=-1)
        limit = _column(top_p, torch.float64)
        removed = (probs.cumsum(dim=-1) - probs >= limit.to(probs.dtype)) & (limit < 1)
        removed[..., 0] = False  # no float32 is as small as some top_p
        scores = scores.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    if isinstance(min_p, Tensor) or min_p > 0:
        fall = _column(temperature, torch.float64) * _column(min_p, torch.float64).log()
        scores = scores.masked_fill(log_probs < largest + fall.to(log_probs.dtype), -torch.inf)
    return scores


def _column(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A setting as ``[B, 1]`` or ``[1, 1]``, beside log-probabilities ``[B, V]``."""
    return torch.as_tensor(value, dtype=dtype).reshape(-1, 1)


def _fake(
    logits: list[Tensor],
    weights: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    temperatures: Tensor | None,
    top_ks: Tensor | None,
    top_ps: Tensor | None,
    min_ps: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    combine: int,
    top_logprobs: int,
    adjusted_tokens: Tensor | None,
    adjusted_values: Tensor | None,
    adjusted_bits: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    batch = logits[0].shape[:-1].numel()
    return (
        seeds.new_empty(batch),
        logits[0].new_empty(batch, dtype=torch.float32),
        logits[0].new_empty((len(logits), batch), dtype=torch.float32),
        logits[0].new_empty(batch, dtype=torch.bool),
        seeds.new_empty((batch, top_logprobs)),
        logits[0].new_empty((batch, top_logprobs), dtype=torch.float32),
    )


# A tensor of rows' settings takes the place of the number that bears its name.
backend.declare(
    "mixture_sample",
    "(Tensor[] logits, Tensor weights, float temperature, int top_k, float top_p, float min_p, "
    "Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor seeds, Tensor positions, "
    "int combine, int top_logprobs, Tensor? adjusted_tokens, Tensor? adjusted_values, Tensor? adjusted_bits, "
    "Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
backend.implement_in_triton("mixture_sample")
