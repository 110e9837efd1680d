"""Triton kernels of ``token_scores``: one read of the logits by tiles, then one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemw2s.kernels.mixture import (
    LOWEST,
    MASKED,
    SIZES,
    WARPS,
    ahead_of_time,
    first_argmax,
    row_offset,
    rows_of,
    unmasked,
)

# Many rows are scored at once, so that a row need not occupy many multiprocessors; the threads' results are merged less
# often. 23 instructions a logit instead of 45.
SCORE_TILE = 8192
SCORE_WARPS = 8


def empty_scores(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten log-probabilities (float32), correctness (bool) and entropies (float32) of the labels' shape."""
    dtypes = (torch.float32, torch.bool, torch.float32)
    return tuple(torch.empty(labels.shape, dtype=dtype, device=labels.device) for dtype in dtypes)


def token_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of int64 labels ``[...]`` under logits ``[..., V]``, see ``empty_scores``."""
    scores = empty_scores(labels)
    if labels.numel() == 0:
        return scores
    rows = rows_of([logits])
    experts = (rows.tensors, rows.outer, rows.step, rows.inner)
    tiles = triton.cdiv(rows.vocabulary, SCORE_TILE)
    partials = [torch.empty((rows.count, tiles), dtype=torch.float32, device=labels.device) for _ in range(3)]
    tile_first = torch.empty((rows.count, tiles), dtype=torch.int32, device=labels.device)
    with torch.cuda.device_of(labels):
        scan_kernel[(rows.count * tiles,)](
            *experts, labels, *partials, tile_first, rows.vocabulary, tiles, TILE=SCORE_TILE, num_warps=SCORE_WARPS
        )
        score_kernel[(rows.count,)](
            *experts, labels, *partials, tile_first, *scores, rows.vocabulary, tiles,
            TILES=triton.next_power_of_2(tiles), num_warps=WARPS,
        )  # fmt: skip
    return scores


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    logits, outer, step, inner, labels, tile_max, tile_sum, tile_moment, tile_first, vocabulary, tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """Maximum, its first token, ``sum exp(d)`` and ``sum d exp(d)`` with ``d = logit - maximum`` of one tile.

    Grid: rows * tiles.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    tokens = tile * TILE + tl.arange(0, TILE)
    inside = tokens < unmasked(tl.load(labels + row), vocabulary)
    start = logits[0] + row_offset(row, outer[0], step[0], inner)
    z = tl.load(start + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    top, first = first_argmax(z, tokens)
    top = tl.maximum(top, LOWEST)
    # Finite, so that its product with a share of 0 is 0.
    d = tl.maximum(z - top, -1e30)
    at = row * tiles + tile
    tl.store(tile_max + at, top)
    share = tl.exp(z - top)
    tl.store(tile_sum + at, tl.sum(share, axis=0))
    tl.store(tile_moment + at, tl.sum(d * share, axis=0))
    tl.store(tile_first + at, first)


@triton.jit
def write_scores(row, label, log_prob, correct, entropy, usable, vocabulary, out_log_probs, out_correct, out_entropy):
    """One row's results: 0, False and 0 for a masked label, NaN where the row or the label is not usable."""
    read = label != MASKED
    known = (label >= 0) & (label < vocabulary)
    tl.store(out_log_probs + row, tl.where(read, tl.where(usable & known, log_prob, float("nan")), 0.0))
    tl.store(out_correct + row, read & usable & correct)
    tl.store(out_entropy + row, tl.where(read, tl.where(usable & known, entropy, float("nan")), 0.0))


@triton.jit(do_not_specialize=SIZES)
def score_kernel(
    logits, outer, step, inner, labels, tile_max, tile_sum, tile_moment, tile_first,
    out_log_probs, out_correct, out_entropy, vocabulary, tiles, TILES: tl.constexpr,
):  # fmt: skip
    """Scores of one row out of its tiles. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    at = row * tiles + tile
    largest = tl.load(tile_max + at, mask=inside, other=LOWEST)
    sums = tl.load(tile_sum + at, mask=inside, other=0.0)
    moments = tl.load(tile_moment + at, mask=inside, other=0.0)
    firsts = tl.load(tile_first + at, mask=inside, other=2147483647)
    top, first = first_argmax(largest, firsts)
    fall = tl.maximum(largest - top, -1e30)
    total = tl.sum(sums * tl.exp(fall), axis=0)
    moment = tl.sum((moments + sums * fall) * tl.exp(fall), axis=0)
    usable = (total > 0) & (total < float("inf"))
    start = logits[0] + row_offset(row, outer[0], step[0], inner)
    z = tl.load(start + label, mask=(label >= 0) & (label < vocabulary), other=0.0).to(tl.float32)
    log_prob = (z - top) - tl.log(total)
    entropy = tl.log(total) - moment / total
    write_scores(
        row, label, log_prob, first == label, entropy, usable, vocabulary, out_log_probs, out_correct, out_entropy
    )


AHEAD_OF_TIME = [
    ahead_of_time(scan_kernel, num_warps=SCORE_WARPS, TILE=SCORE_TILE),
    ahead_of_time(score_kernel, TILES=128),
]
