"""Checks on kinds, shapes, dtypes and scalars, made in Python before any kernel runs.

Every message names the argument and says what was expected and what came.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

COMBINES = ("prob", "logprob", "vote")
MASKED_LABEL = -100
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Weights beyond these are scaled before they become float32.
_SMALL_WEIGHT, _LARGE_WEIGHT = 1e-30, 1e30


def shown(value: object) -> str:
    """``repr(value)``, cut to a line; of an int with more digits than Python prints, what it is."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a {type(value).__name__} too long to print"


def combine_code(combine: str, allowed: Sequence[str] = COMBINES) -> int:
    """Position of ``combine`` in ``COMBINES``, which is how the compiled ops receive it."""
    if not isinstance(combine, str) or combine not in allowed:
        raise ValueError(f"combine={shown(combine)} is not one of {', '.join(allowed)}")
    return COMBINES.index(combine)


def check_tensor(tensor: Any, name: str, index: int | None = None) -> None:
    """Refuse anything but a dense tensor; ``index`` is its place in the list called ``name``."""
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_nested:
        return
    name = name if index is None else f"{name}[{index}]"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
    raise TypeError(f"{name} must be a dense tensor, got {kind}")


def tensor_list(tensors: Any, name: str) -> list[Any]:
    """The items of a list or tuple of tensors, or of a tensor along its first axis."""
    if isinstance(tensors, Tensor):
        check_tensor(tensors, name)
        if tensors.dim() < 2:
            raise ValueError(f"{name} must be [T, ..., V] or a list of T tensors, got shape {tuple(tensors.shape)}")
        return list(tensors.unbind(0))
    if isinstance(tensors, (str, bytes)) or not hasattr(tensors, "__iter__"):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(tensors).__name__}")
    return list(tensors)


def expert_list(logits: Tensor | Sequence[Tensor], name: str = "logits", *, detached: bool = False) -> list[Tensor]:
    """T tensors ``[..., V]`` from a list of them or from one stacked ``[T, ..., V]``, alike and with last stride 1.

    With ``detached`` none of them carries a gradient.
    """
    experts = tensor_list(logits, name)
    if not experts:
        raise ValueError(f"{name} holds no expert; at least one is needed")
    first = experts[0]
    check_tensor(first, name, 0)
    _check_vocabulary(first, name)
    shape, device, dtype, strided = first.shape, first.device, first.dtype, torch.strided
    for index, expert in enumerate(experts):
        # One look at what is right: a call to the ops costs as much as it looks.
        is_dense = isinstance(expert, Tensor) and expert.layout is strided and not expert.is_nested
        if not (is_dense and expert.shape == shape and expert.device == device and expert.dtype is dtype):
            _refuse_expert(expert, index, first, name)
        if detached and expert.requires_grad:
            expert = experts[index] = expert.detach()
        if expert.stride(-1) != 1:
            experts[index] = with_last_stride_one(expert)
    return experts


def _refuse_expert(expert: Any, index: int, first: Tensor, name: str) -> NoReturn:
    """Say what is wrong with an expert that is unlike the first one."""
    check_tensor(expert, name, index)
    if expert.shape != first.shape:
        raise ValueError(
            f"{name}[{index}] has shape {tuple(expert.shape)}, {name}[0] has {tuple(first.shape)}; all experts "
            "need the same shape and vocabulary"
        )
    if expert.device != first.device:
        raise ValueError(f"{name}[{index}] is on {expert.device}, {name}[0] on {first.device}")
    raise TypeError(f"{name}[{index}] is {expert.dtype}, {name}[0] is {first.dtype}")


def without_gradient(tensor: Tensor) -> Tensor:
    """The tensor itself, which costs nothing, or a detached view where a gradient is asked for."""
    return tensor.detach() if tensor.requires_grad else tensor


def check_head(hidden: Tensor, head: Tensor, names: tuple[str, str] = ("hidden", "head")) -> None:
    """Refuse a hidden state ``[..., d]`` and an output head ``[V, d]`` that do not fit each other."""
    for tensor, name in zip((hidden, head), names, strict=True):
        check_tensor(tensor, name)
        _check_dtype(tensor, name)
        if tensor.dim() < 1 or tensor.shape[-1] < 1:
            raise ValueError(f"{name} must end in an axis of at least one feature, got {tuple(tensor.shape)}")
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must be [V, d] with the d of {names[0]} {tuple(hidden.shape)}, got {tuple(head.shape)}"
        )
    if head.shape[0] < 1:
        raise ValueError(f"{names[1]} must be [V, d] with at least one token, got {tuple(head.shape)}")
    if head.dtype != hidden.dtype:
        raise TypeError(f"{names[1]} is {head.dtype}, {names[0]} is {hidden.dtype}")
    check_same_device(head, hidden, names[1])


def _check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_vocabulary(logits: Tensor, name: str) -> None:
    _check_dtype(logits, name)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must end in a vocabulary axis of at least one token, got {tuple(logits.shape)}")


def check_logits(logits: Tensor, name: str = "logits") -> Tensor:
    """``logits`` with last stride 1, after its kind, dtype and vocabulary axis are checked."""
    check_tensor(logits, name)
    _check_vocabulary(logits, name)
    return with_last_stride_one(logits)


