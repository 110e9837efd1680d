"""`mixture_sample` and `mixture_log_probs` against the code that a user would write in plain torch."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.measure import Case, rotating
from ensemw2s.ops import draw_seeds, mixture_log_probs, mixture_sample, pack_mask, token_adjustments

GREEDY, TOP_K_TOP_P = {"temperature": 0.0}, {"top_k": 50, "top_p": 0.9}
SETTINGS = {
    "greedy": GREEDY,
    "top-k 50 + top-p 0.9": TOP_K_TOP_P,
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.9 at 0.7": {"top_p": 0.9, "temperature": 0.7},
    "min-p 0.05": {"min_p": 0.05},
    "plain": {},
    "temperature 0.7": {"temperature": 0.7},
    "logprob": {"combine": "logprob"},
}


def eager_log_probs(logits, weights, combine="prob"):
    if combine == "prob":
        return sum(w * x.float().softmax(-1) for w, x in zip(weights, logits, strict=True)).log()
    return sum(w * x.float().log_softmax(-1) for w, x in zip(weights, logits, strict=True)).log_softmax(-1)


def eager_sample(logits, weights, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, combine="prob"):
    scores = eager_log_probs(logits, weights, combine)
    if temperature == 0:
        return scores.argmax(-1)
    if temperature != 1:
        scores = scores / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def flat(experts, rows, size):
    """Independent normal logits: hardly a token can be ruled out, the worst that a sampler meets."""
    return [torch.randn(rows, size) for _ in range(experts)]


def peaked(experts, rows, size):
    """Experts that agree by and large and find a few tokens far likelier than the rest, as language models do."""
    shared = 2.5 * torch.randn(rows, size) + 8 * (torch.rand(rows, size) < 5 / size)
    return [shared + 0.7 * torch.randn(rows, size) for _ in range(experts)]


def compare_samplers(benchmark, results, name, dtype, experts, rows, size, rounds=7, make=flat):
    setting = SETTINGS[name]
    weights = torch.softmax(torch.randn(experts), 0)
    keys = {"seeds": draw_seeds(rows), "positions": torch.zeros(rows, dtype=torch.int64)}
    # Bytes: every logit once; nothing of size V is written.
    bytes_read = experts * rows * size * dtype.itemsize
    buffers = rotating(lambda: [x.to(dtype) for x in make(experts, rows, size)], bytes_read)
    variants = {
        "op": lambda logits: mixture_sample(logits, weights, **setting, **keys),
        "eager": lambda logits: eager_sample(logits, weights, **setting),
        "read": lambda logits: [x.amax(-1) for x in logits],
    }
    if results.compiled:
        compiled = torch.compile(eager_sample, dynamic=False)
        variants["compile"] = lambda logits: compiled(logits, weights, **setting)
    case = Case("mixture_sample", f"{name}, {make.__name__}", dtype, experts, rows, size, bytes_read)
    return results.compare(benchmark, case, variants, buffers, rounds)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("make", [flat, peaked])
@pytest.mark.parametrize("name", SETTINGS)
def test_samplers(benchmark, results, name, make, rows):
    compare_samplers(benchmark, results, name, torch.float32, 8, rows, 49152, make=make)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", ["greedy", "top-k 50 + top-p 0.9", "plain"])
def test_float16(benchmark, results, name, rows):
    compare_samplers(benchmark, results, name, torch.float16, 8, rows, 49152)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", ["greedy", "top-k 50 + top-p 0.9"])
def test_bfloat16_and_a_large_vocabulary(benchmark, results, name, rows):
    compare_samplers(benchmark, results, name, torch.bfloat16, 8, rows, 151936, rounds=5)


@pytest.mark.parametrize("size", [49152, 151936])
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("name", ["greedy", "plain", "top-k 50 + top-p 0.9"])
def test_never_slower_than_plain_torch(benchmark, results, name, experts, rows, size):
    ratios = compare_samplers(benchmark, results, name, torch.float32, experts, rows, size, rounds=5)
    assert ratios["eager"] >= 1


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", ["greedy", "plain", "top-k 50 + top-p 0.9"])
def test_settings_of_rows(benchmark, results, name, rows):
    """Settings and weights of each row, the same in all of them, against numbers; and the likeliest tokens beside."""
    size, experts = 49152, 8
    setting = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | SETTINGS[name]
    of_rows = {setting_name: torch.full((rows,), value) for setting_name, value in setting.items()}
    weights = torch.softmax(torch.randn(experts), 0)
    weights_of_rows = weights.repeat(rows, 1)
    keys = {"seeds": draw_seeds(rows), "positions": torch.zeros(rows, dtype=torch.int64)}
    bytes_read = experts * rows * size * 4
    buffers = rotating(lambda: peaked(experts, rows, size), bytes_read)
    variants = {
        "op": lambda logits: mixture_sample(logits, weights, **setting, **keys),
        "settings of rows": lambda logits: mixture_sample(logits, weights, **of_rows, **keys),
        "settings and weights of rows": lambda logits: mixture_sample(logits, weights_of_rows, **of_rows, **keys),
        "top_logprobs=20": lambda logits: mixture_sample(logits, weights, top_logprobs=20, **setting, **keys),
        "read": lambda logits: [x.amax(-1) for x in logits],
    }
    case = Case("mixture_sample", f"{name}, rows' own", torch.float32, experts, rows, size, bytes_read)
    ratios = results.compare(benchmark, case, variants, buffers, rounds=15)
    assert ratios["settings of rows"] <= 1.1


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("name", ["greedy", "plain", "top-k 50 + top-p 0.9"])
def test_offers(benchmark, results, name, rows):
    """A grammar's mask, which allows most tokens as inside a string, and penalties over 1,000 seen tokens."""
    size, experts, setting = 49152, 8, SETTINGS[name]
    weights = torch.softmax(torch.randn(experts), 0)
    keys = {"seeds": draw_seeds(rows), "positions": torch.zeros(rows, dtype=torch.int64)}
    mask = pack_mask(torch.rand(rows, size) < 0.95)
    text = torch.randint(0, size, (rows, 1000))
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.1}
    changes = token_adjustments(size, generated=text, **penalties)
    bytes_read = experts * rows * size * 4
    buffers = rotating(lambda: peaked(experts, rows, size), bytes_read)
    variants = {
        "op": lambda logits: mixture_sample(logits, weights, **setting, **keys),
        "mask": lambda logits: mixture_sample(logits, weights, mask=mask, **setting, **keys),
        "penalties": lambda logits: mixture_sample(logits, weights, adjustments=changes, **setting, **keys),
        "penalties counted anew": lambda logits: mixture_sample(
            logits, weights, adjustments=token_adjustments(size, generated=text, **penalties), **setting, **keys
        ),
        "read": lambda logits: [x.amax(-1) for x in logits],
    }
    case = Case("mixture_sample", f"{name}, offers", torch.float32, experts, rows, size, bytes_read)
    results.compare(benchmark, case, variants, buffers, rounds=15)


