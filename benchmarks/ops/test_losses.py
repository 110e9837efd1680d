"""Scores and losses against the code that a user would write in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.measure import Case, rotating
from ensemw2s.ops import linear_mixture_kl, linear_weighted_cross_entropy, mixture_scores, token_scores

VOCABULARY, WIDTH = 49152, 576


def scores_in_torch(log_probs, labels):
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, labels[:, None])[:, 0], log_probs.argmax(-1) == labels, entropy


def test_mixture_scores(benchmark, results):
    """All 4 GB of logits at once."""
    tokens, experts = 4096, 5
    weights = torch.softmax(torch.randn(experts), 0)
    labels = torch.randint(0, VOCABULARY, (tokens,))
    bytes_read = experts * tokens * VOCABULARY * 4
    # Larger than any cache: one is enough.
    buffers = [[torch.randn(tokens, VOCABULARY) for _ in range(experts)]]

    def eager(logits):
        probs = sum(w * x.softmax(-1) for w, x in zip(weights, logits, strict=True))
        return scores_in_torch(probs.log(), labels)

    variants = {
        "op": lambda logits: mixture_scores(logits, weights, labels),
        "eager": eager,
        "read": lambda logits: [x.amax(-1) for x in logits],
    }
    case = Case("mixture_scores", "labels", torch.float32, experts, tokens, VOCABULARY, bytes_read)
    results.compare(benchmark, case, variants, buffers, rounds=3)


def test_token_scores(benchmark, results):
    tokens = 512
    labels = torch.randint(0, VOCABULARY, (tokens,))
    bytes_read = tokens * VOCABULARY * 4
    buffers = rotating(lambda: torch.randn(tokens, VOCABULARY), bytes_read)
    variants = {
        "op": lambda logits: token_scores(logits, labels),
        "eager": lambda logits: scores_in_torch(logits.log_softmax(-1), labels),
        "read": lambda logits: logits.amax(-1),
    }
    case = Case("token_scores", "labels", torch.float32, 1, tokens, VOCABULARY, bytes_read)
    results.compare(benchmark, case, variants, buffers, rounds=5)


def with_backward(loss, *leaves):
    for leaf in leaves:
        leaf.grad = None
    loss().backward()


def test_linear_weighted_cross_entropy(benchmark, results):
    """Forward and backward; 15% of 4,096 tokens carry weight."""
    tokens = 4096
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    head = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,))
    weights = (torch.rand(tokens) < 0.15).float()

    def everywhere():
        losses = functional.cross_entropy(hidden @ head.T, labels, reduction="none")
        return (weights * losses).sum()

    def selected():
        rows = weights.nonzero()[:, 0]
        losses = functional.cross_entropy(hidden[rows] @ head.T, labels[rows], reduction="none")
        return (weights[rows] * losses).sum()

    losses = {
        "op": lambda: linear_weighted_cross_entropy(hidden, head, labels, weights),
        "eager, selected": selected,
        "eager": everywhere,
    }
    variants = {name: lambda _, loss=loss: with_backward(loss, hidden, head) for name, loss in losses.items()}
    # Bytes: the head is read once forward and once backward, its gradient written once.
    case = Case(
        "linear_weighted_cross_entropy", "15%", torch.float32, 1, tokens, VOCABULARY, 3 * VOCABULARY * WIDTH * 4
    )
    results.compare(benchmark, case, variants, [None], rounds=3)


def test_linear_mixture_kl(benchmark, results):
    """Forward and backward through the student; 1,024 answer tokens, five teachers."""
    tokens, experts = 1024, 5
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    head = (torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
    states = [torch.randn(tokens, WIDTH) for _ in range(experts)]
    heads = [torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5 for _ in range(experts)]
    weights, token_weights = torch.softmax(torch.randn(experts), 0), torch.ones(tokens)

    def eager():
        probs = sum(w * (x @ y.T).softmax(-1) for w, x, y in zip(weights, states, heads, strict=True))
        log_q = (hidden @ head.T).log_softmax(-1)
        return (token_weights * (probs * (probs.log() - log_q)).sum(-1)).sum()

    losses = {
        "op": lambda: linear_mixture_kl(hidden, head, states, heads, weights, token_weights),
        "eager": eager,
    }
    variants = {name: lambda _, loss=loss: with_backward(loss, hidden, head) for name, loss in losses.items()}
    case = Case(
        "linear_mixture_kl", "all", torch.float32, experts, tokens, VOCABULARY, (experts + 3) * VOCABULARY * WIDTH * 4
    )
    results.compare(benchmark, case, variants, [None], rounds=3)