def with_last_stride_one(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if its last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def expert_weights(
    weights: Tensor | Sequence[float], num_experts: int, like: Tensor, *, per_row: bool = False
) -> Tensor:
    """``weights`` in the accumulation dtype (float32, or float64 beside float64 logits).

    Args:
        weights: ``[T]``, or with ``per_row`` also ``[..., T]``.
        num_experts: T.
        like: Logits ``[..., V]``.
        per_row: Whether each row may have weights of its own.
    """
    dtype = accumulation_dtype(like)
    if not isinstance(weights, Tensor):
        numbers = _numbers(weights, "weights")
        # These are on the host, so that looking at them waits for no device.
        if not all(0 <= value < math.inf for value in numbers) or not any(numbers):
            raise ValueError(_bad_weights(numbers))
        weights = torch.tensor(numbers, dtype=torch.float64, device=like.device)
    check_tensor(weights, "weights")
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"weights must be numbers, got {weights.dtype}")
    shape, of_rows = tuple(weights.shape), (*like.shape[:-1], num_experts)
    if shape != (num_experts,) and not (per_row and shape == of_rows):
        in_rows = per_row and len(of_rows) > 1
        expected = f"({num_experts},), one per expert" + (f", or {of_rows}, those of each row" if in_rows else "")
        raise ValueError(f"weights must have shape {expected}, got {shape}")
    check_same_device(weights, like, "weights")
    if weights.dtype != dtype:
        weights = _in_range(weights, dtype).to(dtype)
    return weights.contiguous()


def _numbers(values: Any, name: str) -> list[float]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a tensor or a list of numbers, got {type(values).__name__}")
    return [number(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _in_range(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 weights that float32 cannot hold divided by the largest of their row, which changes no share."""
    if weights.dtype != torch.float64 or dtype == torch.float64:
        return weights
    largest = weights.detach().amax(-1, keepdim=True)
    is_scaled = largest.isfinite() & (largest > 0) & ((largest < _SMALL_WEIGHT) | (largest > _LARGE_WEIGHT))
    return weights / torch.where(is_scaled, largest, 1.0)


def check_weight_values(weights: Tensor) -> None:
    """Refuse weights that are negative or not finite, and ``[T]`` that are all zero.

    On CPU only, since elsewhere it would synchronise. A single row whose weights are all zero is reported by the op.
    """
    if weights.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = weights.detach()
    good = torch.isfinite(values) & (values >= 0)
    if weights.dim() > 1:
        refuse_rows("weights", values.flatten(0, -2), good.flatten(0, -2), "finite and non-negative")
    elif not bool(good.all()) or not bool((values > 0).any()):
        raise ValueError(_bad_weights(values.tolist()))


def refuse_rows(name: str, values: Tensor, good: Tensor, expected: str) -> None:
    """Refuse values ``[B]`` or ``[B, n]`` that are not ``good``; the message names the first one's row."""
    if not bool(good.all()):
        place = (~good).nonzero()[0].tolist()
        raise ValueError(f"{name} must be {expected}, got {values[tuple(place)].item()} in row {place[0]}")


def _bad_weights(values: list[float]) -> str:
    return f"weights must be finite, non-negative and not all zero, got {shown(values)}"


def check_same_device(tensor: Tensor, like: Tensor, name: str) -> None:
    """Refuse a tensor that lies on another device than the logits."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the logits are on {like.device}")


def check_integers(tensor: Any, shape: tuple[int, ...], like: Tensor, name: str, hint: str = "") -> Tensor:
    """The tensor, if it is a dense int64 one of ``shape`` on the device of ``like``; ``hint`` says who makes one."""
    if tensor is None:
        raise TypeError(f"{name} is missing: give an int64 tensor {list(shape)}" + (f"; {hint}" if hint else ""))
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} must be an int64 tensor, got {found}" + (f"; {hint}" if hint else ""))
    check_tensor(tensor, name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    check_same_device(tensor, like, name)
    return tensor


def check_label_values(labels: Tensor, vocabulary: int) -> None:
    """Refuse labels that are neither tokens nor ``MASKED_LABEL``; on CPU only, since elsewhere it would synchronise."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != MASKED_LABEL) & ((labels < 0) | (labels >= vocabulary))]
    if wrong.numel():
        raise ValueError(f"labels must be in [0, {vocabulary}) or {MASKED_LABEL}, got {int(wrong[0])}")


def row_weights(token_weights: Tensor, shape: tuple[int, ...], like: Tensor, labels: Tensor | None = None) -> Tensor:
    """``token_weights`` in the accumulation dtype, with 0 where the label is masked."""
    if not isinstance(token_weights, Tensor) or not token_weights.is_floating_point():
        kind = getattr(token_weights, "dtype", type(token_weights).__name__)
        raise TypeError(f"token_weights must be a floating point tensor, got {kind}")
    check_tensor(token_weights, "token_weights")
    if tuple(token_weights.shape) != shape:
        raise ValueError(f"token_weights must have shape {shape}, one per row, got {tuple(token_weights.shape)}")
    check_same_device(token_weights, like, "token_weights")
    weights = token_weights.to(accumulation_dtype(like))
    return (weights if labels is None else weights.masked_fill(labels == MASKED_LABEL, 0.0)).contiguous()


def number(value: Any, name: str, expected: str = "a number") -> float:
    """A real number as a float; infinity for an int that is too large for one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def check_temperature(temperature: float) -> float:
    """The temperature as a float, if it is positive and finite."""
    value = number(temperature, "temperature")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature={shown(temperature)} must be positive and finite")
    return value


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
