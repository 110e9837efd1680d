"""The short pass of every battery."""

from __future__ import annotations

import pytest

from tests.faults.battery import BATTERIES, run_battery


@pytest.mark.parametrize("battery", BATTERIES)
def test_nothing_breaks(battery: str) -> None:
    outcome = run_battery(battery, long=False, seed=0)

    assert outcome.tried
    assert not outcome.broke, "\n".join(outcome.broke.values())
