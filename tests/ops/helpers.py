"""Marks and checks shared by the op tests."""

from __future__ import annotations

import pytest
import torch

from ensemw2s.ops import available_backends

# Compiled kernels are skipped where there are none (ENSEMW2S_BUILD=none); the reference always runs.
HAS_CPP = "cpp" in available_backends("cpu")["mixture_sample"]
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="the package was installed without its compiled library")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_as_good_as_torch(kernel: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, atol: float) -> None:
    """error(kernel) <= 2 error(plain torch) + atol, both against the float64 reference; -inf and NaN in one place."""
    assert torch.equal(kernel.isnan(), exact.isnan())
    assert torch.equal(kernel == -torch.inf, exact == -torch.inf)
    finite = exact.isfinite()
    error = (kernel.double() - exact)[finite].abs()
    allowed = 2 * (plain.double() - exact)[finite].abs().max() if finite.any() else 0.0
    assert not finite.any() or error.max() <= allowed + atol, f"error {error.max():.3g}, allowed {allowed + atol:.3g}"
