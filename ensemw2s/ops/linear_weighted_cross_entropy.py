"""``linear_weighted_cross_entropy``: the output head and ``weighted_cross_entropy`` in one, without all the logits."""

from __future__ import annotations

from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import check_head, check_integers, row_weights
from ensemw2s.ops.row_losses import declare_linear, run_linear, without_rows
from ensemw2s.ops.weighted_cross_entropy import reference as weighted_reference


def linear_weighted_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, token_weights: Tensor, *, impl: str | None = None
) -> Tensor:
    """``weighted_cross_entropy(hidden @ head.T, labels, token_weights)`` that never holds ``[tokens, V]``.

    Logits are made for some rows at a time, and only of rows that count: where the weight is 0 or the label is -100
    nothing of the row is computed, forward or backward. The host asks a GPU once which rows count. While a CUDA graph
    is captured it may not ask: then the logits of all rows are made, and those of such rows are left unread.

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
    chosen = backend._choose("linear_weighted_cross_entropy", impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        return weighted_reference(without_rows(hidden, weights) @ head.T, labels, weights).sum()
    rows = hidden.reshape(-1, hidden.shape[-1])
    inputs = (labels.reshape(-1), weights.reshape(-1))
    return run_linear("linear_weighted_cross_entropy", chosen, rows, head, *inputs)


declare_linear("linear_weighted_cross_entropy", "Tensor labels", row_op="weighted_cross_entropy")
