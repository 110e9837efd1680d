"""``mixture_kl`` on a GPU: one program per row finds every model's normaliser, then reads all of them once more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensemw2s.kernels.rows import (
    MOST_WARPS,
    as_rows,
    is_usable,
    launch,
    leave_row_out,
    load_logits_again,
    log_sum_exp,
    new_outputs,
    row_offset,
    store_gradient,
)


def _work(num_experts: int) -> tuple[int, int]:
    """Logits per thread and warps: one 16-byte load of each model, fewer of both where registers would spill."""
    return (8, MOST_WARPS) if num_experts <= 8 else (4, 8)


def mixture_kl(
    student: Tensor,
    experts: list[Tensor],
    weights: Tensor,
    row_weights: Tensor,
    with_gradient: bool,
    gradient_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Weighted ``KL(mixture || student)`` of rows, and the gradient of each in the student's logits.

    Args:
        student: float32, bfloat16 or float16 ``[..., V]``, last stride 1.
        experts: T tensors like it, each with strides of its own.
        weights: float32 ``[T]``, normalised inside; a negative one, NaN or a sum that is 0 or infinite make all rows
            NaN. An expert of weight 0 is not read.
        row_weights: float32 ``[...]``; rows of weight 0 are not read.
        with_gradient: Whether the gradient is needed.
        gradient_dtype: What it is rounded to as it is written.

    Returns:
        float32 ``[...]`` and the gradient ``[..., V]`` (``[0]`` if it is not needed).
    """
    losses, gradient = new_outputs(student, with_gradient, gradient_dtype)
    if losses.numel():
        rows = as_rows(student)
        teachers = tuple(as_rows(expert) for expert in experts)
        inputs = (rows, teachers, weights.contiguous(), row_weights.contiguous())
        strides = [tuple(model.stride(axis) for model in (rows, *teachers)) for axis in (0, 1)]
        shape = (rows.shape[2], rows.shape[1], *strides)
        launch(_rows_kernel, _work(len(experts)), *inputs, losses, gradient, *shape, WITH_GRADIENT=with_gradient)
    return losses, gradient


@triton.jit(do_not_specialize=["inner"])
def _rows_kernel(
    student,
    experts,
    weights,
    row_weights,
    losses,
    gradient,
    V,
    inner,
    outer_strides,
    inner_strides,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    """``outer_strides`` and ``inner_strides`` begin with the student's, then come the experts'."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(row_weights + row)
    gradient += row * V
    if weight == 0:
        leave_row_out(losses + row, gradient, V, BLOCK, WITH_GRADIENT)
    else:
        student += row_offset(row, inner, outer_strides[0], inner_strides[0])
        rows = ()
        for t in tl.static_range(len(experts)):
            rows += (experts[t] + row_offset(row, inner, outer_strides[t + 1], inner_strides[t + 1]),)
        _row(student, rows, weights, weight, losses + row, gradient, V, BLOCK, WITH_GRADIENT)


@triton.jit
def _row(student, experts, weights, weight, loss, gradient, V, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr):
    """With ``p`` the mixture's and ``q`` the student's probabilities: ``sum p (log p - log q)`` and ``q - p``."""
    tops, scales, usable = _expert_scales(experts, weights, V, BLOCK)
    # The student comes second, so that what the next pass begins with was read last.
    top, total = log_sum_exp(student, V, BLOCK)
    weight = tl.where(usable & is_usable(total), weight, float("nan"))
    log_total = tl.log(total)
    terms = tl.zeros([BLOCK], tl.float32)
    # Backwards, because what was read last is likeliest to be in the cache still.
    last = (V - 1) // BLOCK * BLOCK
    for back in range(0, V, BLOCK):
        columns = last - back + tl.arange(0, BLOCK)
        log_q = (load_logits_again(student, columns, V) - top) - log_total
        p = tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(len(experts)):
            # A scale of 0 leaves the expert's logits out, and with a vocabulary of 0 they are not read.
            z = load_logits_again(experts[t], columns, tl.where(scales[t] == 0, 0, V))
            p += tl.exp(z - tops[t]) * scales[t]
        # A token that the mixture excludes adds nothing, even where log q is -inf too.
        terms += tl.where(p > 0, p * (tl.log(p) - log_q), 0.0)
        if WITH_GRADIENT:
            store_gradient(gradient, columns, V, (tl.exp(log_q) - p) * weight)
    tl.store(loss, weight * tl.sum(terms, 0))


@triton.jit
def _expert_scales(experts, weights, V, BLOCK: tl.constexpr):
    """For ``p = sum_t exp(z_t - top_t) scale_t``: the tops, the scales ``w_t / sum exp(z_t - top_t)``, and validity."""
    # Divided by the largest: their own sum may be more than float32 holds.
    largest, total_weight = 0.0, 0.0
    for t in tl.static_range(len(experts)):
        largest = tl.maximum(largest, tl.load(weights + t))
    for t in tl.static_range(len(experts)):
        total_weight += tl.load(weights + t) / largest
    usable = (total_weight > 0) & (largest < float("inf"))
    tops = ()
    scales = ()
    for t in tl.static_range(len(experts)):
        weight = tl.load(weights + t)
        # With a vocabulary of 0 nothing of an expert that does not count is read, and a negative weight is not usable.
        share = weight / largest / total_weight
        top, total = log_sum_exp(experts[t], tl.where(share > 0, V, 0), BLOCK)
        usable = usable & ((share == 0) | is_usable(total))
        tops += (top,)
        scales += (tl.where(share > 0, share / total, 0.0),)
    return tops, scales, usable


AHEAD_OF_TIME = [
    (
        _rows_kernel,
        {
            "student": "*bf16",
            "experts": ("*bf16",) * num_experts,
            "weights": "*fp32",
            "row_weights": "*fp32",
            "losses": "*fp32",
            "gradient": gradient,
            "V": "i32",
            "inner": "i32",
            "outer_strides": ("i64",) * (num_experts + 1),
            "inner_strides": ("i32",) * (num_experts + 1),
            "BLOCK": "constexpr",
            "WITH_GRADIENT": "constexpr",
        },
        {"BLOCK": 32 * warps * per_thread, "WITH_GRADIENT": with_gradient},
        warps,
    )
    for num_experts, gradient, with_gradient in (
        *((size, "*fp32", True) for size in (1, 4, 8, 16)),
        (4, "*bf16", True),
        (4, "*fp32", False),
    )
    for per_thread, warps in (_work(num_experts),)
]
