"""The machine code that nvcc makes of a CUDA source: instructions, registers and stack of every kernel in it."""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda.emulated import KERNELS, ROOT

LOAD_16_BYTES = "LDG.E.128"
POWER = "MUFU.EX2"
DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
LOCAL = ("LDL", "STL")
EARLY_START = {"lets others start": "PREEXIT", "waits for the others": "ACQBULK"}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    instructions: tuple[tuple[int, str], ...]  # addresses and what stands there, without predicates
    targets: frozenset[int]  # the addresses that a branch leads to
    registers: int
    stack: int  # bytes

    def count(self, *opcodes: str) -> int:
        """How many instructions begin with one of these opcodes."""
        return sum(text.startswith(opcodes) for _, text in self.instructions)

    def longest_run(self, opcode: str, between: int) -> int:
        """The most instructions of one kind that have at most so many others between one and the next."""
        places = [i for i, (_, text) in enumerate(self.instructions) if text.startswith(opcode)]
        longest = run = min(len(places), 1)
        for before, place in itertools.pairwise(places):
            run = run + 1 if place - before - 1 <= between else 1
            longest = max(longest, run)
        return longest

    def straight_line_to_last(self, opcode: str) -> int:
        """Instructions from where the code is entered last, before the first of one kind, up to the last of them."""
        places = [address for address, text in self.instructions if text.startswith(opcode)]
        entry = max(target for target in self.targets if target <= places[0])
        return sum(entry <= address <= places[-1] for address, _ in self.instructions)


def compile_kernels(nvcc: str, source: Path, folder: Path, architecture: int = 90) -> dict[str, Kernel]:
    """Compile ``source`` and take the result apart; the keys are names such as ``scan_kernel<BFloat16, 0>``."""
    pytest.importorskip("triton")  # whose package brings the disassembler
    from tests.kernels.compile_ahead import disassembled

    cubin = folder / f"{source.stem}.cubin"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas=-v",
        f"-arch=sm_{architecture}",
        "-cubin",
    ]
    command += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{KERNELS}", str(source), "-o", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    listing = disassembled(cubin.read_bytes(), "-sass")
    resources = dict(re.findall(r"Compiling entry function '(\w+)'.*?\n((?:.*\n)*?.*Used \d+ registers.*)", run.stderr))
    kernels = {}
    for part in listing.split("Function : ")[1:]:
        symbol = part.split()[0]
        if symbol not in resources:
            continue
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?(.*?) ;", part, re.MULTILINE)
        targets = frozenset(int(x, 16) for x in re.findall(r"BRA\S* (?:!?U?P\d, )?0x([0-9a-f]+)", part))
        registers = int(re.search(r"Used (\d+) registers", resources[symbol])[1])
        stack = int(re.search(r"(\d+) bytes stack frame", resources[symbol])[1])
        instructions = tuple((int(address, 16), text) for address, text in lines)
        name = _readable(symbol)
        kernels[name] = Kernel(name, instructions, targets, registers, stack)
    return kernels


def _readable(symbol: str) -> str:
    name, dtype, flag = re.match(r"_ZN8ensemw2s4cuda\d+(\w+?_kernel)I(f|NS_\d+\w+?E)Lb([01])E", symbol).groups()
    dtype = "float" if dtype == "f" else re.sub(r"NS_\d+(\w+)E", r"\1", dtype)
    return f"{name}<{dtype}, {flag}>"
