"""What the row kernels share: rows of logits in memory, their log-sum-exp, and how a kernel is launched over them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234663852886e38)
LARGEST = tl.constexpr(3.4028234663852886e38)

_ELEMENTS_PER_THREAD = 16  # two 16-byte loads of 16-bit logits in flight, and no spills
_LARGEST_BLOCK = 8192  # 16 warps: two programs fill a multiprocessor, and their rows still fit the second-level cache


def as_rows(logits: Tensor) -> Tensor:
    """``[..., V]`` as ``[outer, inner, V]``: a view unless more than two leading strides are free of each other.

    ``inner`` is the last leading size, so that tensors of one leading shape agree on it.
    """
    inner = logits.shape[-2] if logits.dim() > 1 else 1
    return logits.reshape(-1, inner, logits.shape[-1])


def new_outputs(logits: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised float32 losses ``[...]`` and gradient ``[..., V]`` (``[0]`` without)."""
    losses = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    shape = logits.shape if with_gradient else (0,)
    return losses, torch.empty(shape, dtype=torch.float32, device=logits.device)


def launch(kernel: Any, rows: int, vocabulary: int, *args: Any, **constants: Any) -> None:
    """Run one program per row on the current stream of the device of the first argument, which is a tensor."""
    if rows == 0:
        return
    block = min(_LARGEST_BLOCK, max(32, triton.next_power_of_2(vocabulary)))
    with torch.cuda.device_of(args[0]):
        kernel[(rows,)](*args, BLOCK=block, num_warps=warps_for(block), **constants)


def warps_for(block: int) -> int:
    """Warps that share a block of elements."""
    return max(1, block // (32 * _ELEMENTS_PER_THREAD))


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
    NaN and a second +inf make the total NaN, a first +inf stays visible as the top.
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
def is_usable(top, total):
    """Whether a row has a finite logit, no NaN and no +inf, from its ``log_sum_exp``."""
    return (total > 0) & (total <= LARGEST) & (top <= LARGEST)


@triton.jit
def leave_row_out(loss, gradient, V, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr):
    """Loss 0 and gradient 0."""
    tl.store(loss, 0.0)
    if WITH_GRADIENT:
        for start in range(0, V, BLOCK):
            store_gradient(gradient, start + tl.arange(0, BLOCK), V, tl.zeros([BLOCK], tl.float32))
