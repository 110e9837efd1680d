"""Which backend runs an op: loading the compiled library, the choice, and what ``ensemw2s env`` reports.

Schemas, fakes and gradients are registered from Python, so every op exists without the compiled library; that
library only adds CPU implementations to them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ensemw2s.ops.checks import shown
from ensemw2s.ops.products import product_library

IMPLEMENTATIONS = ("auto", "reference", "cpp", "cuda", "triton")
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILED_BACKEND = {"cpu": "cpp", "cuda": "cuda"}  # device type -> the backend registered for it
_MOST_EXPERTS, _LARGEST_VOCABULARY = 64, 2**21  # of the CUDA kernels (csrc/cuda/launch.h)
OLDEST_CAPABILITY = (8, 0)  # of a GPU: the CUDA kernels are built for it and later ones, and bfloat16 needs it
_DECLARED: list[str] = []


def _load_library() -> str | None:
    """Load ``ensemw2s/_C*.so`` and return why it is missing, or None when it is loaded."""
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not found:
        return "the package was installed without its compiled library (no C++ compiler, or ENSEMW2S_BUILD=none)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} could not be loaded: {error}"
    return None


_WHY_MISSING = _load_library()


def declare(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    public: bool = True,
) -> None:
    """Register ``ensemw2s::name`` and its Triton twin with schema, fake and gradient.

    A twin because on a GPU both the CUDA kernel and the Triton one can be asked for.

    Args:
        name: The op's name, which is also that of its file in ``kernels/``.
        schema: Arguments and results in torch's schema language.
        fake: Gives shapes and dtypes without data.
        gradient: ``backward`` and ``setup_context`` as ``torch.library.register_autograd`` takes them.
        public: False for a part that only other ops call; it has no backends of its own to choose from.
    """
    for qualified in (f"ensemw2s::{name}", f"ensemw2s::{_twin(name)}"):
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        torch.library.define(qualified, schema, tags=tags)
        torch.library.register_fake(qualified, fake)
        if gradient:
            backward, setup_context = gradient
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    if public:
        _DECLARED.append(name)


def _twin(name: str) -> str:
    return f"{name}_triton"


def implement_in_triton(name: str) -> None:
    """Let ``ensemw2s.kernels.<name>.<name>`` run the op on CUDA tensors, and on CPU ones under Triton's interpreter."""
    _implement_twin(name, partial(_run_kernel, name))


def _run_kernel(name: str, *args: Any, **options: Any) -> Any:
    # Imported on first use: triton takes a second to load, and is not needed without a GPU.
    return getattr(import_module(f"ensemw2s.kernels.{name}"), name)(*args, **options)


def implement_in_chunks(name: str, function: Callable[..., Any], row_op: str) -> None:
    """Make the op out of matrix products and another op of this package, which ``function`` gets before its inputs.

    On the CPU that other op's compiled kernel serves, on CUDA its Triton kernel. That writes the gradient in the dtype
    of the logits, in which the products read it.
    """

    def run_row_kernel(logits: torch.Tensor, *args: Any) -> Any:
        return _run_kernel(row_op, logits, *args, gradient_dtype=logits.dtype)

    if _WHY_MISSING is None:
        op = getattr(torch.ops.ensemw2s, row_op).default
        torch.library.impl(f"ensemw2s::{name}", "CPU", partial(function, op))
    if _is_registered(_twin(row_op), "cuda"):
        _implement_twin(name, partial(function, run_row_kernel))


def _implement_twin(name: str, function: Callable[..., Any]) -> None:
    if find_spec("triton") is None:
        return
    keys = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)
    for key in keys:
        torch.library.impl(f"ensemw2s::{_twin(name)}", key, function)


def _is_registered(op: str, device_type: str) -> bool:
    key = "CUDA" if device_type == "cuda" else device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ensemw2s::{op}", key)


def available_backends(device_type: str = "cpu") -> dict[str, tuple[str, ...]]:
    """For each op, the backends that can run on tensors of a device type, the preferred one first."""
    return {op: (*_fast_backends(op, torch.device(device_type)), "reference") for op in _DECLARED}


