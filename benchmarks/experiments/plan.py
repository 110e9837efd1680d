"""Compare what `ensemw2s plan` estimates with what the run then takes, phase by phase.

    python -m benchmarks.experiments.plan examples/insert_letters.yaml [--quick] [--cpu-time] [key=value ...]

Other work on the machine disturbs seconds. `--cpu-time` counts this process's own seconds of computing instead, in
estimate and run alike, which is fair with one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_intermixed_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.cpu_time:
        time.perf_counter = time.process_time
    from ensemw2s.experiments.config import load_config
    from ensemw2s.experiments.experiment import Experiment
    from ensemw2s.experiments.plan import plan

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(options.config, [*options.overrides, f"output_dir={folder}"], quick=options.quick)
        start = time.perf_counter()
        estimates = plan(config)
        print(f"the estimate itself took {time.perf_counter() - start:.1f} s")
        records = Experiment(config).run()
        size = sum(file.stat().st_size for file in config.folder.rglob("*") if file.is_file())
    show(estimates, {r["phase"]: r for r in records if r["kind"] == "phase"}, size)


def show(estimates: list[Any], taken: dict[str, dict[str, Any]], size: int) -> None:
    names = ("tokens", "flops", "seconds", "peak_memory")
    print("| phase | " + " | ".join(f"{name}: estimate / run" for name in names) + " |\n|---|" + "---|" * len(names))
    sums = {name: [0.0, 0.0] for name in names}
    for estimate in estimates:
        cells = []
        for name in names:
            ours, theirs = getattr(estimate, name), taken[estimate.phase][name]
            sums[name] = [sums[name][0] + ours, sums[name][1] + theirs]
            cells.append(f"{ours:.4g} / {theirs:.4g}")
        print(f"| {estimate.phase} | " + " | ".join(cells) + " |")
    ratios = " | ".join("" if name == "peak_memory" else f"{a / b:.3f}" for name, (a, b) in sums.items())
    print(f"| all, estimate : run | {ratios} |")
    disk = sum(estimate.disk for estimate in estimates)
    print(f"disk: estimate {disk / 1e6:.1f} MB, run {size / 1e6:.1f} MB, ratio {disk / size:.3f}")


if __name__ == "__main__":
    sys.exit(main())
