"""What the losses share: kernels that return, for each row, its loss and the gradient of it.

The gradient is made beside the loss, while the row is in the cache, and only scaled by what comes from above in the
backward pass. The kernels are given weights of 0 and 1 alone, which say whether a row counts; a row's true weight is
multiplied with its loss and gradient in torch, so that no backend divides by it to find its own gradient. The
``linear_*`` ops never hold the logits of all rows: ``declare_linear`` makes ops that make some, call such a kernel, and
add their share of the gradients of the hidden states and of the head.

Rows of weight 0 are left out of the matrix products. The host has to ask a GPU which rows those are, and waits for it
once in a call. While a CUDA graph is captured it may not ask: then the logits of all rows are made, and those of weight
0 are left unread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ensemw2s.ops import backend
from ensemw2s.ops.checks import accumulation_dtype
from ensemw2s.ops.products import linear

RowOp = Callable[..., tuple[Tensor, Tensor]]
Rows = Tensor | slice  # some rows: their numbers, int64, or a slice of all

# Logits made at a time: 32 MiB of float32, 170 rows of 49k tokens; half as many make matrix products 13% slower.
CHUNK_ELEMENTS = 2**23
_GPU_CHUNK_ELEMENTS = 2**27  # 512 MiB of float32; a thousand rows of 128k tokens, enough for matrix products at speed
_ROWS_OF_A_TILE = 256  # no matrix product of a GPU has larger tiles: a chunk of a row more would take a tile more
_GPU_HEAD_ELEMENTS = 2**24  # of a head's gradient made at a time beside the whole: 64 MiB of float32
_LEAST_DIVISOR = 1e-30  # a temperature below it or above its inverse might be 0 or infinite in float32


def fake_row_losses(logits: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Empty losses and gradient for logits ``[..., V]``."""
    shape = logits.shape if with_gradient else (0,)
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32), logits.new_empty(shape, dtype=torch.float32)


def save_gradient(ctx: Any, logits: Tensor, output: tuple[Tensor, Tensor]) -> None:
    """Keep what ``scaled_gradient`` needs."""
    # A gradient of what was kept is then told from none; see ``refuse_second_derivative``.
    ctx.set_materialize_grads(False)
    ctx.dtype = logits.dtype
    ctx.save_for_backward(*output)


def refuse_second_derivative(*gradients: Tensor | None) -> None:
    """Raise RuntimeError if a gradient arrives for what a kernel made beside the losses, the gradient above all.

    It is a constant to torch, and so its derivatives would be 0 without a word.
    """
    if any(gradient is not None for gradient in gradients):
        raise RuntimeError(
            "the compiled losses can be differentiated once only, and a second derivative was asked for: call the op "
            'with impl="reference", or without create_graph=True'
        )


def scaled_gradient(ctx: Any, grad_losses: Tensor | None, grad_gradient: Tensor | None) -> Tensor | None:
    """Gradient of the logits."""
    refuse_second_derivative(grad_gradient)
    if grad_losses is None:
        return None
    losses, gradient = ctx.saved_tensors
    if gradient.numel() == 0 and losses.numel() > 0:
        raise RuntimeError("the gradient of a row loss was asked for, but it ran with with_gradient=False")
    return (gradient * grad_losses[..., None]).to(ctx.dtype)


def whether_counted(row_weights: Tensor) -> Tensor:
    """1 for rows whose weight is not 0, of the same dtype and without a gradient."""
    return (row_weights.detach() != 0).to(row_weights.dtype)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits ``[..., V]`` divided by a temperature, in the accumulation dtype, less a constant in each row.

    With their largest taken off no quotient is too large for its dtype, and one that is too small belongs to a token
    without a chance. By halves, because two logits may lie further apart than their dtype holds.
    """
    if temperature == 1:
        return logits
    dtype = accumulation_dtype(logits)
    halves = logits.to(dtype) / 2
    return 2 * divided(halves - halves.detach().amax(dim=-1, keepdim=True), temperature)


def divided(values: Tensor, temperature: float) -> Tensor:
    """``values / temperature``; by way of float64 where the temperature might be 0 or infinite in float32."""
    if temperature == 1:
        return values
    if _LEAST_DIVISOR <= temperature <= 1 / _LEAST_DIVISOR:
        return values / temperature
    return (values.double() / temperature).to(values.dtype)


def tempered_states(hidden: Tensor, temperature: float) -> tuple[Tensor, float]:
    """Hidden states as rows ``[N, d]``, and the temperature that is left for the logits of them.

    Scaling the hidden states scales the logits, at a thousandth of the price; but a temperature below 1 would make 16
    bits overflow.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    return (rows, temperature) if temperature < 1 else (divided(rows, temperature), 1.0)


