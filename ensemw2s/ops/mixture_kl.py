"""``mixture_kl``: how far a student is from the mixture of its teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    accumulation_dtype,
    check_logits,
    check_same_device,
    check_temperature,
    check_weight_values,
    expert_list,
    expert_weights,
    row_weights,
)
from ensemw2s.ops.mixture_log_probs import reference as mixture_reference
from ensemw2s.ops.row_losses import fake_row_losses, save_gradient, scaled_gradient, tempered, whether_counted


def mixture_kl(
    student_logits: Tensor,
    expert_logits: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[float],
    token_weights: Tensor,
    temperature: float = 1.0,
    *,
    impl: str | None = None,
) -> Tensor:
    """``sum_i w_i * KL(mixture_i || student_i)``, soft labels from T live teachers (EnsemW2S, Phase 3).

    Equivalent to, with ``z_t = expert_logits[t] / temperature`` and ``log_q = log_softmax(student / temperature)``::

        log_p = mixture_log_probs(z, weights)
        (token_weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()

    No factor ``temperature**2`` is put in front. A temperature other than 1 costs a float32 copy of the logits. Rows of
    weight 0 are left out, forward and backward; a row in which a teacher of positive weight or the student is broken
    (NaN, +inf, no finite logit) makes the loss NaN.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16 or float64.
        expert_logits: T tensors ``[..., V]`` or one stacked ``[T, ..., V]``, of one of these dtypes. Where it is not
            the student's, as with float32 teachers under autocast to bfloat16, the narrower side is copied to the
            dtype that holds both.
        weights: ``[T]``, non-negative, not all zero; normalised inside.
        token_weights: floating point ``[...]``.
        temperature: Divides all logits; positive.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A float32 scalar (float64 if any logits are float64), differentiable in ``student_logits`` and
        ``token_weights``, by compiled backends once; the teachers get no gradient.

    Raises:
        ValueError: Shapes, devices, ``temperature`` or the values of ``weights`` are wrong.
        TypeError: A dtype is wrong.
    """
    student = check_logits(student_logits, "student_logits")
    experts = expert_list(expert_logits, "expert_logits", detached=True)
    check_teachers(student, experts)
    temperature = check_temperature(temperature)
    wide = torch.promote_types(student.dtype, experts[0].dtype)
    student, *experts = (logits.to(wide) for logits in (student, *experts))
    weights = expert_weights(weights, len(experts), student).detach()
    per_row = row_weights(token_weights, tuple(student.shape[:-1]), student)
    student, *experts = (tempered(logits, temperature) for logits in (student, *experts))
    chosen = backend._choose("mixture_kl", impl, student.device, student.dtype)
    if chosen == "reference":
        check_weight_values(weights)
        return reference(student, experts, weights, per_row).sum()
    needs_grad = torch.is_grad_enabled() and student.requires_grad
    inputs = (student, experts, weights, whether_counted(per_row), needs_grad)
    return (per_row * backend.run("mixture_kl", chosen, *inputs)[0]).sum()


def check_teachers(student: Tensor, experts: Sequence[Tensor]) -> None:
    """Refuse teachers whose logits are unlike the student's."""
    if experts[0].shape != student.shape:
        raise ValueError(
            f"expert_logits have shape {tuple(experts[0].shape)}, student_logits {tuple(student.shape)}; student and "
            "teachers need the same tokens and vocabulary"
        )
    check_same_device(experts[0], student, "expert_logits")


def reference(student: Tensor, experts: Sequence[Tensor], weights: Tensor, per_row: Tensor) -> Tensor:
    """Weighted losses ``[...]`` in plain torch, any device; in float64 for float64 logits, else in float32."""
    left_out = (per_row == 0)[..., None]
    log_p = mixture_reference([expert.masked_fill(left_out, 0.0) for expert in experts], weights, "prob")
    log_q = student.masked_fill(left_out, 0.0).to(accumulation_dtype(student)).log_softmax(-1)
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return per_row * terms.sum(-1).masked_fill(per_row == 0, 0.0)


def _fake(
    student: Tensor, experts: list[Tensor], weights: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return fake_row_losses(student, with_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_experts = len(inputs[1])
    save_gradient(ctx, inputs[0], output)


def _backward(ctx: Any, grad_losses: Tensor | None, grad_gradient: Tensor | None) -> tuple[Any, ...]:
    """``KL = sum p log p - sum p log q`` and ``dlog q_v/dz_u = [u = v] - q_u``, hence ``dKL/dz = q - p``."""
    return scaled_gradient(ctx, grad_losses, grad_gradient), [None] * ctx.num_experts, None, None, None


backend.declare(
    "mixture_kl",
    "(Tensor student, Tensor[] experts, Tensor weights, Tensor row_weights, bool with_gradient) -> (Tensor, Tensor)",
    _fake,
    gradient=(_backward, _setup_context),
)
backend.implement_in_triton("mixture_kl")
