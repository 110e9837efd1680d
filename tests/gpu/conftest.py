"""Without a GPU these tests are not collected; `ENSEMW2S_TEST_DEVICE=cpu` runs them on Triton's interpreter."""

from __future__ import annotations

import os

import torch

from tests.ops.conftest import generator

__all__ = ["generator"]

collect_ignore_glob = [] if torch.cuda.is_available() or "ENSEMW2S_TEST_DEVICE" in os.environ else ["test_*.py"]
