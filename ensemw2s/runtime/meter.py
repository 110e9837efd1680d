"""What is spent: tokens, floating-point operations, seconds and peak memory, counted while a phase runs.

Every forward pass and every training step of this package reports its shape to `count`. A model's FLOPs are linear in
the shape of a pass: so many per token, per row that reaches the output head, and per (query, key) pair of attention.
These three numbers are counted once per model, op by op with torch's own formulas, on a copy without weights: they hold
for any architecture, with or without adapters, and cost no computing. A multiply-add is two FLOPs; as in torch's own
counter only matrix products, convolutions and attention count. Padding is computed and counts, and causal attention
counts in full.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
import re
import resource
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ensemw2s.runtime import files, processes
from ensemw2s.runtime.accounts import append_whole, enter_growing

# Shapes (length, rows that reach the head) from which the three unknowns are solved.
_PROBES = ((4, 4), (4, 2), (8, 4))


@dataclass(frozen=True)
class Work:
    """The shape of one forward pass, or the sum of several."""

    # Tokens read, padding aside, and with it; rows for which logits were made.
    tokens: float = 0
    padded: float = 0
    head: float = 0
    # (query, key) pairs of attention, per layer and head.
    pairs: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, astuple(self), astuple(other)))

    def __mul__(self, times: float) -> Work:
        return Work(*(amount * times for amount in astuple(self)))

    @classmethod
    def of_pass(cls, rows: int, length: int, tokens: float, head: float, past: int = 0) -> Work:
        """Return the work of one pass over `rows` x `length` tokens with `past` more in the cache."""
        return cls(tokens, rows * length, head, rows * length * (past + length))

    @classmethod
    def of_padded(cls, lengths: Sequence[int], head: float) -> Work:
        """Return the work of one pass over rows of these lengths, padded to the longest."""
        return cls.of_pass(len(lengths), max(lengths), sum(lengths), head)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model per token, per row that reaches the output head, and per (query, key) pair."""

    token: float
    head: float
    pair: float

    def of(self, work: Work) -> float:
        """Return the FLOPs of some work."""
        return self.token * work.padded + self.head * work.head + self.pair * work.pairs


@dataclass
class Meter:
    """What was counted within a `metered` block."""

    # NaN if those of a model could not be counted.
    flops: float = 0.0
    # What training took, in other processes, until the checkpoint from which it went on here.
    seconds_before: float = 0.0
    _tokens: Any = 0

    @property
    def tokens(self) -> int:
        """Return the tokens read so far, padding aside: in training, by every expert, and while decoding."""
        return int(self._tokens)

    def add(self, tokens: Any, flops: float) -> None:
        """Add to both."""
        # Tokens may be a tensor on a GPU, which is not waited for until somebody reads the sum.
        self._tokens = self._tokens + tokens
        self.flops += flops

    def clear(self) -> None:
        """Begin at zero."""
        self.flops, self.seconds_before, self._tokens = 0.0, 0.0, 0

    def record(self) -> dict[str, Any]:
        """Return `tokens` and `flops` (None if unknown) as plain JSON."""
        return {"tokens": self.tokens, "flops": None if math.isnan(self.flops) else self.flops}


_METERS: list[Meter] = []
# Experts that run side by side report at once, and adding to a sum is no single step.
_COUNTING = threading.Lock()
_BY_MODEL: weakref.WeakKeyDictionary[Any, dict[bool, ModelFlops]] = weakref.WeakKeyDictionary()
# Every round loads the pre-trained model again: what models of one kind cost is counted once.
_BY_SIGNATURE: dict[Any, ModelFlops] = {}


@contextmanager
def metered() -> Iterator[Meter]:
    """Within the block, count what this package's models do in this process; blocks may be nested."""
    meter = Meter()
    _METERS.append(meter)
    try:
        yield meter
    finally:
        # By identity: two fresh meters are equal.
        _METERS[:] = [other for other in _METERS if other is not meter]


def count(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    head: int,
    *,
    training: bool = False,
) -> None:
    """Report one forward pass (with its backward pass if `training`) to all meters; nothing happens without any.

    Args:
        model: what ran.
        input_ids: int64 [rows, length], what was read.
        attention_mask: int64 [rows, past + length], or None for no padding and no past.
        head: rows for which logits were made.
        training: count the gradients of the weights that require them as well.
    """
    if not _METERS:
        return
    rows, length = input_ids.shape
    past = 0 if attention_mask is None else attention_mask.shape[1] - length
    tokens = rows * length if attention_mask is None else attention_mask[:, past:].sum().to(torch.int64)
    with _COUNTING:
        flops = model_flops(model, training=training).of(Work.of_pass(rows, length, 0, head, past))
        for meter in _METERS:
            meter.add(tokens, flops)


def count_before(seconds: float, tokens: float, flops: float) -> None:
    """Report to all meters what training took, in other processes, until the checkpoint from which it goes on here."""
    for meter in _METERS:
        meter.add(int(tokens), flops)
        meter.seconds_before += seconds


def model_flops(model: torch.nn.Module, *, training: bool = False) -> ModelFlops:
    """Return what one token, one row at the head and one pair of attention cost; NaN with a warning if unknown.

    In training with the backward pass, to the weights that require a gradient when a model is first asked for.
    """
    known = _BY_MODEL.setdefault(model, {})
    if training not in known:
        weights = ((name, tuple(p.shape), training and p.requires_grad) for name, p in model.named_parameters())
        signature = training, tuple(map(type, model.modules())), tuple(weights)
        if signature not in _BY_SIGNATURE:
            _BY_SIGNATURE[signature] = _counted(model, training)
        known[training] = _BY_SIGNATURE[signature]
    return known[training]


