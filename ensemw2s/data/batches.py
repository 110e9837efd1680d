"""Tokenised questions in batches: sampled by length, collated, shifted by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from ensemw2s.data.tokens import IGNORED


def by_length(lengths: Sequence[int]) -> list[int]:
    """Return the places of all rows, the shortest first; rows of one length stay in their order."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the places of all rows in batches of similar length, the shortest first, so that little is padding."""
    order = by_length(lengths)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class LengthBucketSampler(Sampler[int]):
    """An order of rows in which neighbours of one batch have similar lengths, for little padding.

    Rows are shuffled, sorted by length within pools of `pool` batches, cut into batches, and the batches are shuffled.
    Every row comes once per epoch. On the demo's questions 2-4% of the tokens are padding, in random batches 18-25%.

    It is a biased order: the rows of a batch are alike, and as each step's loss is a mean over its own answer tokens,
    those of short answers weigh more than those of long ones. Eight short trainings (76 steps) on reversing 2-6 letters
    got 2.9 +- 0.9 points fewer questions right than in random order, and 4.8 +- 0.9 fewer of 4-6 letters
    (`benchmarks/training/train.py`, part "order").

    Unlike transformers' `LengthGroupedSampler`, it groups each micro-batch by itself, mixes long and short
    batches within an accumulated step, and its order depends on seed and epoch alone, so that a run can be resumed.

    Args:
        lengths: tokens of each row.
        batch_size: rows per (micro-)batch.
        seed: another seed gives another order.
        pool: batches that are sorted together; fewer give more random batches and more padding [choice].
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 50) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        size = self.pool * self.batch_size
        batches: list[np.ndarray] = []
        for start in range(0, len(order), size):
            batches += self._batches(order[start : start + size], generator)
        # A loader cuts batches by counting, so the one that is not full has to come last.
        batches = [batches[i] for i in generator.permutation(len(batches))]
        batches.sort(key=lambda batch: len(batch) < self.batch_size)
        yield from np.concatenate(batches).tolist()

    def _batches(self, rows: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        full, rest = divmod(len(rows), self.batch_size)
        sizes = [self.batch_size] * full
        if rest:
            # Not always the longest rows.
            sizes.insert(int(generator.integers(full + 1)), rest)
        return np.split(rows, np.cumsum(sizes)[:-1])


@dataclass
class AnswerCollator:
    """Pad tokenised questions on the right and mark their answers by position (never by token id).

    Attributes:
        pad_token_id: any token; it may equal the end token.
    """

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch of B rows of length L.

        Args:
            features: each with `input_ids`, `prompt_length` and optionally `token_weights`, one float per answer
                token, and `row`, a number to know it by.

        Returns:
            `input_ids`, `attention_mask` (int64 [B, L]), `labels` (int64 [B, L], aligned with `input_ids` as
            transformers wants them; -100 on prompt, padding and tokens of weight 0) and `token_weights` (float32
            [B, L], aligned with `labels`; 1 on answer tokens where none are given); `row` (int64 [B]) if they have one.
        """
        shape = len(features), max(len(feature["input_ids"]) for feature in features)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED, dtype=torch.int64),
            "token_weights": torch.zeros(shape, dtype=torch.float32),
        }
        for row, feature in enumerate(features):
            ids = torch.tensor(feature["input_ids"], dtype=torch.int64)
            start, end = int(feature["prompt_length"]), len(ids)
            weights = torch.ones(end - start)
            if feature.get("token_weights") is not None:
                weights = torch.as_tensor(feature["token_weights"], dtype=torch.float32)
            if len(weights) != end - start:
                raise ValueError(f"token_weights has {len(weights)} values for an answer of {end - start} tokens")
            batch["input_ids"][row, :end] = ids
            batch["attention_mask"][row, :end] = 1
            batch["token_weights"][row, start:end] = weights
            batch["labels"][row, start:end] = torch.where(weights != 0, ids[start:], IGNORED)
        if "row" in features[0]:
            batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad B prompts on the left, so that decoding can go on at the right edge.

    Returns:
        `input_ids` and `attention_mask`, int64 [B, L] on `device`.
    """
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows, padding_value=pad_token_id).to(device), pad([torch.ones_like(row) for row in rows]).to(device)


def next_token_mask(labels: torch.Tensor) -> torch.Tensor:
    """Return bool [batch, length]: the positions whose next token has a label other than -100."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask
