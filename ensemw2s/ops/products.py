"""Products with weight matrices in float32 on a CPU, by the faster of the two libraries that torch brings along.

torch multiplies float32 matrices by MKL, which leaves half of an AMD processor with AVX-512 unused; oneDNN, which torch
multiplies other dtypes with, does not. The choice depends on the processor and on the shapes alone, never on a
stopwatch, so that two runs on one machine have the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ensemw2s.ops.checks import shown

VARIABLE = "ENSEMW2S_PRODUCTS"
LIBRARIES = ("auto", "torch", "onednn")
# Multiplications in a product from which on oneDNN is ahead: below, what a call costs counts for more.
_LEAST_MULTIPLICATIONS = 2**21
_LEAST_ROWS = 8


def product_library() -> str:
    """Name the library that multiplies float32 matrices on this processor: ``"onednn"``, or ``"torch"``'s choice.

    The environment variable ``ENSEMW2S_PRODUCTS`` decides: ``"auto"``, which is oneDNN on AMD processors with AVX-512,
    ``"torch"`` or ``"onednn"``.

    Raises:
        ValueError: The variable is something else, or asks for oneDNN where this torch has none.
    """
    asked = os.environ.get(VARIABLE, "auto")
    return "onednn" if _is_onednn(asked) and torch._C._get_mkldnn_enabled() else "torch"


@cache
def _is_onednn(asked: str) -> bool:
    if asked not in LIBRARIES:
        raise ValueError(f"{VARIABLE}={shown(asked)} is not one of {', '.join(LIBRARIES)}")
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if asked == "onednn" and not is_there:
        raise ValueError(f"{VARIABLE}=onednn, but this torch was built without oneDNN: leave the variable out")
    # What ATEN_CPU_CAPABILITY turns off is off here, too.
    is_faster = torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"
    return asked == "onednn" or (asked == "auto" and is_there and is_faster)


def _vendor() -> str | None:
    """Name the processor's maker, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), None)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``input W^T + b`` as ``torch.nn.functional.linear`` does, perhaps by oneDNN.

    Args:
        input: ``[..., d]``.
        weight: ``[m, d]``.
        bias: ``[m]``.

    Returns:
        ``[..., m]``, differentiable any number of times.
    """
    if not is_for_onednn(input, weight):
        return functional.linear(input, weight, bias)
    inputs = (input, weight, bias)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs):
        product: Tensor = _Linear.apply(*inputs)
        return product
    return _multiply(*inputs)


def is_for_onednn(input: Tensor, weight: Tensor) -> bool:
    """Return whether ``linear`` multiplies these two by oneDNN."""
    if torch.compiler.is_compiling() or input.dim() == 0 or weight.dim() != 2 or not weight.numel():
        return False
    rows = input.numel() // weight.shape[1]
    return (
        rows >= _LEAST_ROWS
        and rows * weight.numel() >= _LEAST_MULTIPLICATIONS
        and input.dtype == weight.dtype == torch.float32
        and input.shape[-1] == weight.shape[1]
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in (input, weight))
        and all(each.device.type == "cpu" and each.layout == torch.strided for each in (input, weight))
        and not torch.is_autocast_enabled("cpu")
        # Neither knows oneDNN's product.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and product_library() == "onednn"
    )


def _multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return _multiply(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad
        gradient = gradients[0]
        rows = gradient.flatten(0, -2) if need_weight or need_bias else gradient
        return (
            linear(gradient, weight.T) if need_input else None,
            linear(rows.T, input.flatten(0, -2).T) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )


class _LinearByOneDNN(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (linear if func is functional.linear else func)(*args, **(kwargs or {}))


def faster_linear_layers(model: Any, num_tokens: int) -> AbstractContextManager[Any]:
    """Within the block, this thread's linear layers multiply by ``linear`` where that is faster.

    Args:
        model: A transformers model, whose width says whether its products are large enough.
        num_tokens: The rows of its products: the tokens that it is about to read.
    """
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
    is_large = num_tokens * width**2 >= _LEAST_MULTIPLICATIONS
    return _LinearByOneDNN() if is_large and product_library() == "onednn" else nullcontext()
