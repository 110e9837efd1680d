"""``linear_mixture_kl``: the output heads and ``mixture_kl`` in one, without all the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from ensemw2s.ops.products import linear
from ensemw2s.ops.row_losses import Rows, declare_linear, run_linear, tempered, tempered_states, without_rows


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

    Logits are made for some rows at a time, and only of rows whose weight is not 0. The host asks a GPU once which rows
    those are; while a CUDA graph is captured it may not ask, and the logits of all rows are made.

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
    chosen = backend._choose("linear_mixture_kl", impl, hidden.device, hidden.dtype)
    if chosen == "reference":
        check_weight_values(weights)
        per_row = per_row.reshape(-1)
        states = (without_rows(rows, per_row), *expert_rows)
        student, *experts = (
            tempered(x @ y.T, rest_of_temperature) for x, y in zip(states, (head, *heads), strict=True)
        )
        return kl_reference(student, experts, weights, per_row).sum()
    inputs = (expert_rows, heads, weights, per_row.reshape(-1))
    return run_linear("linear_mixture_kl", chosen, rows, head, *inputs, options=[rest_of_temperature])


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


def _targets_of(targets: Sequence[Any], rows: Rows, temperature: float) -> tuple[list[Tensor], Tensor]:
    expert_hiddens, expert_heads, weights = targets
    experts = zip(expert_hiddens, expert_heads, strict=True)
    return [tempered(linear(states[rows], expert_head), temperature) for states, expert_head in experts], weights


declare_linear(
    "linear_mixture_kl",
    "Tensor[] expert_hiddens, Tensor[] expert_heads, Tensor weights",
    row_op="mixture_kl",
    options=", float temperature=1.0",
    targets_of=_targets_of,
    models=2,
)
