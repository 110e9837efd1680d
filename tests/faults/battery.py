"""What a battery is: a module of this folder with `cases(long, seed)`, each case an attempt to break the package.

A case raises where the package broke: it lost a file, let code in, gave a wrong value or no value, or failed without
the sentence that the case expects. The short pass of all batteries is a part of the suite (`test_short.py`), the long
one takes about an hour (`make check-faults`).
"""

from __future__ import annotations

import importlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Each is a module of this folder, in the order in which they run.
BATTERIES = ("ops", "threads", "folders", "inputs", "kills", "twins", "disks")


class Case(NamedTuple):
    """One attempt.

    Attributes:
        name: tells it from the others of its battery.
        run: gets an empty folder of its own; returns how many tries it stands for (None: one) and raises if any broke.
    """

    name: str
    run: Callable[[Path], int | None]


@dataclass
class Outcome:
    """What became of a battery: the number of tries, and for each broken case its name and traceback."""

    tried: int = 0
    broke: dict[str, str] = field(default_factory=dict)


def cases(battery: str, *, long: bool, seed: int) -> Iterator[Case]:
    """Return the cases of a battery; the same seed gives the same ones."""
    return importlib.import_module(f"tests.faults.{battery}").cases(long, seed)


def run_battery(battery: str, *, long: bool, seed: int, say: Callable[[str], None] = print) -> Outcome:
    """Run all cases of a battery and say which broke."""
    outcome = Outcome()
    for case in cases(battery, long=long, seed=seed):
        with tempfile.TemporaryDirectory(prefix=f"faults-{battery}-") as folder:
            try:
                outcome.tried += case.run(Path(folder)) or 1
            except Exception:
                outcome.tried += 1
                outcome.broke[case.name] = traceback.format_exc()
                say(f"{battery}: {case.name} broke\n{outcome.broke[case.name]}")
    return outcome
