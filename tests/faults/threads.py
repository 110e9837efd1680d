"""Many threads on one ensemble: whatever they do, each gets what it would get alone."""

from __future__ import annotations

import gc
import itertools
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ensemw2s import TokenEnsemble
from tests.calls import KINDS, alike, between, build, calls, many_switches, mixed
from tests.faults.battery import Case
from tests.tiny import llama, saved_adapters

# Threads, and calls of each: in the short pass, and in the long one.
_SHORT = {"stacked": (4, 6), "one-after-the-other": (2, 3), "mixed": (2, 3), "models": (3, 3)}
_LONG = {"stacked": (8, 200), "one-after-the-other": (8, 60), "mixed": (8, 60), "models": (8, 200)}


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Yield mixed calls from many threads, calls in the middle of others, adapters that come and go, and compiling."""
    for kind in KINDS:
        threads, each = (_LONG if long else _SHORT)[kind]
        yield Case(f"mixed calls, {kind}", partial(_mixed, kind, threads, each, seed))
        yield Case(f"one call in the middle of another, {kind}", partial(_pairs, kind, None if long else 3, seed))
    yield Case("slices that gain experts and are dropped", partial(_dropped, 40 if long else 4, seed))
    if long:
        yield Case("a compiled ensemble and its compiled views", partial(_compiled, 10))


def _mixed(kind: str, threads: int, each: int, seed: int, folder: Path) -> int:
    ensemble, fourth = build(kind, folder)
    return mixed(calls(ensemble, fourth), threads=threads, each=each, seed=seed)


def _pairs(kind: str, count: int | None, seed: int, folder: Path) -> int:
    ensemble, fourth = build(kind, folder)
    named = calls(ensemble, fourth)
    expected = {name: call() for name, call in named.items()}
    pairs = list(itertools.product(named, repeat=2))
    chosen = pairs if count is None else random.Random(seed).sample(pairs, count)
    for outer, inner in chosen:
        # Every ensemble and view of `calls` has the second expert.
        found, results = between(ensemble.experts.carrier(1), named[outer], named[inner])
        try:
            alike(found, expected[outer])
            for result in results:
                alike(result, expected[inner])
        except AssertionError as error:
            raise AssertionError(f"{inner} in the middle of {outer}: {error}") from error
    return len(chosen)


def _dropped(each: int, seed: int, folder: Path) -> int:
    folders = saved_adapters(folder, 3)
    ensemble = TokenEnsemble.from_adapters(llama(0), folders[:2], [1.0, 2.0])
    ids = torch.randint(2, 30, (1, 5), generator=torch.Generator().manual_seed(seed))
    wrong: list[Any] = []

    @torch.no_grad()
    def grow() -> torch.Tensor:
        own = ensemble[:1]
        own.add_expert(folders[2], 1.0)
        return own(ids, use_cache=True).logits

    expected = grow()

    def work() -> None:
        for _ in range(each):
            try:
                alike(grow(), expected)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with many_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, f"{len(wrong)} went wrong: {wrong[0]!r}"
    gc.collect()
    left = sorted(ensemble.experts.carrier(0).peft_config)  # type: ignore[arg-type]
    assert len(left) == 2, f"adapters that nobody uses are still there: {left}"
    return 4 * each


def _compiled(each: int, folder: Path) -> int:
    ensemble, _ = build("stacked", folder)
    views = [ensemble, ensemble[:2], ensemble[1:]]
    ids = torch.randint(2, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    begin, wrong = threading.Barrier(4), []

    def work(number: int) -> None:
        begin.wait()
        for turn in range(each):
            which = (number + turn) % 3
            try:
                with torch.no_grad():
                    alike(compiled[which](ids).logits, expected[which])
            except Exception as error:
                wrong.append(error)

    with torch.no_grad():
        expected = [view(ids).logits for view in views]
    compiled = [torch.compile(view, backend="eager") for view in views]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.compiler.reset()
    assert not wrong, f"{len(wrong)} went wrong: {wrong[0]!r}"
    return 4 * each
