"""Compile every kernel that ``AHEAD_OF_TIME`` names in ``kernels/*.py``; prints registers, spills and shared memory.

A program, since it must not run in a process in which Triton interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (where registers spill to), SHARED and more of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    function = dump.partition(" Function ")[2]
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", function)}


def compile_kernel(entry: tuple, capability: int) -> dict:
    kernel, signature, constexprs, num_warps = entry
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    shape = " ".join(f"{name}={value}" for name, value in constexprs.items())
    return {"kernel": kernel.__name__, "shape": shape, "sm": capability, **resources(compiled.asm["cubin"])}


def main(module: str, capabilities: list[str]) -> None:
    for entry in getattr(import_module(module), "AHEAD_OF_TIME", []):
        for capability in capabilities:
            print(json.dumps(compile_kernel(entry, int(capability))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