def declare_linear(
    name: str,
    targets: str,
    row_op: str,
    *,
    options: str = "",
    targets_of: Callable[[Sequence[Any], Rows, float], Iterable[Any]] | None = None,
    models: int = 1,
) -> None:
    """Declare the op ``name``: the weighted sum of what ``row_op`` says of the rows of ``hidden @ head.T``.

    Args:
        name: The op's name.
        targets: What the rows are compared with, in torch's schema language.
        row_op: The op that gives losses and gradients of rows of logits.
        options: The end of the schema: nothing, or a ``temperature`` of 1.
        targets_of: The part of the targets that some rows are compared with, at a temperature; None indexes each.
        models: How many models' logits are held at a time; with several the chunks are half as large.
    """
    part = targets_of or (lambda whole, rows, temperature: [values[rows] for values in whole])

    def run(op: RowOp, hidden: Tensor, head: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found, row_weights, flags, temperature = _separated(inputs)

        def losses(logits: Tensor, counted: Tensor, rows: Rows, with_gradient: bool) -> tuple[Tensor, Tensor]:
            student = tempered(logits, temperature)
            of_rows, gradient = op(student, *part(found, rows, temperature), counted, with_gradient)
            return of_rows, divided(gradient, temperature)

        return in_chunks(hidden, head, row_weights, *flags, losses, models)

    schema = f"(Tensor hidden, Tensor head, {targets}, Tensor row_weights, bool need_hidden, bool need_head{options})"
    results = "(Tensor, Tensor, Tensor, Tensor)"
    backend.declare(name, f"{schema} -> {results}", _fake_in_chunks, gradient=(_backward, _setup_context))
    backend.implement_in_chunks(name, run, row_op=row_op)


def run_linear(name: str, chosen: str, hidden: Tensor, head: Tensor, *inputs: Any, options: Sequence[Any] = ()) -> Any:
    """Run an op of ``declare_linear`` on rows ``[N, d]`` with the gradients that will be asked for."""
    flags = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, head)]
    return backend.run(name, chosen, hidden, head, *inputs, *flags, *options)[0]


def _separated(inputs: Sequence[Any]) -> tuple[Sequence[Any], Tensor, tuple[bool, bool], float]:
    """Targets, row weights, ``need_hidden`` with ``need_head``, and the temperature (1 is left out by torch)."""
    first = next(i for i, value in enumerate(inputs) if isinstance(value, bool))
    need_hidden, need_head, temperature = (*inputs[first:], 1.0)[:3]
    return inputs[: first - 1], inputs[first - 1], (need_hidden, need_head), temperature


