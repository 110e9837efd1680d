"""What each expert and their mixture hold likeliest at every token of one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ensemw2s import ops

if TYPE_CHECKING:
    from ensemw2s.models.mixture import ExpertMixture


class Judgement(NamedTuple):
    """A distribution at the n tokens of an answer, each given the answer's own tokens before it.

    Attributes:
        tokens: int64 [n], the likeliest tokens.
        probabilities: float32 [n], theirs.
        of_answer: float32 [n], those of the answer's tokens.
    """

    tokens: Tensor
    probabilities: Tensor
    of_answer: Tensor


@torch.no_grad()
def inspect_answer(
    ensemble: ExpertMixture, input_ids: Sequence[int], prompt_length: int
) -> tuple[list[Judgement], Judgement]:
    """Return what each of the T experts makes of an answer, and what their mixture does.

    The logits of all experts are held at once: T x n x V numbers.

    Args:
        ensemble: the experts, their weights and how they are combined.
        input_ids: the tokens of prompt and answer, as `ensemw2s.tokenize_questions` gives them.
        prompt_length: how many of them are the prompt's: at least 1, and not all.

    Raises:
        ValueError: no prompt or no answer.
    """
    if not 0 < prompt_length < len(input_ids):
        raise ValueError(
            f"prompt_length must leave a prompt and an answer of {len(input_ids)} tokens, got {prompt_length}"
        )
    text = torch.tensor([list(input_ids)], device=ensemble.device)
    positions = torch.zeros_like(text, dtype=torch.bool)
    positions[:, prompt_length - 1 : -1] = True
    logits = ensemble.expert_logits(range(ensemble.num_experts), text, positions=positions)
    answer, weights = text[0, prompt_length:], ensemble.mixture_weights(logits[0].device)
    experts = [_judgement(ops.mixture_log_probs([rows], [1.0]), answer) for rows in logits]
    return experts, _judgement(ops.mixture_log_probs(logits, weights, ensemble.config.combine), answer)


def _judgement(log_probs: Tensor, answer: Tensor) -> Judgement:
    largest, tokens = log_probs.max(-1)
    of_answer = log_probs.gather(-1, answer.to(log_probs.device)[:, None])[:, 0]
    return Judgement(tokens.cpu(), largest.exp().cpu(), of_answer.exp().cpu())
