"""``mixture_verify``: drafted tokens against a mixture, which of them hold and what comes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensemw2s.ops.checks import check_integers, expert_list, expert_weights, without_gradient
from ensemw2s.ops.mixture_sample import sample_rows
from ensemw2s.ops.sample_settings import sample_settings
from ensemw2s.ops.token_adjustments import TokenAdjustments


class MixtureVerification(NamedTuple):
    """What ``mixture_verify`` returns for a batch of B rows with k drafted tokens each.

    Attributes:
        accepted: int64 ``[B]``, how many of the drafted tokens hold, from the first on.
        tokens: int64 ``[B, k + 1]``, the accepted tokens and the next one; -1 behind it, and all through a row that is
            not valid.
        log_probs: float32 ``[B, k + 1]``, their log-probabilities under the mixture, before adjustments, mask,
            temperature and filters; NaN where there is no token.
        valid: bool ``[B]``, as ``MixtureSample.valid``, of all positions up to the next token.
    """

    accepted: Tensor
    tokens: Tensor
    log_probs: Tensor
    valid: Tensor


def mixture_verify(
    logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float],
    drafted: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    combine: str = "prob",
    adjustments: TokenAdjustments | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> MixtureVerification:
    """Verify k drafted tokens of every row in one launch: speculative decoding from a mixture, exact for any draft.

    Each position is drawn as ``mixture_sample`` draws it, by the row's seed and that position, from the logits behind
    the drafted tokens before it. Drafted tokens hold as long as they are what is drawn, and the first draw that
    differs is the next token. So the tokens are those that one call of ``mixture_sample`` after the other would have
    given, whatever was drafted: their distribution is the mixture's, and a draft decides the speed alone.

    A token that was drafted without chance (a lookup in the prompt) holds with the mixture's own probability of it,
    which is the most that is possible. A draft model should draw with ``mixture_sample`` and the same seeds and
    positions: equal noise makes it agree at least as often as ``(1 - D) / (1 + D)``, where D is the total variation
    between the two distributions (Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant
    speculative decoding").

    Args:
        logits: T tensors ``[B, k + 1, V]`` or one stacked ``[T, B, k + 1, V]``: at ``[:, i]`` those behind i drafted
            tokens. Dtypes and strides as for ``mixture_sample``.
        weights: ``[T]`` or ``[B, T]``, as for ``mixture_sample``.
        drafted: int64 ``[B, k]``; a negative id ends a shorter draft.
        seeds: int64 ``[B]``.
        positions: int64 ``[B]``, the index of the first drafted token in its sequence.
        temperature: As for ``mixture_sample``, like the other settings: a number or ``[B]``.
        top_k: A number or ``[B]``.
        top_p: A number or ``[B]``.
        min_p: A number or ``[B]``.
        combine: ``"prob"``, ``"logprob"`` or ``"vote"``.
        adjustments: Of ``B * (k + 1)`` rows, row ``b * (k + 1) + i`` for ``[b, i]``, since what was drafted counts.
        mask: int32 ``[B, k + 1, ceil(V / 32)]``.
        impl: Backend of ``mixture_sample``.

    Raises:
        ValueError: As ``mixture_sample``, or shapes that do not fit each other.
        TypeError: A dtype is wrong.
    """
    experts = expert_list(logits, detached=True)
    first = experts[0]
    if first.dim() != 3:
        raise ValueError(
            f"logits must be T tensors [B, k + 1, V] or one [T, B, k + 1, V], got experts of shape {tuple(first.shape)}"
        )
    batch, length, _ = first.shape
    like = first[:, 0]
    check_integers(drafted, (batch, length - 1), first, "drafted")
    check_integers(seeds, (batch,), first, "seeds", "ops.draw_seeds(B) makes them")
    check_integers(positions, (batch,), first, "positions")
    shares = without_gradient(expert_weights(weights, len(experts), like, per_row=True))
    settings = sample_settings(temperature, top_k, top_p, min_p, like)
    at = (positions[:, None] + torch.arange(length, device=first.device)).flatten()
    drawn = sample_rows(
        experts,
        shares if shares.dim() == 1 else shares.repeat_interleave(length, 0),
        settings.repeated(length),
        {"seeds": seeds.repeat_interleave(length), "positions": at},
        combine,
        0,
        adjustments,
        mask if not isinstance(mask, Tensor) or mask.dim() != 3 else mask.flatten(0, 1),
        impl,
    )
    return _verified(drafted, *(x.view(batch, length) for x in (drawn.tokens, drawn.log_probs, drawn.valid)))


def _verified(drafted: Tensor, tokens: Tensor, log_probs: Tensor, valid: Tensor) -> MixtureVerification:
    holds = (tokens[:, :-1] == drafted) & (drafted >= 0)
    accepted = holds.cumprod(1).sum(1)
    is_valid = valid.cumprod(1).gather(1, accepted[:, None]) > 0
    is_new = (torch.arange(tokens.shape[1], device=tokens.device) <= accepted[:, None]) & is_valid
    return MixtureVerification(
        accepted.where(is_valid[:, 0], 0),
        tokens.where(is_new, -1),
        log_probs.where(is_new, torch.nan),
        is_valid[:, 0],
    )
