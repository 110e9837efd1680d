"""A draw from a mixture in two steps, by expert first: which expert is drawn, and where the two steps are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensemw2s.ops.checks import check_integers, check_weight_values, expert_weights, without_gradient
from ensemw2s.ops.randomness import gumbel_noise
from ensemw2s.ops.sample_settings import SampleSettings

# The experts' noise is that of the last ids, which no vocabulary reaches.
_LAST_ID = 2**32 - 1


def draw_experts(weights: Tensor | Sequence[float], seeds: Tensor, positions: Tensor) -> Tensor:
    """The expert of each row that ``mixture_sample(..., sample="expert_first")`` draws from, before there are logits.

    A loop may so run that expert alone and pass any tensor, unread, for the others. By ``p(v) = sum_t w_t p_t(v)``
    (EnsemW2S, phase 2, ``"prob"``), a token of an expert that is drawn by its weight is a token of the mixture.

    Args:
        weights: Non-negative, ``[T]`` or ``[B, T]``; normalised inside.
        seeds: int64 ``[B]``.
        positions: int64 ``[B]``, as for ``mixture_sample``.

    Returns:
        int64 ``[B]``, in ``[0, T)``. A row's expert depends on nothing but its weights, seed and position.

    Raises:
        ValueError: Shapes, devices or the values of ``weights`` are wrong.
        TypeError: A dtype is wrong.
    """
    check_integers(seeds, (seeds.numel(),) if isinstance(seeds, Tensor) else (), seeds, "seeds")
    check_integers(positions, tuple(seeds.shape), seeds, "positions")
    count = weights.shape[-1] if isinstance(weights, Tensor) and weights.dim() else len(weights)
    like = torch.empty((len(seeds), 1), device=seeds.device)
    found = without_gradient(expert_weights(weights, count, like, per_row=True))
    check_weight_values(found)
    return _drawn(found, seeds, positions)


def _drawn(weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    ids = _LAST_ID - torch.arange(weights.shape[-1], device=weights.device)
    return (weights.double().log() + gumbel_noise(seeds[:, None], positions[:, None], ids)).argmax(-1)


def of_drawn_experts(weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Weights ``[B, T]`` of the drawn experts alone; a row without a usable weight keeps what it has."""
    check_weight_values(weights)
    of_rows = weights.expand(len(seeds), -1)
    chosen = torch.zeros_like(of_rows).scatter(1, _drawn(of_rows, seeds, positions)[:, None], 1.0)
    usable = ((of_rows >= 0) & of_rows.isfinite()).all(-1, keepdim=True) & (of_rows > 0).any(-1, keepdim=True)
    return torch.where(usable, chosen, of_rows)


def refuse_beside_expert_first(
    sample: Any, combine: str, settings: SampleSettings, top_logprobs: int, adjustments: Any, mask: Any
) -> None:
    """Raise ValueError for a ``sample`` that there is not, or for what would change the mixture's distribution."""
    if sample != "expert_first":
        raise ValueError(f'sample={sample!r:.80} is neither "mixture" nor "expert_first"')
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    asked = [name for name, value in settings._asdict().items() if isinstance(value, Tensor) or value != off[name]]
    asked += ["combine"] * (combine != "prob") + ["top_logprobs"] * (top_logprobs > 0)
    asked += [name for name, value in {"adjustments": adjustments, "mask": mask}.items() if value is not None]
    if asked:
        raise ValueError(
            f'sample="expert_first" draws from the whole mixture of probabilities at temperature 1, and {asked[0]} '
            'acts on more than one expert\'s tokens: leave it out, or use sample="mixture"'
        )