@cache
def _fast_backends(op: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda" and _too_old(device.index):
        return ()
    compiled = _COMPILED_BACKEND.get(device.type)
    backends = (compiled,) if compiled and _is_registered(op, device.type) else ()
    return backends + ("triton",) * _is_registered(_twin(op), device.type)


def _too_old(index: int | None) -> str | None:
    """Why no kernel of this package runs on a GPU (None is the current one), or None."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    return "the kernels need a GPU of compute capability {}.{}, this one has {}.{}".format(
        *OLDEST_CAPABILITY, *capability
    )


def _why_slow(device: torch.device) -> str:
    """Why an op has nothing but plain torch on a device, and how to get more."""
    if device.type == "cpu":
        return _WHY_MISSING or "it has no compiled CPU kernel"
    return _too_old(device.index) or "triton is not installed (pip install triton) and no CUDA kernel was built"


def _why_not(requested: str, device_type: str) -> str:
    """Why a backend that was asked for cannot run."""
    if requested == "cpp" and device_type == "cpu" and _WHY_MISSING:
        return _WHY_MISSING
    if requested == "triton" and device_type == "cpu":
        return "Triton's kernels run on CUDA tensors; its interpreter, which TRITON_INTERPRET=1 turns on, on CPU ones"
    return "not available"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@torch.compiler.assume_constant_result
def _choose(op: str, impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    requested = _requested(impl)
    if not isinstance(requested, str) or requested not in IMPLEMENTATIONS:
        source = "impl" if impl is not None else "ENSEMW2S_IMPL"
        raise ValueError(f"{source}={shown(requested)} is not one of {', '.join(IMPLEMENTATIONS)}")
    if requested == "reference":
        return "reference"
    fast, device_type = _fast_backends(op, device), device.type
    if requested == "auto":
        # Triton on CPU tensors is its interpreter, which nobody wants unasked.
        preferred = [name for name in fast if name != "triton" or device_type != "cpu"]
        if not preferred and device_type in _COMPILED_BACKEND:
            _warn_once(f"{op} runs in plain torch: {_why_slow(device)}")
        return preferred[0] if preferred and dtype in COMPILED_DTYPES else "reference"
    if requested not in fast:
        why = _why_not(requested, device_type)
        raise ValueError(f"impl={requested!r} cannot run {op} on a {device_type} tensor: {why}")
    if dtype not in COMPILED_DTYPES:
        raise TypeError(f"impl={requested!r} takes float32, bfloat16 or float16, got {dtype}; use impl='reference'")
    return requested


def backend_for(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, impl: str | None = None
) -> str:
    """Name of the backend that runs ``op`` on tensors of a device and dtype.

    ``"auto"`` takes the compiled kernel where there is one for the device and dtype, else plain torch; on a CPU
    without the compiled library it warns once and says why.

    Args:
        op: Name of the op, such as ``"mixture_sample"``.
        device: Where the tensors lie.
        dtype: Their dtype; float64 always runs in plain torch.
        impl: A backend, ``"auto"``, or None for what ``ENSEMW2S_IMPL`` says (``"auto"`` if unset).

    Raises:
        ValueError: ``op`` or ``impl`` is unknown, or that backend cannot run here.
        TypeError: That backend does not take ``dtype``.
    """
    if op not in _DECLARED:
        raise ValueError(f"op={shown(op)} is not one of {', '.join(_DECLARED)}")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or its name, got {type(device).__name__}: give tensor.device")
    return _choose(op, impl, torch.device(device), dtype)


def choose_for_mixture(op: str, impl: str | None, experts: Sequence[torch.Tensor]) -> str:
    """Name of the backend for T experts' logits ``[..., V]``; not CUDA where they are too many for it."""
    first = experts[0]
    chosen = _choose(op, impl, first.device, first.dtype)
    too_many = len(experts) > _MOST_EXPERTS or first.shape[-1] > _LARGEST_VOCABULARY
    return _beside_cuda(op, impl, first.device) if chosen == "cuda" and too_many else chosen


@torch.compiler.assume_constant_result
def _beside_cuda(op: str, impl: str | None, device: torch.device) -> str:
    if _requested(impl) != "auto":
        # The kernel says what it takes.
        return "cuda"
    others = [name for name in _fast_backends(op, device) if name != "cuda"] or ["reference"]
    limits = f"{_MOST_EXPERTS} experts and {_LARGEST_VOCABULARY} tokens"
    _warn_once(f"{op} runs on {others[0]}: the CUDA kernels take at most {limits}")
    return others[0]


def _requested(impl: str | None) -> str:
    # An empty variable is one that is not set.
    return impl if impl is not None else os.environ.get("ENSEMW2S_IMPL") or "auto"


def run(name: str, chosen: str, *args: Any) -> Any:
    """Call an op on the backend that was chosen; what it says of values inside its tensors becomes a ``ValueError``.

    A kernel behind the stable ABI can only raise ``RuntimeError``. Inside ``torch.compile`` it stays one.
    """
    op = getattr(torch.ops.ensemw2s, _twin(name) if chosen == "triton" else name).default
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        marker = "[ensemw2s] "
        if marker not in str(error):
            raise
        raise ValueError(str(error).partition(marker)[2].splitlines()[0]) from None


def build_info() -> dict[str, str]:
    """What was compiled and what runs: ``compiled``, ``compiler``, ``instruction_set``, ``triton``, ``products``.

    ``products`` is the library that multiplies float32 matrices on the CPU, see ``products.product_library``.
    """
    info = {
        "compiled": "no" if _WHY_MISSING else "yes",
        "triton": "yes" if find_spec("triton") else "no",
        "products": product_library(),
    }
    if _WHY_MISSING:
        return {**info, "reason": _WHY_MISSING}
    host = import_module("ensemw2s._host")
    return {**info, "compiler": host.compiler(), "instruction_set": host.instruction_set()}
