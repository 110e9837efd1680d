"""Products with weight matrices in float32 on a CPU, by the faster of the two libraries that torch brings along.

torch multiplies float32 matrices by MKL, which leaves half of an AMD processor with AVX-512 unused; oneDNN, which torch
multiplies other dtypes with, does not. The choice depends on the processor and on the shapes alone, never on a
stopwatch, so that two runs on one machine have the same bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ensemw2s.ops.checks import shown

VARIABLE = "ENSEMW2S_PRODUCTS"
LIBRARIES = ("auto", "torch", "onednn")
# Multiplications in a product from which on oneDNN is ahead: below, what a call costs counts for more.
_LEAST_MULTIPLICATIONS = 2**21
_LEAST_ROWS = 8
# Weights of at least so many numbers are copied into oneDNN's order, for at most so many rows: with more, both orders
# are as fast. Of all weights together so many bytes.
_LEAST_PACKED, _MOST_PACKED_ROWS, _MOST_PACKED_BYTES = 2**16, 64, 2**31


@torch.compiler.assume_constant_result
def product_library() -> str:
    """Name the library that multiplies float32 matrices on this processor: ``"onednn"``, or ``"torch"``'s choice.

    The environment variable ``ENSEMW2S_PRODUCTS`` decides: ``"auto"``, which is oneDNN on AMD processors with AVX-512,
    ``"torch"`` or ``"onednn"``.

    Raises:
        ValueError: The variable is something else, or asks for oneDNN where this torch has none.
    """
    asked = os.environ.get(VARIABLE) or "auto"
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
    if not weight.numel():
        return False
    rows = input.numel() // weight.shape[-1]
    large = rows >= _LEAST_ROWS and rows * weight.numel() >= _LEAST_MULTIPLICATIONS
    return large and _can_be_onednns(input, weight)


def _can_be_onednns(input: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and input.dim() > 0
        and weight.dim() == 2
        and input.dtype == weight.dtype == torch.float32
        and input.shape[-1] == weight.shape[1]
        and all(type(each) in (Tensor, nn.Parameter) for each in (input, weight))
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


class FrozenWeights:
    """Products with weights that do not change while they are used, for passes over few rows.

    Such a pass takes as long as its weights take to be read, which is half as long in oneDNN's own order. Copies in
    that order are made when they are first of use. All objects share them, at most 2 GiB, and they go with their
    weights. An object looks once whether a copy is still one of the weight, by the sums of its rows: not every way to
    write into a tensor leaves a trace (peft merges an adapter through ``weight.data``).
    """

    def __init__(self) -> None:
        self._found: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute ``linear``, by a copy of the weight where that is faster."""
        packed = self._packed(weight) if _is_for_packed(input, weight) else None
        return linear(input, weight, bias) if packed is None else _multiply(input, packed, bias)

    def _packed(self, weight: Tensor) -> Tensor | None:
        state = _state(weight)
        found: tuple[tuple[int, int], Tensor | None] | None = self._found.get(weight)
        if found is None or found[0] != state:
            found = self._found[weight] = state, _shared_copy(weight)
        return found[1]


def _is_for_packed(input: Tensor, weight: Tensor) -> bool:
    return (
        weight.numel() >= _LEAST_PACKED
        and 0 < input.numel() <= _MOST_PACKED_ROWS * weight.shape[-1]
        and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        # It does not count its changes.
        and not weight.is_inference()
        and _can_be_onednns(input, weight)
    )


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


class _Copy(NamedTuple):
    state: tuple[int, int]
    sums: Tensor  # of the weight's rows
    size: int  # in bytes
    weight: Tensor


_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()
_copying = threading.Lock()


def _shared_copy(weight: Tensor) -> Tensor | None:
    """Return a weight in oneDNN's order; None where no more may be kept."""
    with _copying, torch.inference_mode(False), torch.no_grad():
        plain, state = weight.detach(), _state(weight)
        sums = plain.sum(1)
        known: _Copy | None = _copies.pop(weight, None)
        if known is None or known.state != state or not torch.equal(known.sums, sums):
            if sum(each.size for each in _copies.values()) + plain.nbytes > _MOST_PACKED_BYTES:
                return None
            packed = torch.ops.mkldnn._reorder_linear_weight.default(plain, None)
            known = _Copy(state, sums, plain.nbytes, packed)
        _copies[weight] = known
        return known.weight


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


class _LinearBy(TorchFunctionMode):
    """Lets linear layers call another function of the same arguments."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (self.product if func is functional.linear else func)(*args, **(kwargs or {}))


def faster_linear_layers(
    model: Any, num_tokens: int, frozen: FrozenWeights | None = None
) -> AbstractContextManager[Any]:
    """Within the block, this thread's linear layers multiply by ``linear`` where that is faster.

    Args:
        model: A transformers model, whose width says whether its products are large enough.
        num_tokens: The rows of its products: the tokens that it is about to read.
        frozen: Where the weights do not change: what multiplies by them if the rows are few.
    """
    if product_library() != "onednn":
        return nullcontext()
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
    if frozen is not None and width**2 >= _LEAST_PACKED:
        return _LinearBy(frozen.linear)
    return _LinearBy(linear) if num_tokens * width**2 >= _LEAST_MULTIPLICATIONS else nullcontext()
