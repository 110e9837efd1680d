"""Timing of variants of one computation against each other.

Variants take turns within each round, so that a busy machine slows all of them alike, and inputs rotate through
buffers larger than the last-level cache, so that every read comes from memory. Only ratios within a row of the table
mean something on a shared machine.
"""

from __future__ import annotations

import csv
import ctypes
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from ensemw2s.ops import build_info

CACHE_BYTES = 96 * 2**20  # more than the last-level cache of the machines at hand
FIELDS = [
    "op",
    "case",
    "impl",
    "dtype",
    "T",
    "B",
    "V",
    "threads",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "bytes",
    "gb_per_s",
    "peak_mb",
    "ratio_to_op",
    "instruction_set",
    "cpu",
    "torch",
    "python",
    "commit",
]


@dataclass
class Case:
    """What is measured: names for the table, and the bytes of logits that one call reads."""

    op: str
    case: str
    dtype: torch.dtype
    T: int
    B: int
    V: int
    bytes: int


@dataclass
class Results:
    """Rows of the CSV, one per case and variant."""

    compiled: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def compare(
        self,
        benchmark: Any,
        case: Case,
        variants: dict[str, Callable[[Any], Any]],
        buffers: Sequence[Any],
        rounds: int = 7,
    ) -> dict[str, float]:
        """Time all variants in turns (the first one is "op") and return each one's median time over the op's.

        With several threads the op is timed on one of them as well.
        """
        turn = cycle(buffers)
        if torch.get_num_threads() > 1:
            variants = {**variants, "op, 1 thread": on_one_thread(variants["op"])}
        times: dict[str, list[float]] = {name: [] for name in variants}

        def one_round() -> None:
            for name, variant in variants.items():
                inputs = next(turn)
                start = time.perf_counter()
                variant(inputs)
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
        timed = {name: sorted(values[1:]) for name, values in times.items()}
        medians = {name: statistics.median(values) for name, values in timed.items()}
        op = medians["op"]
        for name, variant in variants.items():
            self.rows.append(
                {
                    **case.__dict__,
                    "impl": name,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "threads": 1 if name == "op, 1 thread" else torch.get_num_threads(),
                    "median_ms": f"{medians[name] * 1e3:.4g}",
                    "p20_ms": f"{quantile(timed[name], 0.2) * 1e3:.4g}",
                    "p80_ms": f"{quantile(timed[name], 0.8) * 1e3:.4g}",
                    "gb_per_s": f"{case.bytes / medians[name] / 1e9:.3g}",
                    "peak_mb": f"{peak_megabytes(variant, buffers[0]):.4g}",
                    "ratio_to_op": f"{medians[name] / op:.3g}",
                    **environment(),
                }
            )
        ratios = {name: medians[name] / op for name in variants}
        benchmark.extra_info.update({name: round(ratio, 3) for name, ratio in ratios.items()})
        return ratios

    def print_table(self) -> None:
        """One line per variant: time, ratio to the op, bandwidth, peak extra memory."""
        shown = ["op", "case", "impl", "dtype", "T", "B", "V", "median_ms", "ratio_to_op", "gb_per_s", "peak_mb"]
        widths = [max(len(name), *(len(str(row[name])) for row in self.rows), 0) for name in shown]
        print()
        for row in [dict(zip(shown, shown, strict=True)), *self.rows]:
            print("  ".join(str(row[name]).ljust(width) for name, width in zip(shown, widths, strict=True)))

    def write(self, path: Path) -> None:
        """The tidy CSV."""
        write_csv(path, self.rows, FIELDS)


def write_csv(path: Path, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    """Write rows as a tidy CSV with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def on_one_thread(variant: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same on one thread of torch's."""

    def alone(inputs: Any) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            variant(inputs)
        finally:
            torch.set_num_threads(threads)

    return alone


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest of the measured values."""
    return ordered[round(share * (len(ordered) - 1))]


def rotating(make: Callable[[], Any], bytes_each: int) -> list[Any]:
    """Enough buffers that one has left the cache before its next turn."""
    return [make() for _ in range(CACHE_BYTES // bytes_each + 2)]


def peak_megabytes(variant: Callable[[Any], Any], inputs: Any) -> float:
    """Peak resident memory of one call beyond what was there before, in MiB (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    variant(inputs)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def environment() -> dict[str, str]:
    """Versions and the machine, for every row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "instruction_set": build_info().get("instruction_set", "none"),
        "cpu": model[0] if model else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