def _counted(model: torch.nn.Module, training: bool) -> ModelFlops:
    try:
        twin = _weightless(model)
        totals = [_flops_of_pass(twin, length, head, training) for length, head in _PROBES]
    except Exception as error:
        # Quantised and sharded weights, or a model that looks at values: a cost is not worth a run.
        warnings.warn(
            f"the FLOPs of {type(model).__name__} cannot be counted and are recorded as unknown: {error}", stacklevel=2
        )
        return ModelFlops(math.nan, math.nan, math.nan)
    (length, head), (_, fewer), (longer, _) = _PROBES
    per_head = (totals[0] - totals[1]) / (head - fewer)
    short, long = totals[0] - per_head * head, totals[2] - per_head * head
    per_pair = (long / longer - short / length) / (longer - length)
    return ModelFlops(short / length - per_pair * length, per_head, per_pair)


def _weightless(model: torch.nn.Module) -> Any:
    """Return a copy of a model on torch's `meta` device, which knows shapes and holds no numbers."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = tensor.detach().to("meta")
        is_weight = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    return copy.deepcopy(model, memo)


class _FlopCounter(TorchDispatchMode):
    """Add up torch's FLOP formulas; torch's own `FlopCounterMode` gives the same sums, twenty times more slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def _flops_of_pass(twin: Any, length: int, head: int, training: bool) -> int:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    # A mask of four dimensions is taken as it is; from one of two a model would try to read whether anything is padded.
    mask = torch.zeros(1, 1, length, length, device="meta")
    first_rows = twin.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :head],))
    try:
        with _FlopCounter() as counter, torch.set_grad_enabled(training):
            logits = twin(input_ids=ids, attention_mask=mask, use_cache=False).logits
            if training:
                logits.sum().backward()
    finally:
        first_rows.remove()
    return counter.total


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Within the block, watch memory; afterwards the yielded list holds the peak in bytes.

    The peak is that of this process's resident memory, or of torch's own allocations on a GPU. Blocks must not be
    nested. Where the kernel does not let a process reset its mark (`/proc/self/clear_refs`), the peak is that since
    the process began.
    """
    found: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            warnings.warn("this system does not let a process reset its peak memory: peaks never fall", stacklevel=3)
    yield found
    found.append(_peak())


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"^VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@contextmanager
def measured() -> Iterator[dict[str, Any]]:
    """Within the block, measure; then the yielded dict holds `seconds`, `tokens` and `flops` (None if unknown)."""
    record: dict[str, Any] = {}
    start = time.perf_counter()
    with metered() as meter:
        yield record
    record |= {"seconds": time.perf_counter() - start, **meter.record()}


class Ledger:
    """What something took that several processes may have worked on, one after the other, since each was killed.

    While it runs, whatever `files` keeps is entered with what was spent since the entry before, just before it gets its
    name. Work whose result was lost with its process is done again and counts once, so that tokens and FLOPs are
    those of an uninterrupted run. The main process writes the file, a JSON object a line, and counts its own work.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._meter = Meter()
        self._start: float | None = None

    @contextmanager
    def running(self) -> Iterator[Ledger]:
        """Within the block, enter what is kept; ledgers may be nested."""
        with metered() as self._meter:
            self._start = time.perf_counter()
            if processes.is_main():
                files.watchers.append(self._note)
            try:
                yield self
            finally:
                files.watchers[:] = [other for other in files.watchers if other != self._note]
                self._start = None

    def note(self, path: Path) -> None:
        """Enter what was spent since the last entry as spent on a file that has grown to its end."""
        if processes.is_main():
            self._note(path, "up to the end")

    def total(self, path: Path | None = None) -> dict[str, Any]:
        """Return `seconds`, `tokens`, `flops` (None if unknown) and `peak_memory` (bytes) of all that is kept.

        Of one file alone if it is given; else, while the ledger runs, with what was spent since the last entry.
        """
        rows = [row for row in self._rows() if path is None or row["file"] == self._name(path)]
        rows += [self._spent()] if path is None and self._start is not None else []
        sums = {name: total(row[name] for row in rows) for name in ("seconds", "tokens", "flops")}
        return sums | {"peak_memory": max((row["peak_memory"] for row in rows), default=0)}

    def _note(self, path: Path, mark: str) -> None:
        row = {"file": self._name(path), "mark": mark, **self._spent()}
        files.make_folder(self.file.parent)
        enter_growing(self.file)
        append_whole(self.file, [json.dumps(row)], lasting=False)
        # From zero again: the sums of floats do not depend on what was counted before.
        self._meter.clear()
        self._start = time.perf_counter()

    def _spent(self) -> dict[str, Any]:
        assert self._start is not None
        seconds = self._meter.seconds_before + time.perf_counter() - self._start
        return {"seconds": seconds, **self._meter.record(), "peak_memory": _peak()}

    def _rows(self) -> list[dict[str, Any]]:
        """Return the entries that count: of a file written whole the last, of one that grew one for each size."""
        last: dict[tuple[str, str], dict[str, Any]] = {}
        for row in files.read_complete_lines(self.file):
            key = (row["file"], row["mark"] if row["mark"].startswith("up to ") else "")
            before = last.get(key)
            if before is not None and before["mark"] == row["mark"]:
                # The same again: written anew from what was kept, or made anew because it got no name before.
                row = max(before, row, key=lambda one: one["tokens"])
            last[key] = row
        return list(last.values())

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.file.parent)


def total(values: Iterable[float | None]) -> float | None:
    """Return a sum that is unknown (None) if one of its parts is."""
    parts = list(values)
    return None if None in parts else sum(part for part in parts if part is not None)