def in_chunks(
    hidden: Tensor,
    head: Tensor,
    row_weights: Tensor,
    need_hidden: bool,
    need_head: bool,
    row_losses: Callable[[Tensor, Tensor, Rows, bool], tuple[Tensor, Tensor]],
    models: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of the losses of rows of ``hidden @ head.T`` with its gradients; rows of weight 0 add nothing.

    Args:
        hidden: ``[N, d]``.
        head: ``[V, d]``.
        row_weights: float32 ``[N]``.
        need_hidden: Whether to return the gradient of ``hidden``.
        need_head: Whether to return the gradient of ``head``.
        row_losses: Called with a chunk's logits ``[n, V]``, float32 ``[n]`` that is 1 for rows that count, which rows
            they are and whether a gradient is needed; returns losses and gradient.
        models: As for ``declare_linear``.

    Returns:
        The weighted sum of the losses (float32), the losses ``[N]``, the gradient of ``hidden`` (its dtype, or empty)
        and the gradient of ``head`` (float32, or empty).
    """
    losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.zeros_like(hidden if need_hidden else hidden[:0])
    grad_head = torch.zeros(head.shape if need_head else (0, head.shape[1]), dtype=torch.float32, device=head.device)
    unit = _unit_of(row_weights, hidden.dtype)
    in_units = row_weights if unit is None else row_weights / unit
    for rows in _row_groups(row_weights, head.shape[0] * min(models, 2)):
        inputs, weights = hidden[rows], row_weights[rows]
        counted = whether_counted(weights)
        losses[rows], gradient = row_losses(linear(inputs, head), counted, rows, need_hidden or need_head)
        gradient = gradient.to(hidden.dtype)
        # The weights are multiplied with what is d wide, not V.
        if need_hidden:
            grad_hidden[rows] = (linear(gradient, head.T) * weights[:, None]).to(hidden.dtype)
        if need_head:
            inputs = without_rows(inputs, weights) if isinstance(rows, slice) else inputs
            _add_product(grad_head, gradient, (inputs * in_units[rows, None]).to(hidden.dtype))
    if unit is not None:
        grad_head *= unit
    return (row_weights * losses).sum(), losses, grad_hidden, grad_head


def _unit_of(row_weights: Tensor, dtype: torch.dtype) -> Tensor | float | None:
    """What weights are divided by so that their products with hidden states do not overflow; None where none would."""
    if row_weights.numel() == 0:
        return None
    largest = row_weights.abs().amax()
    if row_weights.device.type == "cpu":
        is_usual = dtype != torch.float16 and _LEAST_DIVISOR < largest < 1 / _LEAST_DIVISOR
        return float(largest) if 0 < largest < torch.inf and not is_usual else None
    return torch.where(largest > 0, largest, 1.0) if dtype == torch.float16 else None


def _row_groups(row_weights: Tensor, size: int) -> Iterable[Rows]:
    """Chunks of the rows that count, or slices of all where the host cannot ask which rows those are."""
    step = max(1, (CHUNK_ELEMENTS if row_weights.device.type == "cpu" else _GPU_CHUNK_ELEMENTS) // size)
    step -= step % _ROWS_OF_A_TILE if step > _ROWS_OF_A_TILE else 0
    if _can_be_asked(row_weights.device):
        return row_weights.nonzero()[:, 0].split(step)
    return _slices(row_weights.shape[0], step)


def _can_be_asked(device: torch.device) -> bool:
    """Whether values on a device can be had now."""
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, size, step)]


def _add_product(grad_head: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """Add ``gradient.T @ inputs`` (``[n, V]`` and ``[n, d]``, of one dtype) to the float32 ``[V, d]`` of a head."""
    if gradient.dtype == torch.float32:
        grad_head.addmm_(gradient.T, inputs)
    elif gradient.device.type == "cpu":
        grad_head += gradient.T @ inputs
    elif _can_be_asked(gradient.device) and _adds_to_float32(gradient.device, gradient.dtype):
        torch.addmm(grad_head, gradient.T, inputs, out_dtype=torch.float32, out=grad_head)
    else:
        _add_product_in_parts(grad_head, gradient, inputs)


@cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit matrices to a float32 one; some releases refuse, or leave it out."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _add_product_in_parts(grad_head: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    # A product of all at once would be a second head in float32. Parts begin at multiples of 64 tokens, where 16-bit
    # matrices are still aligned.
    tokens = max(1, _GPU_HEAD_ELEMENTS // (64 * grad_head.shape[1])) * 64
    for part in _slices(grad_head.shape[0], tokens):
        grad_head[part] += torch.mm(gradient[:, part].T, inputs, out_dtype=torch.float32)


def without_rows(hidden: Tensor, row_weights: Tensor) -> Tensor:
    """``hidden`` with zeros in the rows of weight 0, so that what they held (even NaN) reaches no gradient."""
    return hidden.masked_fill((row_weights == 0)[..., None], 0.0)


def _fake_in_chunks(hidden: Tensor, head: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_head = _separated(inputs)[2]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        torch.empty_like(hidden if need_hidden else hidden[:0]),
        head.new_empty(head.shape if need_head else (0, head.shape[1]), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.head_dtype = inputs[1].dtype
    targets = _separated(inputs[2:])[0]
    ctx.of_targets = [[None] * len(values) if isinstance(values, list | tuple) else None for values in targets]
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad_total: Tensor | None, *of_the_rest: Tensor | None) -> tuple[Any, ...]:
    """With ``G = dL/dlogits`` of the rows that count, ``dL/dhidden = G head`` and ``dL/dhead = G^T hidden``."""
    refuse_second_derivative(*of_the_rest)
    if grad_total is None:
        return (None,) * len(ctx.needs_input_grad)
    losses, grad_hidden, grad_head = ctx.saved_tensors
    gradients = (
        # None where none was made.
        _scaled(grad_hidden, grad_total) if grad_hidden.shape[0] == losses.shape[0] else None,
        # To the head's dtype first: a scaled copy in float32 would be a head more.
        _scaled(grad_head.to(ctx.head_dtype), grad_total) if grad_head.shape[0] else None,
        *ctx.of_targets,
        # 0 for rows that were left out.
        grad_total * losses,
        *(None, None, None),
    )
    # Torch leaves out an argument that has its default, and then counts one gradient less.
    return gradients[: len(ctx.needs_input_grad)]


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    # A head's gradient is as large as the head: the usual factor 1 should not copy it.
    # What the compiler traces has no value: torch 2.10 does not say so of backward passes, whose tensors are fakes.
    has_value = type(factor) is Tensor and not torch.compiler.is_compiling()
    if has_value and factor.device.type == "cpu" and float(factor) == 1:
        return gradient
    return gradient * factor.to(gradient.dtype)
