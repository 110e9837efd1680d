"""What the row kernels share: rows of logits in memory, their log-sum-exp, and how a kernel is launched over them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234663852886e38)

# Per row. A row of some models' logits is larger than a multiprocessor's share of the cache, and its second read comes
# from memory for the most part: many threads on few rows make that part smaller.
MOST_WARPS = 16


def as_rows(logits: Tensor) -> Tensor:
    """``[..., V]`` as ``[outer, inner, V]``: a view unless more than two leading strides are free of each other.

    ``inner`` is the last leading size, so that tensors of one leading shape agree on it.
    """
    inner = logits.shape[-2] if logits.dim() > 1 else 1
    return logits.reshape(-1, inner, logits.shape[-1])


def new_outputs(
    logits: Tensor, with_gradient: bool, gradient_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Uninitialised float32 losses ``[...]`` and gradient ``[..., V]`` (``[0]`` without)."""
    losses = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    shape = logits.shape if with_gradient else (0,)
    return losses, torch.empty(shape, dtype=gradient_dtype, device=logits.device)


def launch(kernel: Any, work: tuple[int, int], rows: Tensor, *args: Any, **constants: Any) -> None:
    """Run one program per row of ``as_rows``, the kernel's first argument, on the current stream of its device.

    ``work`` is how many logits of a model each thread has in hand at a time, and the most warps of a program.
    """
    outer, inner, vocabulary = rows.shape
    per_thread, most_warps = work
    warps = min(MOST_WARPS, most_warps, max(1, triton.next_power_of_2(vocabulary) // (32 * per_thread)))
    with torch.cuda.device_of(rows):
        kernel[(outer * inner,)](rows, *args, BLOCK=32 * warps * per_thread, num_warps=warps, **constants)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Offset of a row of ``as_rows``; int64 because ``row`` is."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def load_logits(row, columns, V):
    """Logits in float32, -inf beyond the vocabulary."""
    return tl.load(row + columns, mask=columns < V, other=-float("inf")).to(tl.float32)


@triton.jit
def load_logits_again(row, columns, V):
    """``load_logits`` for the last read of a row, which then makes room in the cache for others."""
    z = tl.load(row + columns, mask=columns < V, other=-float("inf"), eviction_policy="evict_first")
    return z.to(tl.float32)


@triton.jit
def store_gradient(row, columns, V, values):
    """Write a block of the gradient, past the cache that holds the rows still to be read again."""
    tl.store(row + columns, values, mask=columns < V, eviction_policy="evict_first")


@triton.jit
def add_logits(z, top, total):
    """Add one logit per lane to each lane's largest logit and its ``sum exp(z - top)``.

    A lane starts with ``LOWEST`` and 0. One exponential serves both cases, the new logit above the old top or below it.
    NaN and a second +inf make the total NaN; ``merge_lanes`` does so for a first +inf, as a top.
    """
    smaller = tl.exp(-tl.abs(z - top))
    above = z > top
    return tl.where(above, z, top), tl.where(above, total * smaller + 1.0, total + smaller)


@triton.jit
def merge_lanes(top, total):
    """The lanes' ``add_logits`` in two numbers."""
    largest = tl.max(top, 0)
    return largest, tl.sum(total * tl.exp(top - largest), 0)


@triton.jit
def log_sum_exp(row, V, BLOCK: tl.constexpr):
    """Largest logit of a row and the sum of ``exp(z - largest)``: the log-sum-exp in two numbers."""
    # Lanes meet once, at the end: a reduction per block would make all warps wait for each other every time.
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        top, total = add_logits(load_logits(row, start + tl.arange(0, BLOCK), V), top, total)
    return merge_lanes(top, total)


@triton.jit
def is_usable(total):
    """Whether a row has a finite logit, no NaN and no +inf: its total is 0 without the first, NaN with the others."""
    return total > 0


@triton.jit
def leave_row_out(loss, gradient, V, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr):
    """Loss 0 and gradient 0."""
    tl.store(loss, 0.0)
    if WITH_GRADIENT:
        for start in range(0, V, BLOCK):
            store_gradient(gradient, start + tl.arange(0, BLOCK), V, tl.zeros([BLOCK], tl.float32))
