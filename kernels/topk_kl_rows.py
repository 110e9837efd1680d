"""``topk_kl_rows`` on a GPU: KL from k kept tokens and "any other token", one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemw2s.kernels.rows import (
    LOWEST,
    MOST_WARPS,
    add_logits,
    as_rows,
    is_usable,
    launch,
    leave_row_out,
    load_logits,
    load_logits_again,
    merge_lanes,
    new_outputs,
    row_offset,
    store_gradient,
)
from ensemw2s.ops.token_adjustments import mask_of

_PER_THREAD = 8  # one 16-byte load of 16-bit logits, and no spills
_MOST_KEPT_AT_ONCE = 1024  # more kept tokens than this are gone through in blocks


def topk_kl_rows(
    student: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
    row_weights: Tensor,
    with_gradient: bool,
    gradient_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Weighted KL of rows over the teacher's k tokens and the rest, and the gradient of each in its logits.

    Args:
        student: float32, bfloat16 or float16 ``[..., V]``, last stride 1.
        token_ids: int64 ``[..., k]``, distinct within a row; where the row's weight is not 0, one outside ``[0, V)``
            makes the row NaN.
        log_probs: float32 ``[..., k]``, the teacher's.
        row_weights: float32 ``[...]``; rows of weight 0 are not read.
        with_gradient: Whether the gradient is needed.
        gradient_dtype: What it is rounded to as it is written.

    Returns:
        float32 ``[...]`` and the gradient ``[..., V]`` (``[0]`` if it is not needed).
    """
    losses, gradient = new_outputs(student, with_gradient, gradient_dtype)
    if losses.numel():
        rows = as_rows(student)
        k, vocabulary = token_ids.shape[-1], rows.shape[2]
        token_ids = token_ids.contiguous()
        kept = token_ids.view(-1, k)
        # A bit for each token: the pass over the row sees which are kept without a look at the list.
        is_kept = mask_of(kept, (kept >= 0) & (kept < vocabulary), vocabulary)
        inputs = (rows, token_ids, is_kept, log_probs.contiguous(), row_weights.contiguous())
        shape = (k, vocabulary, rows.shape[1], rows.stride(0), rows.stride(1))
        constants = {"KEPT": min(_MOST_KEPT_AT_ONCE, triton.next_power_of_2(k)), "WITH_GRADIENT": with_gradient}
        launch(_rows_kernel, (_PER_THREAD, MOST_WARPS), *inputs, losses, gradient, *shape, **constants)
    return losses, gradient


