"""Several processes on one run, started by `accelerate launch` or `torchrun`; with one process, nothing to do.

Every process runs the same program. Batches are shared out (`share`) and their results collected (`gather`); whatever
is decided by a look at the disk, or written to it, happens on the main process, and the others wait (`on_main`).
The run's folder must lie where all processes see it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Item = TypeVar("Item")
Result = TypeVar("Result")

# How long a process waits for the others before it gives up: longer than any phase that is the main process's alone.
TIMEOUT = timedelta(minutes=30)
# What gloo and NCCL say, in lower case, when a peer is gone or silent.
_LOST = ("connection closed by peer", "connection reset by peer", "timed out waiting", "broken pipe", "remote process")


class MainProcessError(RuntimeError):
    """The main process failed in what it did for all, and has raised (and told) the cause itself."""


def start() -> PartialState:
    """Join the process group that the launcher describes, on the first call, and return accelerate's state."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        # accelerate looks for a GPU for each process unless it is told; `accelerate launch --cpu` tells it so.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"), timeout=TIMEOUT)


def end() -> None:
    """Leave the process group, once every process has come this far."""
    state = start()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()


def count() -> int:
    """Return the number of processes."""
    return int(start().num_processes)


def index() -> int:
    """Return this process's number, from 0; the main process is number 0."""
    return int(start().process_index)


def is_main() -> bool:
    """Say whether this is the process that writes and prints."""
    return index() == 0


def share(items: Sequence[Item]) -> list[Item]:
    """Return this process's items: every `count()`-th, so that items sorted by cost are shared out evenly."""
    return list(items[index() :: count()])


def gather(value: Item) -> list[Item]:
    """Return the values of all processes, in their order; every process must call this."""
    return list(gather_object([value]))


def on_main(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Call `function` on the main process alone; every process must call this, waits, and gets the result.

    Raises:
        Exception: on the main process, what `function` raised.
        MainProcessError: on the others, if it raised.
    """
    if count() == 1:
        return function(*args, **kwargs)
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function(*args, **kwargs)
        except Exception as error:
            broadcast_object_list([None, f"{type(error).__name__}: {error}"])
            raise
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise MainProcessError(f"the main process failed: {failure}")
    return result


def fair_threads() -> int | None:
    """Return each process's share of the CPUs of its machine, at least 1; None in one process."""
    if count() == 1:
        return None
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", count())))


def is_lost_contact(error: BaseException) -> bool:
    """Say whether `error` means that another process is gone or does not answer."""
    return count() > 1 and any(words in str(error).lower() for words in _LOST)
