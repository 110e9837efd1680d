"""``weighted_cross_entropy``: the sum over tokens of weight times cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    MASKED_LABEL,
    accumulation_dtype,
    check_integers,
    check_label_values,
    check_logits,
    row_weights,
)
from ensemw2s.ops.row_losses import fake_row_losses, save_gradient, scaled_gradient, whether_counted


def weighted_cross_entropy(logits: Tensor, labels: Tensor, token_weights: Tensor, *, impl: str | None = None) -> Tensor:
    """``sum_i w_i * CE_i``, the loss of boosting's count-weighted or re-weighted training (EnsemW2S, Phase 1).

    It is a sum over tokens, not a mean: divide it by ``token_weights.sum()`` for the weighted mean.

    Equivalent to::

        losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")  # -100 gives 0
        (token_weights.flatten() * losses).sum()

    Rows with weight 0 or label -100 are left out: nothing of them is read or computed, forward or backward.

    Args:
        logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        labels: int64 ``[...]``, in ``[0, V)`` or -100 (masked); already aligned with the logits, nothing is shifted.
        token_weights: floating point ``[...]``.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A float32 scalar (float64 for float64 logits). Differentiable in ``logits`` and ``token_weights``, by compiled
        backends once; a token that is left out sends no gradient to its weight.

    Raises:
        ValueError: Shapes or devices differ, or a label is out of range.
        TypeError: A dtype is wrong.
    """
    logits = check_logits(logits)
    shape = tuple(logits.shape[:-1])
    check_integers(labels, shape, logits, "labels")
    weights = row_weights(token_weights, shape, logits, labels)
    chosen = backend._choose("weighted_cross_entropy", impl, logits.device, logits.dtype)
    if chosen == "reference":
        return reference(logits, labels, weights).sum()
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    inputs = (logits, labels.contiguous(), whether_counted(weights), needs_grad)
    return (weights * backend.run("weighted_cross_entropy", chosen, *inputs)[0]).sum()


def reference(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted losses ``[...]`` in plain torch, any device; in float64 for float64 logits, else in float32."""
    labels = labels.masked_fill(weights == 0, MASKED_LABEL)
    check_label_values(labels, logits.shape[-1])
    rows = (
        logits.masked_fill((weights == 0)[..., None], 0.0).to(accumulation_dtype(logits)).reshape(-1, logits.shape[-1])
    )
    losses = functional.cross_entropy(rows, labels.reshape(-1), ignore_index=MASKED_LABEL, reduction="none")
    return weights * losses.view(labels.shape)


def _fake(logits: Tensor, labels: Tensor, row_weights: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return fake_row_losses(logits, with_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_gradient(ctx, inputs[0], output)


def _backward(ctx: Any, grad_losses: Tensor | None, grad_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """``CE = log sum exp(z) - z_label``, hence ``dCE/dz = softmax(z) - one_hot(label)``; the kernel made it."""
    return scaled_gradient(ctx, grad_losses, grad_gradient), None, None, None


backend.declare(
    "weighted_cross_entropy",
    "(Tensor logits, Tensor labels, Tensor row_weights, bool with_gradient) -> (Tensor, Tensor)",
    _fake,
    gradient=(_backward, _setup_context),
)
backend.implement_in_triton("weighted_cross_entropy")
