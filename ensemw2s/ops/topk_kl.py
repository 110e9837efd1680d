"""``topk_kl``: how far a student is from teachers of whom only the likeliest tokens were kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    accumulation_dtype,
    check_head,
    check_integers,
    check_same_device,
    check_temperature,
    check_tensor,
    row_weights,
)
from ensemw2s.ops.row_losses import (
    declare_linear,
    fake_row_losses,
    run_linear,
    tempered,
    tempered_states,
    without_rows,
)

# Of log-probabilities in 16 bits: what their mass may be above 1.
_ROUNDING = 0.02


def topk_kl(
    hidden: Tensor,
    head: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
    token_weights: Tensor,
    temperature: float = 1.0,
    *,
    impl: str | None = None,
) -> Tensor:
    """``sum_i w_i * KL(teacher_i || student_i)`` over the teacher's k likeliest tokens and "any other token".

    Equivalent to, with ``q = softmax(hidden @ head.T / temperature)`` and ``p = log_probs.exp()``::

        q_k = q.gather(-1, token_ids); r, R = 1 - p.sum(-1), 1 - q_k.sum(-1)
        (token_weights * ((p * (p / q_k).log()).sum(-1) + r * (r / R).log())).sum()

    The logits ``[tokens, V]`` are never held, and none are made of rows whose weight is 0. The host asks a GPU once
    which rows those are; while a CUDA graph is captured it may not ask, and the logits of all rows are made. A rest
    ``r`` that is not positive, or a vocabulary without other tokens, adds nothing.

    Args:
        hidden: Student's ``[..., d]``, float32, bfloat16, float16 or float64.
        head: Student's ``[V, d]``.
        token_ids: int64 ``[..., k]``, distinct within a row.
        log_probs: floating point ``[..., k]``, the teacher's, at the same temperature; a row's weigh at most 1
            together.
        token_weights: floating point ``[...]``.
        temperature: Divides the student's logits; positive. No factor ``temperature**2`` is put in front.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A float32 scalar (float64 for float64 inputs), differentiable once in ``hidden``, ``head`` and
        ``token_weights``.

    Raises:
        ValueError: Shapes, devices or ``temperature`` are wrong, or, on the CPU, a row that counts has a token out of
            range or twice, or log-probabilities that weigh more than 1.
        TypeError: A dtype is wrong.
    """
    check_head(hidden, head)
    shape = tuple(hidden.shape[:-1])
    check_tensor(token_ids, "token_ids")
    if token_ids.dim() != hidden.dim() or not 1 <= token_ids.shape[-1] <= head.shape[0]:
        raise ValueError(f"token_ids must be [..., k] with 1 <= k <= {head.shape[0]}, got {tuple(token_ids.shape)}")
    k = token_ids.shape[-1]
    check_integers(token_ids, (*shape, k), hidden, "token_ids")
    check_tensor(log_probs, "log_probs")
    if not log_probs.is_floating_point():
        raise TypeError(f"log_probs must be floating point, got {log_probs.dtype}")
    if log_probs.shape != token_ids.shape:
        raise ValueError(f"log_probs have shape {tuple(log_probs.shape)}, token_ids {tuple(token_ids.shape)}")
    check_same_device(log_probs, hidden, "log_probs")
    temperature = check_temperature(temperature)
    weights = row_weights(token_weights, shape, hidden).reshape(-1)
    ids, teacher = token_ids.reshape(-1, k), log_probs.detach().to(accumulation_dtype(hidden)).reshape(-1, k)
    _check_teacher(ids, teacher, weights)
    rows, rest_of_temperature = tempered_states(hidden, temperature)
    chosen = backend._choose("topk_kl", impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        student = tempered(without_rows(rows, weights) @ head.T, rest_of_temperature)
        return reference(student, ids, teacher, weights).sum()
    inputs = (ids.contiguous(), teacher.contiguous(), weights)
    return run_linear("topk_kl", chosen, rows, head, *inputs, options=[rest_of_temperature])


def _check_teacher(token_ids: Tensor, log_probs: Tensor, weights: Tensor) -> None:
    """Refuse rows ``[N, k]`` that are no distribution; on the CPU only, since elsewhere it would synchronise."""
    if weights.device.type != "cpu" or torch.compiler.is_compiling():
        return
    is_counted, ordered = weights.detach() != 0, token_ids.sort(dim=-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1) & is_counted
    if bool(repeated.any()):
        raise ValueError(f"token_ids must be distinct within a row, got one twice in row {int(repeated.nonzero()[0])}")
    mass = log_probs.exp().sum(dim=-1)
    too_much = (mass > 1 + _ROUNDING) & is_counted
    if bool(too_much.any()):
        row = int(too_much.nonzero()[0])
        raise ValueError(
            f"log_probs must be log-probabilities, which weigh at most 1 together, got {float(mass[row]):.4g} in row "
            f"{row}"
        )


def reference(student: Tensor, token_ids: Tensor, log_probs: Tensor, weights: Tensor) -> Tensor:
    """Weighted losses of student logits ``[N, V]`` in plain torch; in float64 for float64 logits, else in float32."""
    if student.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = token_ids[(token_ids < 0) | (token_ids >= student.shape[-1])]
        if wrong.numel():
            raise ValueError(f"token_ids must be in [0, {student.shape[-1]}), got {int(wrong[0])}")
    left_out = (weights == 0)[:, None]
    log_q = student.masked_fill(left_out, 0.0).to(accumulation_dtype(student)).log_softmax(-1)
    p = log_probs.exp()
    kept = torch.where(p == 0, 0.0, p * (log_probs - log_q.gather(-1, token_ids))).sum(-1)
    others = log_q.scatter(-1, token_ids, -torch.inf)
    # Without another token that is possible there is no rest, and -inf would stand under the gradient of logsumexp.
    none_left = (others == -torch.inf).all(-1)
    rest = (1 - p.sum(-1)).clamp(min=0).masked_fill(none_left, 0.0)
    log_rest = others.masked_fill(none_left[..., None], 0.0).logsumexp(-1)
    tail = torch.where(rest > 0, rest * (torch.where(rest > 0, rest, 1.0).log() - log_rest), 0.0)
    return weights * (kept + tail).masked_fill(weights == 0, 0.0)


def _fake_rows(
    student: Tensor, token_ids: Tensor, log_probs: Tensor, row_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return fake_row_losses(student, with_gradient)


# The gradient of a row comes from `dlog R/dz_u = [u is another token] q_u / R - q_u`: `dKL/dz_u = q_u - p_u` for the k
# tokens and `q_u - r q_u / R` for any other one.
backend.declare(
    "topk_kl_rows",
    "(Tensor student, Tensor token_ids, Tensor log_probs, Tensor row_weights, bool with_gradient) -> (Tensor, Tensor)",
    _fake_rows,
    public=False,
)
backend.implement_in_triton("topk_kl_rows")
declare_linear(
    "topk_kl", "Tensor token_ids, Tensor log_probs", row_op="topk_kl_rows", options=", float temperature=1.0"
)
