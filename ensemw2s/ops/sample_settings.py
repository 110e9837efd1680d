"""The settings of ``mixture_sample``, each one for all rows or one for every row: their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ensemw2s.ops.checks import check_same_device, check_tensor, number, refuse_rows, shown, without_gradient

# Compiled ops receive whole numbers in 64 bits.
_LARGEST_INTEGER = 2**63 - 1
# How many of the likeliest tokens can be asked for: serving APIs allow 20, and a kernel keeps them in order on chip.
MOST_TOP_LOGPROBS = 64
REAL_DTYPES = (torch.float32, torch.float64)


class _Kind(NamedTuple):
    """What a setting may be: its range, in words and as a test on numbers and tensors alike, and its dtypes."""

    default: float
    expected: str
    in_range: Callable[[Any], Any]
    dtypes: tuple[torch.dtype, ...] = REAL_DTYPES


_KINDS = {
    "temperature": _Kind(1.0, "finite and at least 0 (0 is greedy)", lambda x: (x >= 0) & (x < math.inf)),
    "top_k": _Kind(
        0,
        "at least 0 (0 is off) and below 2**63",
        lambda x: x >= 0,
        (torch.int32, torch.int64),
    ),
    "top_p": _Kind(1.0, "in (0, 1] (1 is off)", lambda x: (x > 0) & (x <= 1)),
    "min_p": _Kind(0.0, "in [0, 1] (0 is off)", lambda x: (x >= 0) & (x <= 1)),
}


class SampleSettings(NamedTuple):
    """What ``mixture_sample`` is asked for: each a number for all rows, or a tensor ``[B]`` of each row's.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
    """

    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    min_p: float | Tensor

    def arguments(self) -> tuple[Any, ...]:
        """As compiled ops take them: four numbers, off where there is a tensor, and four tensors or None."""
        if not any(map(torch.is_tensor, self)):
            return (*self, None, None, None, None)
        numbers = [_KINDS[name].default if isinstance(x, Tensor) else x for name, x in self._asdict().items()]
        return (*numbers, *(x if isinstance(x, Tensor) else None for x in self))

    def repeated(self, times: int) -> SampleSettings:
        """The settings of rows that are each there so many times, one behind the other."""
        values: Any = (x.repeat_interleave(times) if isinstance(x, Tensor) else x for x in self)
        return SampleSettings(*values)

    def check_values(self) -> None:
        """Refuse tensors with a value out of its range; on CPU only, since elsewhere it would synchronise."""
        for name, value in zip(_KINDS, self, strict=True):
            if isinstance(value, Tensor) and value.device.type == "cpu" and not torch.compiler.is_compiling():
                refuse_rows(name, value, _KINDS[name].in_range(value), _KINDS[name].expected)

    def usable(self) -> Tensor | bool:
        """Whether a row's settings are in their ranges, bool ``[B]``; True where numbers serve all rows."""
        rows: Tensor | bool = True
        for name, value in zip(_KINDS, self, strict=True):
            if isinstance(value, Tensor):
                rows = _KINDS[name].in_range(value) & rows
        return rows


def sample_settings(temperature: Any, top_k: Any, top_p: Any, min_p: Any, logits: Tensor) -> SampleSettings:
    """The settings beside logits ``[B, V]``, if their kinds are right, and the numbers among them in their ranges."""
    return SampleSettings(
        _real(temperature, "temperature", logits),
        _count(top_k, logits),
        _real(top_p, "top_p", logits),
        _real(min_p, "min_p", logits),
    )


def _real(value: Any, name: str, logits: Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return of_rows(value, name, logits)
    found = value if type(value) is float else number(value, name, "a number, or a tensor [B] of each row's")
    if not _KINDS[name].in_range(found):
        raise ValueError(f"{name}={shown(value)} must be {_KINDS[name].expected}")
    return found


def _count(value: Any, logits: Tensor) -> int | Tensor:
    if isinstance(value, Tensor):
        return of_rows(value, "top_k", logits, _KINDS["top_k"].dtypes)
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"top_k must be an int or a tensor of them, got {type(value).__name__}")
    count = int(value)
    if not 0 <= count <= _LARGEST_INTEGER:
        raise ValueError(f"top_k={shown(count)} must be {_KINDS['top_k'].expected}")
    return count


def of_rows(value: Tensor, name: str, like: Tensor, dtypes: tuple[torch.dtype, ...] = REAL_DTYPES) -> Tensor:
    """A tensor ``[B]`` of each row's value of a setting, beside ``like`` ``[B, ...]`` and without a gradient."""
    check_tensor(value, name)
    if value.dtype not in dtypes:
        kind = "a number" if dtypes[0].is_floating_point else "an int"
        raise TypeError(f"{name} must be {kind}, or of {dtypes[0]} or {dtypes[1]}, got {value.dtype}")
    if value.shape != like.shape[:1]:
        raise ValueError(f"{name} must be one value, or have shape ({like.shape[0]},), got {tuple(value.shape)}")
    check_same_device(value, like, name)
    return without_gradient(value)


def check_top_logprobs(top_logprobs: Any, vocabulary: int) -> int:
    """The number of likeliest tokens that are asked for, if kernels can find so many."""
    if type(top_logprobs) is not int and (isinstance(top_logprobs, bool) or not isinstance(top_logprobs, Integral)):
        raise TypeError(f"top_logprobs must be an int, got {type(top_logprobs).__name__}")
    count, most = int(top_logprobs), min(MOST_TOP_LOGPROBS, vocabulary)
    if not 0 <= count <= most:
        of_tokens = "" if most == MOST_TOP_LOGPROBS else f", the size of the vocabulary (at most {MOST_TOP_LOGPROBS})"
        raise ValueError(f"top_logprobs={shown(count)} must be between 0 (off) and {most}{of_tokens}")
    return count
