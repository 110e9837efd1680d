"""Compile every kernel that ``AHEAD_OF_TIME`` names in a module; prints registers, spills, instructions and more.

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
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def disassembled(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(CUOBJDUMP), option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (where registers spill to), SHARED and more of a compiled kernel, and how many instructions it has."""
    dump = disassembled(cubin, "--dump-resource-usage").partition(" Function ")[2]
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
    return found | {"instructions": len(re.findall(r"(?m)^\s+/\*[0-9a-f]{4,6}\*/", disassembled(cubin, "-sass")))}


def hints(kernel: Any, signature: dict[str, Any]) -> dict[tuple[int, ...], list]:
    """What a call tells of its arguments: torch's memory and the sizes of most models are divisible by 16."""
    found = {}
    for place, parameter in enumerate(kernel.params):
        kinds = signature[parameter.name]
        if kinds == "constexpr" or parameter.do_not_specialize:
            continue
        paths = [((place,), kinds)] if isinstance(kinds, str) else [((place, i), x) for i, x in enumerate(kinds)]
        found |= {path: [["tt.divisibility", 16]] for path, kind in paths if kind.startswith("*") or kind[0] == "i"}
    return found


def compile_kernel(entry: tuple, capability: int, hinted: bool) -> dict:
    kernel, signature, constexprs, num_warps = entry
    attrs = hints(kernel, signature) if hinted else {}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    shape = " ".join(f"{name}={value}" for name, value in constexprs.items())
    facts = {"kernel": kernel.__name__, "shape": shape, "sm": capability, "hinted": hinted}
    in_hand = constexprs.get("T", 1) * constexprs.get("TILE", 0) // (32 * num_warps)  # logits of a thread
    return facts | {"logits_per_thread": in_hand} | resources(compiled.asm["cubin"])


def main(module: str, capability: str, hinted: str) -> None:
    for entry in getattr(import_module(module), "AHEAD_OF_TIME", []):
        print(json.dumps(compile_kernel(entry, int(capability), hinted == "hinted")), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
