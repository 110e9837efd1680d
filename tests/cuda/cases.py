"""What tests/emulation/run_cases.cpp is given, and whether what it gives is right."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import torch

from ensemw2s.ops import mixture_log_probs, mixture_sample
from ensemw2s.ops.checks import COMBINES
from tests.cuda.emulated import DTYPES
from tests.ops.test_mixture_sample import OFF, SETTINGS, inputs, is_decided


def cases():
    """Every setting on rows that end anywhere, each under an order of the threads of its own."""
    generator = torch.Generator().manual_seed(3)
    for size, dtype in ((33, torch.float16), (1031, torch.bfloat16), (1500, torch.float32)):
        for combine in COMBINES:
            logits, weights, keys = inputs(generator, 2, 1, size, dtype)
            for setting in (None, *SETTINGS):
                yield logits, weights, keys, combine, setting


def top_count_of(order):
    """How many of the likeliest tokens a case asks for."""
    return 5 * (order % 3)


def as_bytes(order, logits, weights, keys, combine, setting):
    """A case in the form that tests/emulation/run_cases.cpp reads."""
    chosen = OFF | (setting or {})
    rows, size = logits[0].shape
    whole = (order, setting is not None, len(logits), rows, size, COMBINES.index(combine))
    whole += (DTYPES.index(logits[0].dtype), top_count_of(order), chosen["top_k"])
    header = struct.pack("9q3d", *whole, chosen["temperature"], chosen["top_p"], chosen["min_p"])
    arrays = [weights.expand(rows, -1), keys["seeds"], keys["positions"], *logits]
    return header + b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in arrays)


def run_cases(program: Path, *runner: str) -> str:
    """Run all cases in a process of their own, perhaps by another program; what went wrong, or the empty string."""
    to_run, results = program.with_suffix(".cases"), program.with_suffix(".results")
    to_run.write_bytes(b"".join(as_bytes(order, *case) for order, case in enumerate(cases())))
    run = subprocess.run([*runner, program, to_run, results], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return f"exit status {run.returncode}: {run.stderr}"
    found = results.read_bytes()
    for order, (logits, weights, keys, combine, setting) in enumerate(cases()):
        double = [x.double() for x in logits]
        log_probs = mixture_log_probs(double, weights.double(), combine)
        if setting is None:
            got = torch.frombuffer(bytearray(found[: 4 * log_probs.numel()]), dtype=torch.float32)
            found = found[4 * log_probs.numel() :]
            if not torch.allclose(got.double(), log_probs.flatten(), atol=1e-5):
                return f"wrong log-probabilities: {combine}"
            continue
        token = int.from_bytes(found[:8], sys.byteorder, signed=True)
        count = top_count_of(order)
        top_tokens = torch.tensor([struct.unpack(f"{count}q", found[8 : 8 + 8 * count])], dtype=torch.int64)
        found = found[8 + 8 * count :]
        possible = log_probs.gather(-1, top_tokens.clamp(min=0)).masked_fill(top_tokens < 0, -torch.inf)
        if not torch.allclose(possible, log_probs.sort(-1, descending=True).values[:, :count], atol=1e-5):
            return f"wrong likeliest tokens: {combine}"
        exact = mixture_sample(double, weights.double(), combine=combine, **keys, **setting).tokens.item()
        if token != exact and bool(is_decided(log_probs, **keys, **setting).all()):
            return f"wrong token: {combine}, {setting}"
    return ""
