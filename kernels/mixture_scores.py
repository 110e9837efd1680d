"""Triton kernels of ``mixture_scores``: the scan, the normalisers of each row, a pass for entropy and argmax.

The entropy of a mixture needs the normalisers, so the logits are read twice; of votes, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemw2s.kernels.mixture import (
    GROUP,
    LOGPROB,
    SIZES,
    TILE,
    VOTE,
    WARPS,
    ahead_of_time,
    first_argmax,
    log_prob,
    scan,
    unmasked,
    vote_of,
    votes_for,
    weight_total,
)
from ensemw2s.kernels.mixture_log_probs import merge_kernel
from ensemw2s.kernels.token_scores import empty_scores, write_scores


def mixture_scores(
    logits: list[Tensor], weights: Tensor, labels: Tensor, combine: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of int64 labels ``[...]`` under the mixture of T experts ``[..., V]``, see ``empty_scores``."""
    scores = empty_scores(labels)
    if labels.numel() == 0:
        return scores
    with torch.cuda.device_of(labels):
        scratch = scan(logits, weights, combine, labels)
        rows, tiles = scratch.rows, scratch.tiles
        valid = torch.empty(rows.count, dtype=torch.bool, device=labels.device)
        tile_entropy, score = torch.empty((2, rows.count, tiles), dtype=torch.float32, device=labels.device)
        token = torch.empty((rows.count, tiles), dtype=torch.int32, device=labels.device)
        found = (tile_entropy, score, token)
        shape = {"T": len(logits), "COMBINE": combine, "TILES": triton.next_power_of_2(tiles), "num_warps": WARPS}
        merge_kernel[(rows.count,)](
            *scratch.experts, *scratch.partials, scratch.group_max, valid, rows.count, rows.vocabulary, tiles,
            TILE=TILE, GROUP=GROUP, **shape,
        )  # fmt: skip
        inputs = (*scratch.experts, *scratch.normalisers, labels)
        if combine != VOTE.value:
            entropy_kernel[(rows.count * tiles,)](
                *inputs, *found, rows.count, rows.vocabulary, tiles,
                T=len(logits), COMBINE=combine, TILE=TILE, num_warps=WARPS,
            )  # fmt: skip
        score_kernel[(rows.count,)](
            *inputs, scratch.tile_max, scratch.tile_first, valid, *found, *scores,
            rows.count, rows.vocabulary, tiles, **shape,
        )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=SIZES)
def entropy_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, labels, tile_entropy, score, token,
    rows, vocabulary, tiles, T: tl.constexpr, COMBINE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Entropy, largest log-probability and its token of one tile of one row. Grid: rows * tiles."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    weights += row * weight_step
    tokens = tile * TILE + tl.arange(0, TILE)
    inside = tokens < unmasked(tl.load(labels + row), vocabulary)
    found = log_prob(tokens, inside, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE)
    # Finite, so that its product with a probability of 0 is 0.
    finite = tl.maximum(found, -1e30)
    best, winner = first_argmax(found, tokens)
    at = row * tiles + tile
    tl.store(tile_entropy + at, -tl.sum(finite * tl.exp(finite), axis=0))
    tl.store(score + at, best)
    tl.store(token + at, winner)


@triton.jit
def score_votes(
    row, label, weights, shift, tile_max, tile_first, top, rows, tiles, T: tl.constexpr, TILES: tl.constexpr
):
    """Log-probability of the label, the token with most votes (of equals, the lowest), entropy."""
    largest, total, _ = weight_total(weights, T)
    entropy, best, most_voted = 0.0, -float("inf"), 2147483647
    for t in range(T):
        winner = vote_of(t, row, shift, tile_max, tile_first, top, rows, tiles, TILES)
        share = votes_for(winner, row, weights, shift, tile_max, tile_first, top, rows, tiles, T, TILES)
        if winner >= 0:
            entropy -= tl.load(weights + t) / largest / total * share
            better = (share > best) | ((share == best) & (winner < most_voted))
            most_voted = tl.where(better, winner, most_voted)
            best = tl.maximum(best, share)
    return votes_for(label, row, weights, shift, tile_max, tile_first, top, rows, tiles, T, TILES), most_voted, entropy


@triton.jit(do_not_specialize=SIZES)
def score_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, labels, tile_max, tile_first, valid,
    tile_entropy, score, token, out_log_probs, out_correct, out_entropy, rows, vocabulary, tiles,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Scores of one row. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * weight_step
    label = tl.load(labels + row)
    if COMBINE == VOTE:
        picked, argmax, entropy = score_votes(
            row, label, weights, shift, tile_max, tile_first, top, rows, tiles, T, TILES
        )
    else:
        one = tl.zeros((1,), tl.int64) + label
        found = log_prob(
            one,
            (one >= 0) & (one < vocabulary),
            row,
            logits,
            outer,
            step,
            inner,
            weights,
            top,
            log_sum,
            shift,
            rows,
            T,
            COMBINE,
        )
        picked = tl.max(found, axis=0)
        tile = tl.arange(0, TILES)
        inside = tile < tiles
        at = row * tiles + tile
        _, argmax = first_argmax(
            tl.load(score + at, mask=inside, other=-float("inf")), tl.load(token + at, mask=inside, other=2147483647)
        )
        entropy = tl.sum(tl.load(tile_entropy + at, mask=inside, other=0.0), axis=0)
    usable = tl.load(valid + row)
    write_scores(
        row, label, picked, argmax == label, entropy, usable, vocabulary, out_log_probs, out_correct, out_entropy
    )


AHEAD_OF_TIME = [
    *(ahead_of_time(entropy_kernel, T=5, COMBINE=combine, TILE=TILE) for combine in (0, LOGPROB.value)),
    *(ahead_of_time(score_kernel, T=5, COMBINE=combine, TILES=128) for combine in range(3)),
]