@triton.jit(do_not_specialize=["k", "inner"])
def _rows_kernel(
    student,
    token_ids,
    is_kept,
    log_probs,
    row_weights,
    losses,
    gradient,
    k,
    V,
    inner,
    outer_stride,
    inner_stride,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(row_weights + row)
    gradient += row * V
    if weight == 0:
        leave_row_out(losses + row, gradient, V, BLOCK, WITH_GRADIENT)
    else:
        student += row_offset(row, inner, outer_stride, inner_stride)
        token_ids += row * k
        is_kept += row * tl.cdiv(V, 32)
        log_probs += row * k
        _row(student, token_ids, is_kept, log_probs, weight, losses + row, gradient, k, V, BLOCK, KEPT, WITH_GRADIENT)


@triton.jit
def _row(
    student,
    token_ids,
    is_kept,
    log_probs,
    weight,
    loss,
    gradient,
    k,
    V,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """Teacher mass ``p_1 .. p_k`` and the rest ``r``, student mass ``q_1 .. q_k`` and the rest ``R``."""
    rest_top, rest_total = _log_sum_exp_of_rest(student, is_kept, V, BLOCK)
    kept_top, kept_total, mass, known = _scan_kept(student, token_ids, log_probs, k, V, KEPT)
    top = tl.maximum(rest_top, kept_top)
    rest_share = rest_total * tl.exp(rest_top - top)
    total = rest_share + kept_total * tl.exp(kept_top - top)
    log_total = tl.log(total)
    weight = tl.where(known & is_usable(total), weight, float("nan"))
    # Without another token of finite logit there is no rest to compare.
    r = 1.0 - mass
    r = tl.where((rest_total > 0) & (r > 0), r, 0.0)
    mass += r
    log_rest = (rest_top - top) + tl.log(rest_total) - log_total
    terms = _kept_terms(student, token_ids, log_probs, top, log_total, k, V, KEPT)
    tl.store(loss, weight * (terms + tl.where(r > 0, r * (tl.log(r) - log_rest), 0.0)))
    if WITH_GRADIENT:
        # mass q_v - r q_v / R = exp(z_v - rest_top) * on_rest, which divides by no R that may have vanished.
        on_rest = mass * tl.exp(rest_top - top) / total - tl.where(r > 0, r / rest_total, 0.0)
        _write_rest(student, rest_top, weight * on_rest, gradient, V, BLOCK)
        # Other threads wrote something in the places of the kept tokens.
        tl.debug_barrier()
        _write_kept(student, token_ids, log_probs, top, log_total, mass, weight, gradient, k, V, KEPT)


@triton.jit
def _log_sum_exp_of_rest(student, is_kept, V, BLOCK: tl.constexpr):
    """``rows.log_sum_exp`` without the kept tokens: taken off afterwards, they would cost a small rest its digits."""
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(student, columns, V)
        words = tl.load(is_kept + columns // 32, mask=columns < V, other=0)
        z = tl.where((words >> (columns % 32)) & 1 != 0, -float("inf"), z)
        top, total = add_logits(z, top, total)
    return merge_lanes(top, total)


@triton.jit
def _load_kept(student, token_ids, log_probs, first, k, V, KEPT: tl.constexpr):
    """Tokens, whether they are tokens, their logits (else -inf), the teacher's log-probabilities, and the mask."""
    places = first + tl.arange(0, KEPT)
    mask = places < k
    tokens = tl.load(token_ids + places, mask=mask, other=0)
    known = (tokens >= 0) & (tokens < V)
    z = tl.load(student + tokens, mask=mask & known, other=-float("inf")).to(tl.float32)
    return tokens, known, z, tl.load(log_probs + places, mask=mask, other=-float("inf")), mask


@triton.jit
def _scan_kept(student, token_ids, log_probs, k, V, KEPT: tl.constexpr):
    """Log-sum-exp of the student over the kept tokens, the teacher's mass beside them, and whether all are tokens."""
    tops = tl.full([KEPT], LOWEST, tl.float32)
    totals = tl.zeros([KEPT], tl.float32)
    p = tl.zeros([KEPT], tl.float32)
    unknown = tl.zeros([KEPT], tl.int32)
    for first in range(0, k, KEPT):
        _, known, z, log_p, _ = _load_kept(student, token_ids, log_probs, first, k, V, KEPT)
        tops, totals = add_logits(z, tops, totals)
        p += tl.exp(log_p)
        unknown = tl.where(known, unknown, 1)
    top, total = merge_lanes(tops, totals)
    return top, total, tl.sum(p, 0), tl.max(unknown, 0) == 0


@triton.jit
def _kept_terms(student, token_ids, log_probs, top, log_total, k, V, KEPT: tl.constexpr):
    """The kept tokens' ``sum p (log p - log q)``."""
    terms = tl.zeros([KEPT], tl.float32)
    for first in range(0, k, KEPT):
        _, _, z, log_p, _ = _load_kept(student, token_ids, log_probs, first, k, V, KEPT)
        p = tl.exp(log_p)
        terms += tl.where(p == 0, 0.0, p * (log_p - ((z - top) - log_total)))
    return tl.sum(terms, 0)


@triton.jit
def _write_rest(student, rest_top, scale, gradient, V, BLOCK: tl.constexpr):
    # Backwards, because what was read last is likeliest to be in the cache still.
    last = (V - 1) // BLOCK * BLOCK
    for back in range(0, V, BLOCK):
        columns = last - back + tl.arange(0, BLOCK)
        z = load_logits_again(student, columns, V)
        store_gradient(gradient, columns, V, tl.exp(z - rest_top) * scale)


@triton.jit
def _write_kept(student, token_ids, log_probs, top, log_total, mass, weight, gradient, k, V, KEPT: tl.constexpr):
    for first in range(0, k, KEPT):
        tokens, known, z, log_p, mask = _load_kept(student, token_ids, log_probs, first, k, V, KEPT)
        tl.store(gradient + tokens, weight * (mass * tl.exp((z - top) - log_total) - tl.exp(log_p)), mask=mask & known)


AHEAD_OF_TIME = [
    (
        _rows_kernel,
        {
            "student": "*bf16",
            "token_ids": "*i64",
            "is_kept": "*i32",
            "log_probs": "*fp32",
            "row_weights": "*fp32",
            "losses": "*fp32",
            "gradient": gradient,
            "k": "i32",
            "V": "i32",
            "inner": "i32",
            "outer_stride": "i64",
            "inner_stride": "i32",
            "BLOCK": "constexpr",
            "KEPT": "constexpr",
            "WITH_GRADIENT": "constexpr",
        },
        {"BLOCK": 32 * MOST_WARPS * _PER_THREAD, "KEPT": kept, "WITH_GRADIENT": with_gradient},
        MOST_WARPS,
    )
    for kept, gradient, with_gradient in (
        (64, "*fp32", True),
        (64, "*bf16", True),
        (64, "*fp32", False),
        (1024, "*fp32", True),
    )
]
