"""Reading the texts of a batch by all experts, the prompts of a CPU in groups of similar lengths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ensemw2s.runtime.meter import Work

if TYPE_CHECKING:
    from transformers import Cache

    from ensemw2s.models.mixture import Mixture

# Positions that all experts read at a time, each counting once for each expert. Nine times as many take 1.7 times as
# long for each of them: what a layer makes of them leaves the processor's cache, and its memory comes anew from the
# system every time.
_MOST_POSITIONS = 2048
# What one more pass costs beside its positions, in positions.
_POSITIONS_OF_A_PASS = 128


def run_experts(
    ensemble: Mixture, input_ids: Tensor, attention_mask: Tensor, cache: Cache, *, last_only: bool = True
) -> list[Tensor]:
    """Run all experts on what follows the text in `cache`; see `Mixture.expert_logits`."""
    places = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
    return ensemble.expert_logits(
        range(ensemble.num_experts), input_ids, attention_mask, position_ids=places, cache=cache, last_only=last_only
    )


def read_prompts(ensemble: Mixture, input_ids: Tensor, attention_mask: Tensor, cache: Cache) -> list[Tensor]:
    """Do what `run_experts` does, for an empty cache, with little padding where the prompts differ in length.

    A GPU reads all of them at once, as it is the faster the more it is given. So does a CPU where padding is not on the
    left alone, and models whose caches do not keep every position.
    """
    # A row that is all padding is read by its last position.
    lengths = attention_mask.sum(1).clamp_min(1)
    is_left_padded = bool((attention_mask.long().diff(dim=1) >= 0).all())
    if input_ids.device.type != "cpu" or not is_left_padded or not all(map(_keeps_every_position, cache.layers)):
        return run_experts(ensemble, input_ids, attention_mask, cache)
    groups = [torch.tensor(rows) for rows in prompt_groups(lengths.tolist(), ensemble.num_experts)]
    if len(groups) == 1:
        return run_experts(ensemble, input_ids, attention_mask, cache)
    logits, parts = [], []
    for rows in groups:
        length = int(lengths[rows[-1]])
        parts.append(copy.deepcopy(cache))
        logits.append(run_experts(ensemble, input_ids[rows, -length:], attention_mask[rows, -length:], parts[-1]))
    _fill(cache, parts, groups, input_ids.shape)
    places = torch.cat(groups).argsort()
    return [torch.cat(of_expert)[places] for of_expert in zip(*logits, strict=True)]


def prompt_groups(lengths: Sequence[int], num_experts: int) -> list[list[int]]:
    """Return the prompts, by their `lengths` of at least 1, that a CPU reads together, group by group.

    In a group the longest comes last.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    most, one_pass = _MOST_POSITIONS // num_experts, _POSITIONS_OF_A_PASS // num_experts
    ends = _ends_of_groups([lengths[row] for row in order], most, one_pass)
    return [order[start:end] for start, end in pairwise([0, *ends])]


def reading_work(lengths: Sequence[int], num_experts: int) -> Work:
    """Return the work of one of so many experts that read prompts of these lengths on a CPU."""
    groups = prompt_groups(lengths, num_experts)
    return sum((Work.of_padded([lengths[row] for row in group], len(group)) for group in groups), Work())


def _keeps_every_position(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and not layer.is_sliding


def _ends_of_groups(lengths: Sequence[int], most: int, one_pass: int) -> list[int]:
    """Cut rows of rising `lengths`, at least 1, into the groups that cost least, and return where each ends.

    A group costs its tokens, padding included, and `one_pass` more. It has at most `most` tokens, or one row.
    """
    # Of the first `end` rows: the least cost, and where their last group begins.
    best = [(0, 0)]
    for end, longest in enumerate(lengths, 1):
        first = max(0, min(end - 1, end - most // longest))
        best.append(min((best[start][0] + (end - start) * longest + one_pass, start) for start in range(first, end)))
    ends = [len(lengths)]
    while ends[-1]:
        ends.append(best[ends[-1]][1])
    return ends[-2::-1]


def _fill(cache: Cache, parts: Sequence[Cache], groups: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Fill an empty cache for a batch of this shape from those of groups of its rows; padding has zeros."""
    batch, length = shape
    for place, layer in enumerate(cache.layers):
        given = [part.layers[place] for part in parts]
        if not given[0].is_initialized:
            # Some models' layers share another's.
            continue
        states = []
        for name in ("keys", "values"):
            first = getattr(given[0], name)
            # Rows of experts that run as one model follow one another.
            copies = len(first) // len(groups[0])
            whole = first.new_zeros(copies, batch, first.shape[1], length, first.shape[3])
            for part, rows in zip(given, groups, strict=True):
                seen = getattr(part, name)
                whole[:, rows, :, -seen.shape[2] :] = seen.unflatten(0, (copies, -1))
            states.append(whole.flatten(0, 1))
        layer.update(*states)
