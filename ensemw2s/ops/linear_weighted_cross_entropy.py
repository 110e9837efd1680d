"""``linear_weighted_cross_entropy``: the output head and ``weighted_cross_entropy`` in one, without all the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import check_head, check_integers, row_weights
from ensemw2s.ops.row_losses import (
    Rows,
    fake_in_chunks,
    in_chunks,
    save_linear_gradients,
    scaled_linear_gradients,
    without_rows,
)
from ensemw2s.ops.weighted_cross_entropy import reference as weighted_reference


def linear_weighted_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, token_weights: Tensor, *, impl: str | None = None
) -> Tensor:
    """``weighted_cross_entropy(hidden @ head.T, labels, token_weights)`` that never holds ``[tokens, V]``.

    Logits are made for some rows at a time, and on a CPU only of rows that count: where the weight is 0 or the label is
    -100 nothing of the row is computed, forward or backward. A GPU makes the logits of such rows as well, since the
    host would have to wait to learn which they are, and then leaves them unread.

    Args:
        hidden: ``[..., d]``, float32, bfloat16, float16 or float64.
        head: ``[V, d]``, the output embedding, of the same dtype.
        labels: int64 ``[...]``, in ``[0, V)`` or -100 (masked); already aligned, nothing is shifted.
        token_weights: floating point ``[...]``.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A float32 scalar (float64 for float64 inputs), differentiable once in ``hidden``, ``head`` and
        ``token_weights``.

    Raises:
        ValueError: Shapes or devices differ, or a label is out of range.
        TypeError: A dtype is wrong.
    """
    check_head(hidden, head)
    shape = tuple(hidden.shape[:-1])
    check_integers(labels, shape, hidden, "labels")
    weights = row_weights(token_weights, shape, hidden, labels)
    chosen = backend._choose("linear_weighted_cross_entropy", impl, hidden.device.type, hidden.dtype)
    if chosen == "reference":
        return weighted_reference(without_rows(hidden, weights) @ head.T, labels, weights).sum()
    rows = hidden.reshape(-1, hidden.shape[-1])
    flags = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, head)]
    inputs = (rows, head, labels.reshape(-1), weights.reshape(-1), *flags)
    return backend.run("linear_weighted_cross_entropy", chosen, *inputs)[0]


def _in_chunks(
    row_op: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    need_hidden: bool,
    need_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def losses(logits: Tensor, counted: Tensor, rows: Rows, with_gradient: bool) -> tuple[Tensor, Tensor]:
        return row_op(logits, labels[rows], counted, with_gradient)

    return in_chunks(hidden, head, row_weights, need_hidden, need_head, losses)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_linear_gradients(ctx, inputs[1], output)


def _backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    """With ``G = dL/dlogits`` of the rows that count, ``dL/dhidden = G head`` and ``dL/dhead = G^T hidden``."""
    grad_hidden, grad_head, grad_weights = scaled_linear_gradients(ctx, grad_total)
    return grad_hidden, grad_head, None, grad_weights, None, None


backend.declare(
    "linear_weighted_cross_entropy",
    "(Tensor hidden, Tensor head, Tensor labels, Tensor row_weights, bool need_hidden, bool need_head) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake_in_chunks,
    gradient=(_backward, _setup_context),
)
backend.implement_in_chunks("linear_weighted_cross_entropy", _in_chunks, row_op="weighted_cross_entropy")
