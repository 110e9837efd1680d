"""Triton kernel of ``mixture_log_probs``: the scan, the normalisers of each row, and one pass that writes."""

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
    anchor_product,
    log_prob,
    merge_tiles,
    scan,
    vote_of,
    votes_for,
)


def mixture_log_probs(logits: list[Tensor], weights: Tensor, combine: int) -> Tensor:
    """float32 ``[..., V]`` of T experts' logits ``[..., V]``; a row that is not valid is NaN."""
    out = torch.empty(logits[0].shape, dtype=torch.float32, device=weights.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(weights):
        scratch = scan(logits, weights, combine)
        rows, tiles = scratch.rows, scratch.tiles
        valid = torch.empty(rows.count, dtype=torch.bool, device=weights.device)
        shape = {"T": len(logits), "COMBINE": combine, "TILES": triton.next_power_of_2(tiles), "num_warps": WARPS}
        merge_kernel[(rows.count,)](
            *scratch.experts, *scratch.partials, scratch.group_max, valid, rows.count, rows.vocabulary, tiles,
            TILE=TILE, GROUP=GROUP, **shape,
        )  # fmt: skip
        write_kernel[(rows.count * tiles,)](
            *scratch.experts, *scratch.normalisers, scratch.tile_max, scratch.tile_first, valid, out,
            rows.count, rows.vocabulary, tiles, TILE=TILE, **shape,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    logits, outer, step, inner, weights, weight_step, tile_max, tile_sum, top, log_sum, shift, group_max, valid,
    rows, vocabulary, tiles,
    TILE: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Normalisers and validity of one row. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * weight_step
    merged = merge_tiles(row, weights, tile_max, tile_sum, top, log_sum, shift, rows, tiles, T, COMBINE, TILES)
    if COMBINE == LOGPROB:
        anchor_product(
            row, logits, outer, step, inner, weights, tile_max, top, group_max, rows, vocabulary, tiles,
            T, TILES, TILE, GROUP,
        )  # fmt: skip
    tl.store(valid + row, merged)


@triton.jit(do_not_specialize=SIZES)
def write_kernel(
    logits, outer, step, inner, weights, weight_step, top, log_sum, shift, tile_max, tile_first, valid, out,
    rows, vocabulary, tiles,
    T: tl.constexpr, COMBINE: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of one tile of one row. Grid: rows * tiles."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    weights += row * weight_step
    tokens = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    inside = tokens < vocabulary
    if COMBINE == VOTE:
        found = tl.full((TILE,), -float("inf"), tl.float32)
        for t in range(T):
            winner = vote_of(t, row, shift, tile_max, tile_first, top, rows, tiles, TILES)
            share = votes_for(winner, row, weights, shift, tile_max, tile_first, top, rows, tiles, T, TILES)
            found = tl.where(tokens == winner, share, found)
    else:
        found = log_prob(
            tokens, inside, row, logits, outer, step, inner, weights, top, log_sum, shift, rows, T, COMBINE
        )
    found = tl.where(tl.load(valid + row), found, float("nan"))
    tl.store(out + row * vocabulary + tokens, found, mask=inside)


# 128 tiles: a vocabulary of 262,144.
AHEAD_OF_TIME = [
    entry
    for combine in range(3)
    for entry in (
        ahead_of_time(merge_kernel, T=5, COMBINE=combine, TILES=128, TILE=TILE, GROUP=GROUP),
        ahead_of_time(write_kernel, T=5, COMBINE=combine, TILES=128, TILE=TILE),
    )
]
