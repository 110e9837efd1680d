"""Small ensembles and the slow float64 mixture that their decoding is compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from ensemw2s import TokenEnsemble
from tests.tiny import END, PAD, VOCAB, dora_adapters, gpt2, llama, saved_adapters

WEIGHTS = [2.5, 1.25, 0.5]


def adapter_ensemble(folder: Path) -> TokenEnsemble:
    """Three LoRA adapters, saved in `folder`, on one base."""
    return TokenEnsemble.from_adapters(llama(0), saved_adapters(folder), WEIGHTS)


def mixed_ensemble(folder: Path) -> TokenEnsemble:
    """Adapters of which the first and the last run in one pass, and the second by itself."""
    first, last = saved_adapters(folder, 2)
    return TokenEnsemble.from_adapters(llama(0), [first, *dora_adapters(folder, 1), last], WEIGHTS)


def model_ensemble() -> TokenEnsemble:
    """Three whole models of two architectures over one vocabulary."""
    return TokenEnsemble.from_models([llama(0), gpt2(1), llama(2)], WEIGHTS)


def ragged_prompts(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded random prompts of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator)
    ids = torch.randint(2, VOCAB, (count, 9), generator=generator)
    mask = (torch.arange(9)[None] >= 9 - lengths[:, None]).long()
    return torch.where(mask.bool(), ids, PAD), mask


def slow_mixtures(ensemble: TokenEnsemble, ids: list[int]) -> torch.Tensor:
    """Float64 log-probabilities [L, V] of what follows each prefix of `ids`: each expert by itself, without a cache."""
    weights = torch.tensor(ensemble.config.expert_weights, dtype=torch.float64)
    weights = weights / weights.sum()
    log_probs = []
    for t in range(ensemble.num_experts):
        with ensemble.experts.expert(t) as model, torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
        log_probs.append(logits.log_softmax(-1))
    stacked = torch.stack(log_probs)
    if ensemble.config.combine == "prob":
        return (weights[:, None, None] * stacked.exp()).sum(0).log()
    if ensemble.config.combine == "logprob":
        return (weights[:, None, None] * stacked).sum(0).log_softmax(-1)
    votes = torch.zeros(len(ids), VOCAB, dtype=torch.float64)
    for t, row in enumerate(stacked.argmax(-1)):
        votes[torch.arange(len(ids)), row] += weights[t]
    return votes.log()


def slow_mixture(ensemble: TokenEnsemble, ids: list[int]) -> torch.Tensor:
    """The last row of `slow_mixtures`."""
    return slow_mixtures(ensemble, ids)[-1]


def assert_greedy(ensemble: TokenEnsemble, prompt: list[int], answer: list[int], end: int | None = END) -> None:
    """Check an answer against the slow mixtures, token for token, up to the first near-tie of the float64 top two."""
    best = slow_mixtures(ensemble, prompt + answer)[len(prompt) - 1 : -1].topk(2)
    for place, token in enumerate(answer):
        if ensemble.config.combine != "vote" and best.values[place, 0] - best.values[place, 1] < 1e-5:
            return
        assert token == best.indices[place, 0], f"token {place} of the answer"
        if token == end:
            return
