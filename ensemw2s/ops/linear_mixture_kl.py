"""``linear_mixture_kl``: the output heads and ``mixture_kl`` in one, without all the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import (
    check_head,
    check_same_device,
    check_temperature,
    check_weight_values,
    expert_weights,
    row_weights,
    tensor_list,
)
from ensemw2s.ops.mixture_kl import reference as kl_reference
from ensemw2s.ops.row_losses import (
    Rows,
    divided,
    fake_in_chunks,
    in_chunks,
    save_linear_gradients,
    scaled_linear_gradients,
    tempered,
    tempered_states,
    without_rows,
)


def linear_mixture_kl(
    hidden: Tensor,
    head: Tensor,
    expert_hiddens: Sequence[Tensor],
    expert_heads: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    token_weights: Tensor,
    temperature: float = 1.0,
    *,
    impl: str | None = None,
) -> Tensor:
    """``mixture_kl`` of ``hidden @ head.T`` and the experts' like products that never holds ``[tokens, V]``.

    Logits are made for some rows at a time, and on a CPU only of rows whose weight is not 0. A GPU makes those of all
    rows, since the host would have to wait to learn which count, and leaves the logits of the others unread.

    Args:
        hidden: Student's ``[..., d]``, float32, bfloat16, float16 or float64.
        head: Student's ``[V, d]``.
        expert_hiddens: T tensors ``[..., d_t]`` with the student's leading shape and dtype.
        expert_heads: T tensors ``[V, d_t]``; the same tensor may stand for several experts.
        weights: ``[T]``, non-negative, not all zero; normalised inside.
        token_weights: floating point ``[...]``.
        temperature: Divides all logits; positive. No factor ``temperature**2`` is put in front.
        impl: Backend, see ``ensemw2s.ops``.

    Returns:
        A float32 scalar (float64 for float64 inputs), differentiable once in ``hidden``, ``head`` and
        ``token_weights``; the teachers get no gradient.

    Raises:
        ValueError: Shapes, devices, ``temperature`` or the values of ``weights`` are wrong.
        TypeError: A dtype is wrong.
    """
    check_head(hidden, head)
    teachers = _checked_teachers(hidden, head, expert_hiddens, expert_heads)
    temperature = check_temperature(temperature)
    weights = expert_weights(weights, len(teachers), hidden).detach()
    per_row = row_weights(token_weights, tuple(hidden.shape[:-1]), hidden)
    rows, rest_of_temperature = tempered_states(hidden, temperature)
    expert_rows = [tempered_states(states, temperature)[0] for states, _ in teachers]
    heads = [expert_head for _, expert_head in teachers]
    chosen = backend._choose("linear_mixture_kl", impl, hidden.device.type, hidden.dtype)
    if chosen == "reference":
        check_weight_values(weights)
        per_row = per_row.reshape(-1)
        states = (without_rows(rows, per_row), *expert_rows)
        student, *experts = (
            tempered(x @ y.T, rest_of_temperature) for x, y in zip(states, (head, *heads), strict=True)
        )
        return kl_reference(student, experts, weights, per_row).sum()
    flags = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, head)]
    inputs = (rows, head, expert_rows, heads, weights, per_row.reshape(-1), *flags, rest_of_temperature)
    return backend.run("linear_mixture_kl", chosen, *inputs)[0]


def _checked_teachers(
    hidden: Tensor, head: Tensor, expert_hiddens: Sequence[Tensor], expert_heads: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    expert_hiddens = tensor_list(expert_hiddens, "expert_hiddens")
    expert_heads = tensor_list(expert_heads, "expert_heads")
    if len(expert_hiddens) != len(expert_heads) or not expert_hiddens:
        raise ValueError(
            f"expert_hiddens ({len(expert_hiddens)}) and expert_heads ({len(expert_heads)}) must be as many, at least 1"
        )
    for index, (states, expert_head) in enumerate(zip(expert_hiddens, expert_heads, strict=True)):
        names = (f"expert_hiddens[{index}]", f"expert_heads[{index}]")
        check_head(states, expert_head, names)
        check_same_device(states, hidden, names[0])
        if states.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"{names[0]} has shape {tuple(states.shape)}, hidden {tuple(hidden.shape)}")
        if expert_head.shape[0] != head.shape[0]:
            raise ValueError(f"{names[1]} has a vocabulary of {expert_head.shape[0]}, head of {head.shape[0]}")
        if states.dtype != hidden.dtype:
            raise TypeError(f"{names[0]} is {states.dtype}, hidden is {hidden.dtype}")
    return [(x.detach(), y.detach()) for x, y in zip(expert_hiddens, expert_heads, strict=True)]


def _in_chunks(
    row_op: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    head: Tensor,
    expert_hiddens: list[Tensor],
    expert_heads: list[Tensor],
    weights: Tensor,
    row_weights: Tensor,
    need_hidden: bool,
    need_head: bool,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def losses(logits: Tensor, counted: Tensor, rows: Rows, with_gradient: bool) -> tuple[Tensor, Tensor]:
        experts = [
            tempered(states[rows] @ expert_head.T, temperature)
            for states, expert_head in zip(expert_hiddens, expert_heads, strict=True)
        ]
        student = tempered(logits, temperature)
        losses, gradient = row_op(student, experts, weights, counted, with_gradient)
        return losses, divided(gradient, temperature)

    return in_chunks(hidden, head, row_weights, need_hidden, need_head, losses, models=len(expert_heads) + 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_experts = len(inputs[2])
    save_linear_gradients(ctx, inputs[1], output)


def _backward(ctx: Any, grad_total: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    """With ``G = dL/dlogits`` of the rows that count, ``dL/dhidden = G head`` and ``dL/dhead = G^T hidden``."""
    grad_hidden, grad_head, grad_weights = scaled_linear_gradients(ctx, grad_total)
    none_each = [None] * ctx.num_experts
    gradients = (grad_hidden, grad_head, none_each, none_each, None, grad_weights, None, None, None)
    # Torch leaves out an argument that has its default, and then counts one gradient less.
    return gradients[: len(ctx.needs_input_grad)]


backend.declare(
    "linear_mixture_kl",
    "(Tensor hidden, Tensor head, Tensor[] expert_hiddens, Tensor[] expert_heads, Tensor weights, "
    "Tensor row_weights, bool need_hidden, bool need_head, float temperature=1.0) -> (Tensor, Tensor, Tensor, Tensor)",
    fake_in_chunks,
    gradient=(_backward, _setup_context),
)
backend.implement_in_chunks("linear_mixture_kl", _in_chunks, row_op="mixture_kl")
