"""Rows of a batch laid behind one another, so that next to nothing of it is padding.

Each token keeps its position in its own row, and transformers lets tokens attend to their own row alone where positions
begin anew. The rows of a batch, their order and the loss are those of the padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensemw2s.models.heads import output_head, states_before

# A line of rows, in lengths of the longest row: long lines leave less padding, but attention is computed over all of a
# line.
_SHORTEST_LINE, _LONGEST_LINE = 3, 6
# Lengths of the rows on which a model is tried: more than one line of several rows.
_TRIAL = (5, 1, 3, 2, 4, 5, 2, 5, 5, 3)
# The largest difference that rounding makes, as a share of the largest hidden state.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_16_BIT = 0.05


@dataclass(frozen=True)
class PackedRows:
    """A batch of B rows in R lines of length C.

    Attributes:
        input_ids: int64 [R, C].
        position_ids: int64 [R, C], each token's place in its row; 0 on padding.
        mask: int64 [R, C], 0 on padding.
        places: int64 [B, L], where in the flattened lines each token of the padded batch went; -1 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    places: Tensor


def lines_of(lengths: Sequence[int], *, one_line: bool = False) -> list[list[int]]:
    """Return, for each line, the indices of its rows, whose `lengths` are in tokens.

    A line has 3 to 6 times the longest row, unless `one_line` takes all; as many lines are made as leave the least
    padding. The longest rows come first, each goes where there is most room.
    """
    longest, total = max(lengths), sum(lengths)
    fewest = 1 if one_line else math.ceil(total / (_LONGEST_LINE * longest))
    most = fewest if one_line else max(fewest, total // (_SHORTEST_LINE * longest))
    candidates = [_in_lines(lengths, count) for count in range(fewest, most + 1)]
    return min(candidates, key=lambda lines: len(lines) * width_of(lines, lengths))


def _in_lines(lengths: Sequence[int], count: int) -> list[list[int]]:
    lines: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        line = filled.index(min(filled))
        lines[line].append(row)
        filled[line] += lengths[row]
    return lines


def width_of(lines: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Return the length C of the longest line."""
    return max(sum(lengths[row] for row in line) for line in lines)


def pack_rows(input_ids: Tensor, attention_mask: Tensor, *, one_line: bool = False) -> PackedRows:
    """Lay the rows of a batch, int64 [B, L] and padded on the right, behind one another; see `lines_of`."""
    lengths = attention_mask.sum(1).tolist()
    lines = lines_of(lengths, one_line=one_line)
    width = width_of(lines, lengths)
    starts = [0] * len(lengths)
    for number, line in enumerate(lines):
        place = number * width
        for row in line:
            starts[row] = place
            place += lengths[row]
    device = input_ids.device
    within = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
    real = attention_mask != 0
    places = torch.where(real, torch.tensor(starts, device=device)[:, None] + within, -1)

    def laid_out(values: Tensor) -> Tensor:
        flat = values.new_zeros(len(lines) * width)
        flat[places[real]] = values[real]
        return flat.view(len(lines), width)

    return PackedRows(laid_out(input_ids), laid_out(within), laid_out(torch.ones_like(within)), places)


def wants_one_line(model: Any) -> bool:
    """Return whether the model's attention tells rows apart in a single line only, as flash attention does."""
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


@torch.no_grad()
def keeps_rows_apart(model: Any, forward: Callable[..., Any], *, is_mixed: bool = False) -> bool:
    """Try on a few short rows whether a model reads packed rows as it reads padded ones.

    It is called by `forward`: the model itself, or the same in a wrapper for several processes or for mixed precision.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor(_TRIAL, device=device)[:, None]
    mask = (torch.arange(max(_TRIAL), device=device) < lengths).long()
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.arange(mask.numel(), device=device).view_as(mask) * 7919 % vocabulary
    packed = pack_rows(ids, mask, one_line=wants_one_line(model))
    head, training = output_head(model), model.training
    model.eval()
    try:
        padded: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
        expected = states_before(head, forward, padded, lambda hidden: hidden[mask != 0])
        lines = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
        found = states_before(head, forward, lines, lambda hidden: hidden.flatten(0, 1)[packed.places[mask != 0]])
    except (TypeError, ValueError):
        # It takes no positions.
        return False
    finally:
        model.train(training)
    # A wrapper gives float32 back, whatever it computed in.
    rounding = _ROUNDING_16_BIT if is_mixed else _ROUNDING.get(found.dtype, _ROUNDING_16_BIT)
    return bool((found - expected).abs().max() <= rounding * expected.abs().max())
