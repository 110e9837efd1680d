"""Expert weights of single requests, and of a whole server while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnersProcessor

from ensemw2s.runtime.values import shown
from ensemw2s.serving.config import ServedEnsembleConfig

NAME = "expert_weights"
_latest: Any = None


class RequestWeights(LogitsProcessor, SecondRunnersProcessor):
    """Reads `expert_weights` of requests (`vllm_xargs`, or `SamplingParams.extra_args`) for the model to mix with.

    It changes no logits: vLLM tells logits processors alone which request is in which row. It is loaded for every model
    that vLLM serves beside this package, by either model runner, and does nothing for those that are no ensembles.
    """

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        global _latest
        self.of_rows: dict[int, list[float]] = {}
        _latest = ref(self)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError, which a server answers with status 400, for weights that this model cannot mix with."""
        given = (sampling_params.extra_args or {}).get(NAME)
        if given is not None:
            check_expert_weights(given, ServedEnsembleConfig.experts_served)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests as they enter, leave and change rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.of_rows.pop(row, None)
        for row, params, *_ in batch_update.added:
            given = (params.extra_args or {}).get(NAME)
            self._put(row, None if given is None else [float(weight) for weight in given])
        for start, end, direction in batch_update.moved:
            moving, there = self.of_rows.pop(start, None), self.of_rows.pop(end, None)
            self._put(end, moving)
            if direction == MoveDirectionality.SWAP:
                self._put(start, there)

    def _put(self, row: int, weights: list[float] | None) -> None:
        if weights is None:
            self.of_rows.pop(row, None)
        else:
            self.of_rows[row] = weights

    def is_argmax_invariant(self) -> bool:
        """Return True: nothing is changed here."""
        return True

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Return False, which tells the second model runner that nothing is changed here."""
        return False

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        """Return the logits as they are."""
        return logits


def row_weights(expert_weights: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the weights [rows, T] of a batch in which some requests have their own, or [T] where none has."""
    processor = None if _latest is None else _latest()
    if processor is None or not processor.of_rows:
        return expert_weights
    weights = expert_weights.expand(rows, -1).clone()
    own = {row: values for row, values in processor.of_rows.items() if row < rows}
    weights[list(own)] = torch.tensor(list(own.values()), dtype=weights.dtype, device=weights.device)
    return weights


def check_expert_weights(given: Any, count: int | None) -> None:
    """Raise ValueError unless `given` are `count` finite numbers of at least 0, not all 0."""
    if count is None:
        raise ValueError(f"{NAME}: the model that is served here is no ensemble; leave it out")
    good = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == count
    good = good and all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in given)
    if not good or not any(given):
        raise ValueError(
            f"{NAME} must be {count} finite numbers, one for each expert, of at least 0 and not all 0: got "
            f"{shown(given)}"
        )


def set_expert_weights(worker: Any, expert_weights: Sequence[float]) -> None:
    """Mix with other weights from the next token on: a method of vLLM's workers, for `collective_rpc`."""
    worker.get_model().set_expert_weights(expert_weights)


def get_expert_weights(worker: Any) -> list[float]:
    """Return the weights that requests without their own are mixed with: a method of vLLM's workers."""
    weights: list[float] = worker.get_model().expert_weights.tolist()
    return weights
