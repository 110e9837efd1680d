"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh inputs in every run; the seed is printed by pytest when a test fails."""
    seed = int(torch.randint(0, 2**31, (), generator=torch.Generator().manual_seed(torch.seed() % 2**31)))
    print(f"inputs from seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh_compiler() -> None:
    """Forgets what torch.compile has seen: parametrised tests would count as recompilations of one function."""
    torch.compiler.reset()
