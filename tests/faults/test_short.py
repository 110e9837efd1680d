"""The short pass of every battery."""

from __future__ import annotations

import pytest

from tests.faults.battery import BATTERIES, run_battery

# Processes that are killed and disks that fill up take longest, and have tests of their own beside their code.
SLOW = ("kills", "disks")


@pytest.mark.parametrize(
    "battery", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in BATTERIES]
)
def test_nothing_breaks(battery: str) -> None:
    outcome = run_battery(battery, long=False, seed=0)

    assert outcome.tried
    assert not outcome.broke, "\n".join(outcome.broke.values())
