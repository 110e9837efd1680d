"""``weighted_cross_entropy`` on a GPU: one program per row reads it twice, the second time out of the cache."""

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

_PER_THREAD = 16  # two 16-byte loads of 16-bit logits in flight


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    with_gradient: bool,
    gradient_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Weighted losses of rows, and the gradient of each in its logits.

    Args:
        logits: float32, bfloat16 or float16 ``[..., V]``, last stride 1.
        labels: int64 ``[...]``; where the weight is not 0, one outside ``[0, V)`` makes the row NaN.
        row_weights: float32 ``[...]``; rows of weight 0 are not read.
        with_gradient: Whether the gradient is needed.
        gradient_dtype: What it is rounded to as it is written.

    Returns:
        float32 ``[...]`` and the gradient ``[..., V]`` (``[0]`` if it is not needed).
    """
    losses, gradient = new_outputs(logits, with_gradient, gradient_dtype)
    if losses.numel():
        rows = as_rows(logits)
        inputs = (rows, labels.contiguous(), row_weights.contiguous())
        shape = (rows.shape[2], rows.shape[1], rows.stride(0), rows.stride(1))
        launch(_rows_kernel, (_PER_THREAD, MOST_WARPS), *inputs, losses, gradient, *shape, WITH_GRADIENT=with_gradient)
    return losses, gradient


@triton.jit(do_not_specialize=["inner"])
def _rows_kernel(
    logits,
    labels,
    row_weights,
    losses,
    gradient,
    V,
    inner,
    outer_stride,
    inner_stride,
    BLOCK: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(row_weights + row)
    gradient += row * V
    if weight == 0:
        leave_row_out(losses + row, gradient, V, BLOCK, WITH_GRADIENT)
    else:
        logits += row_offset(row, inner, outer_stride, inner_stride)
        label = tl.load(labels + row)
        _row(logits, label, weight, losses + row, gradient, V, BLOCK, WITH_GRADIENT)


@triton.jit
def _row(logits, label, weight, loss, gradient, V, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr):
    top, total = log_sum_exp(logits, V, BLOCK)
    known = (label >= 0) & (label < V)
    weight = tl.where(known & is_usable(total), weight, float("nan"))
    z_label = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
    tl.store(loss, weight * ((top - z_label) + tl.log(total)))
    if WITH_GRADIENT:
        scale = weight / total
        # Backwards, because what was read last is likeliest to be in the cache still.
        last = (V - 1) // BLOCK * BLOCK
        for back in range(0, V, BLOCK):
            columns = last - back + tl.arange(0, BLOCK)
            softmax = tl.exp(load_logits_again(logits, columns, V) - top) * scale
            store_gradient(gradient, columns, V, softmax - tl.where(columns == label, weight, 0.0))


AHEAD_OF_TIME = [
    (
        _rows_kernel,
        {
            "logits": "*bf16",
            "labels": "*i64",
            "row_weights": "*fp32",
            "losses": "*fp32",
            "gradient": gradient,
            "V": "i32",
            "inner": "i32",
            "outer_stride": "i64",
            "inner_stride": "i32",
            "BLOCK": "constexpr",
            "WITH_GRADIENT": "constexpr",
        },
        {"BLOCK": 32 * MOST_WARPS * _PER_THREAD, "WITH_GRADIENT": with_gradient},
        MOST_WARPS,
    )
    for gradient, with_gradient in (("*fp32", True), ("*bf16", True), ("*fp32", False))
]
