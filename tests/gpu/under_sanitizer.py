"""A few small calls of every op, for compute-sanitizer: `compute-sanitizer python -m tests.gpu.under_sanitizer`."""

from __future__ import annotations

import torch

from tests.gpu.test_gpu_ops import BACKENDS, flat, small_calls

for impl in sorted({impl for _, impl in BACKENDS}):
    for name, call in small_calls(impl).items():
        results = flat(call())
        torch.cuda.synchronize()
        print(impl, name, len(results), "results", flush=True)
