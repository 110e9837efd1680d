"""`python -m tests.faults [--short] [--only BATTERY ...] [--seed N]`: run the batteries and count what broke."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import time

# Read when huggingface_hub is imported: a case that reaches for the hub fails at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from tests.faults.battery import BATTERIES, run_battery


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the pass that the suite runs, a minute")
    parser.add_argument("--only", nargs="+", choices=BATTERIES, default=BATTERIES, metavar="BATTERY")
    parser.add_argument("--seed", type=int, default=0, help="other random cases (default: 0)")
    options = parser.parse_args()
    # What is imported is left out of the garbage collections that end each training.
    for battery in options.only:
        importlib.import_module(f"tests.faults.{battery}")
    gc.collect()
    gc.freeze()
    print(f"{'battery':<10} {'tried':>9} {'held':>9} {'broke':>6} {'seconds':>8}", flush=True)
    broke = 0
    for battery in options.only:
        begun = time.monotonic()
        outcome = run_battery(battery, long=not options.short, seed=options.seed)
        bad = len(outcome.broke)
        seconds = time.monotonic() - begun
        print(f"{battery:<10} {outcome.tried:>9,} {outcome.tried - bad:>9,} {bad:>6} {seconds:>8.0f}", flush=True)
        broke += bad
    return 1 if broke else 0


if __name__ == "__main__":
    sys.exit(main())
