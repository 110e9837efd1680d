"""Random calls of every op on every backend, hostile ones among them, against float64.

The long pass makes a million of them in a build with AddressSanitizer and UBSan, over all instruction sets. See
`tests.faults.op_calls` for what a call is and how to add one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.battery import Case

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("default", "avx2", "avx512")
# Calls under the sanitizers in the long pass: for each instruction set so many processes' shares.
SANITIZED_CALLS, SHARES = 1_000_000, 8


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Return the cases; see `tests.faults.battery`."""
    scale = 20 if long else 1
    yield Case("the compiled kernels, in this process", functools.partial(in_process, "cpp", 1200 * scale, seed))
    yield Case("plain torch", functools.partial(in_process, "reference", 400 * scale, seed + 1))
    for capability in CAPABILITIES[:2]:
        name = f"the compiled kernels, ATEN_CPU_CAPABILITY={capability}"
        yield Case(
            name, functools.partial(elsewhere, {"ATEN_CPU_CAPABILITY": capability}, "cpp", 250 * scale, seed + 2)
        )
    interpreted = {"TRITON_INTERPRET": "1"}
    yield Case("Triton, interpreted", functools.partial(elsewhere, interpreted, "triton", 20 * scale, seed + 3))
    if long:
        yield Case("CUDA, emulated", functools.partial(emulated_cuda, 2000, seed + 4))
        yield Case("the compiled kernels, under sanitizers", functools.partial(sanitized, SANITIZED_CALLS, seed + 5))


def in_process(impl: str, calls: int, seed: int, folder: Path) -> int:
    """Make random calls here, after the bad arguments."""
    from tests.faults.op_calls import Backend, make_calls, refuse_bad_arguments

    return refuse_bad_arguments(Backend(impl)) + make_calls(Backend(impl), calls, seed)


def emulated_cuda(calls: int, seed: int, folder: Path) -> int:
    """Make random calls of the CUDA kernels, whose threads are fibers here."""
    from tests.faults.op_calls import EmulatedCuda, make_calls

    return make_calls(EmulatedCuda(folder), calls, seed, large=False)


def elsewhere(environment: dict[str, str], impl: str, calls: int, seed: int, folder: Path) -> int:
    """Make random calls in a process of their own."""
    return run_calls([sys.executable], environment, impl, calls, seed)


def run_calls(python: list[str], environment: dict[str, str], impl: str, calls: int, seed: int) -> int:
    """Run `tests.faults.op_calls` by the command `python`; returns how many tries it made."""
    command = [*python, "-m", "tests.faults.op_calls", f"--calls={calls}", f"--seed={seed}", f"--impl={impl}"]
    command += ["--small"] if impl == "triton" else []
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise AssertionError(f"{' '.join(command)} with {environment}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}")
    return int(run.stdout.split()[-1])


def sanitized(calls: int, seed: int, folder: Path) -> int:
    """Make random calls under AddressSanitizer and UBSan: shares of each instruction set, on all cores."""
    script = ["bash", str(ROOT / "tests" / "sanitized.sh")]
    subprocess.run([*script, "build", sys.executable, str(folder)], check=True)
    python = [*script, "run", str(folder), sys.executable]
    each = -(-calls // (len(CAPABILITIES) * SHARES))

    def share(number: int) -> int:
        environment = {"ATEN_CPU_CAPABILITY": CAPABILITIES[number % len(CAPABILITIES)]}
        return run_calls(python, environment, "cpp", each, seed + 1000 * number)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(share, range(len(CAPABILITIES) * SHARES)))