def test_host_time(benchmark, results):
    """What a call costs beside its reads: eight experts with hardly a token."""
    logits, weights = list(torch.randn(8, 1, 16)), torch.ones(8)
    keys = {"seeds": draw_seeds(1), "positions": torch.zeros(1, dtype=torch.int64)}
    of_rows = {"temperature": torch.ones(1), "top_k": torch.zeros(1, dtype=torch.int64)}
    raw = (logits, weights, 1.0, 0, 1.0, 0.0, None, None, None, None, *keys.values(), 0, 0, None, None, None, None)

    def calls(call):
        return lambda _: [call() for _ in range(1000)]

    variants = {
        "op": calls(lambda: mixture_sample(logits, weights, **keys)),
        "settings of rows": calls(lambda: mixture_sample(logits, weights, **of_rows, **keys)),
        "without Python's checks": calls(lambda: torch.ops.ensemw2s.mixture_sample(*raw)),
    }
    case = Case("mixture_sample", "1,000 calls of 16 tokens", torch.float32, 8, 1, 16, 8 * 16 * 4)
    results.compare(benchmark, case, variants, [None], rounds=15)


@pytest.mark.parametrize("rows", [8, 64])
def test_log_probs(benchmark, results, rows):
    size, experts = 49152, 8
    weights = torch.softmax(torch.randn(experts), 0)
    # Bytes: every logit twice (normaliser, then value) and each result once.
    bytes_moved = (2 * experts + 1) * rows * size * 4
    buffers = rotating(lambda: [torch.randn(rows, size) for _ in range(experts)], experts * rows * size * 4)
    variants = {
        "op": lambda logits: mixture_log_probs(logits, weights),
        "eager": lambda logits: eager_log_probs(logits, weights),
        "read": lambda logits: [x.amax(-1) for x in logits],
    }
    case = Case("mixture_log_probs", "prob", torch.float32, experts, rows, size, bytes_moved)
    results.compare(benchmark, case, variants, buffers)
