"""Checks on shapes, dtypes and scalars, made in Python before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COMBINES = ("prob", "logprob", "vote")
MASKED_LABEL = -100
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def combine_code(combine: str, allowed: Sequence[str] = COMBINES) -> int:
    """Position of ``combine`` in ``COMBINES``, which is how the compiled ops receive it."""
    if combine not in allowed:
        raise ValueError(f"combine={combine!r} is not one of {', '.join(allowed)}")
    return COMBINES.index(combine)


def expert_list(logits: Tensor | Sequence[Tensor], name: str = "logits") -> list[Tensor]:
    """T tensors ``[..., V]`` from a list of them or from one stacked ``[T, ..., V]``, alike and with last stride 1."""
    if isinstance(logits, Tensor):
        if logits.dim() < 2:
            raise ValueError(
                f"{name} must be [T, ..., V] or a list of T tensors [..., V], got shape {tuple(logits.shape)}"
            )
        experts = list(logits.unbind(0))
    else:
        experts = list(logits)
    if not experts:
        raise ValueError(f"{name} holds no expert; at least one is needed")
    first = experts[0]
    for index, expert in enumerate(experts):
        if not isinstance(expert, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {type(expert).__name__}")
        if expert.shape != first.shape:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(expert.shape)}, {name}[0] has {tuple(first.shape)}; all experts "
                "need the same shape and vocabulary"
            )
        if expert.device != first.device:
            raise ValueError(f"{name}[{index}] is on {expert.device}, {name}[0] on {first.device}")
        if expert.dtype != first.dtype:
            raise TypeError(f"{name}[{index}] is {expert.dtype}, {name}[0] is {first.dtype}")
    return [check_logits(expert, name) for expert in experts]


def check_head(hidden: Tensor, head: Tensor, names: tuple[str, str] = ("hidden", "head")) -> None:
    """Refuse a hidden state ``[..., d]`` and an output head ``[V, d]`` that do not fit each other."""
    check_logits(hidden, names[0])
    check_logits(head, names[1])
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} must be [V, d] with the d of {names[0]} {tuple(hidden.shape)}, got {tuple(head.shape)}"
        )
    if head.dtype != hidden.dtype:
        raise TypeError(f"{names[1]} is {head.dtype}, {names[0]} is {hidden.dtype}")
    check_same_device(head, hidden, names[1])


def check_logits(logits: Tensor, name: str = "logits") -> Tensor:
    """``logits`` with last stride 1, after its dtype and vocabulary axis are checked."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must end in a vocabulary axis of at least one token, got {tuple(logits.shape)}")
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def expert_weights(weights: Tensor | Sequence[float], num_experts: int, like: Tensor) -> Tensor:
    """``weights`` as a ``[T]`` tensor in the accumulation dtype (float32, or float64 beside float64 logits)."""
    dtype = accumulation_dtype(like)
    if not isinstance(weights, Tensor):
        weights = torch.tensor(weights, dtype=dtype, device=like.device)
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    if weights.shape != (num_experts,):
        raise ValueError(f"weights must have shape ({num_experts},), one per expert, got {tuple(weights.shape)}")
    check_same_device(weights, like, "weights")
    return weights.to(dtype).contiguous()


def check_weight_values(weights: Tensor) -> None:
    """Refuse weights that are negative, not finite or all zero; on CPU only, since elsewhere it would synchronise."""
    if weights.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = weights.detach()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()) or not bool((values > 0).any()):
        raise ValueError(f"weights must be finite, non-negative and not all zero, got {values.tolist()}")


def check_same_device(tensor: Tensor, like: Tensor, name: str) -> None:
    """Refuse a tensor that lies on another device than the logits."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the logits are on {like.device}")


def check_integers(tensor: Tensor, shape: tuple[int, ...], like: Tensor, name: str) -> None:
    """Refuse anything but an int64 tensor of ``shape`` on the device of ``like``."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    check_same_device(tensor, like, name)


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
    if tuple(token_weights.shape) != shape:
        raise ValueError(f"token_weights must have shape {shape}, one per row, got {tuple(token_weights.shape)}")
    check_same_device(token_weights, like, "token_weights")
    weights = token_weights.to(accumulation_dtype(like))
    return (weights if labels is None else weights.masked_fill(labels == MASKED_LABEL, 0.0)).contiguous()


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a positive finite number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")


def check_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Refuse sampling settings outside their ranges."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be finite and at least 0 (0 is greedy)")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be at least 0 (0 is off)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1] (1 is off)")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be in [0, 1] (0 is off)")


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
