"""Options, threads and the CSV of the benchmark suite: `pytest benchmarks --benchmark-disable-gc -s`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.measure import Results


def pytest_addoption(parser):
    group = parser.getgroup("ensemw2s benchmarks")
    group.addoption("--threads", type=int, default=2, help="torch threads (default 2)")
    group.addoption("--csv", default=None, help="write the results to this file, benchmarks/results/NAME.csv say")
    group.addoption("--compile", action="store_true", help="also time torch.compile of the eager code (slow to build)")


@pytest.fixture(scope="session")
def results(request):
    collected = Results(compiled=request.config.getoption("--compile"))
    yield collected
    collected.print_table()
    if request.config.getoption("--csv"):
        collected.write(Path(request.config.getoption("--csv")))


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
