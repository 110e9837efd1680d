"""Fixtures of the CUDA tests."""

from __future__ import annotations

import pytest

from tests.cuda.emulated import EmulatedKernels, compile_emulation
from tests.ops.conftest import generator  # noqa: F401


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> EmulatedKernels:
    """The CUDA kernels on the host, built once."""
    return EmulatedKernels(compile_emulation(tmp_path_factory.mktemp("emulated") / "kernels.so"))
