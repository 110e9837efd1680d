"""Every backend on a GPU against float64 on the CPU, and what only a GPU can show: streams, graphs, no waiting.

`ENSEMW2S_TEST_DEVICE=cpu TRITON_INTERPRET=1` runs the comparisons on Triton's interpreter instead.
"""

from __future__ import annotations

import os

import pytest
import torch

from ensemw2s.ops import available_backends, mixture_log_probs, mixture_sample, mixture_scores, token_scores
from ensemw2s.ops.checks import COMBINES
from tests.ops.helpers import DTYPES
from tests.ops.test_losses import NAMES, Case
from tests.ops.test_mixture_sample import (
    ROWS,
    SETTINGS,
    inputs,
    is_decided,
    one_row,
    settings_of_rows,
    weights_of_rows,
)

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("ENSEMW2S_TEST_DEVICE", "cuda")
# 1: one token; 33: below a tile; 4099: past tiles, odd; 50257: a vocabulary whose rows are not aligned.
SIZES = (1, 33, 4099, 50257) if DEVICE == "cuda" else (1, 33, 2100)
BACKENDS = [
    (op, impl) for op, impls in available_backends(DEVICE).items() for impl in impls if impl in ("cuda", "triton")
]


def test_there_is_something_to_test():
    assert {op for op, _ in BACKENDS} == set(available_backends(DEVICE))
    assert DEVICE != "cuda" or ("mixture_sample", "cuda") in BACKENDS


def backends_of(op):
    return [impl for name, impl in BACKENDS if name == op]


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("impl", backends_of("mixture_log_probs"))
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs(generator, impl, combine, dtype):
    for size in SIZES:
        for experts in (1, 3, 8):
            logits, weights, _ = inputs(generator, experts, 3, size, dtype)
            exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
            got = mixture_log_probs(on_device(*logits), weights.to(DEVICE), combine, impl=impl).cpu()
            torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("impl", backends_of("mixture_sample"))
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(generator, impl, combine, dtype):
    """The token that float64 draws wherever rounding cannot change it; so all backends draw the same."""
    decided = total = 0
    for size in SIZES:
        for experts in (1, 3):
            logits, weights, keys = inputs(generator, experts, 3, size, dtype)
            double = [x.double() for x in logits]
            log_probs = mixture_log_probs(double, weights.double(), combine)
            moved = on_device(*logits), weights.to(DEVICE)
            moved_keys = {name: value.to(DEVICE) for name, value in keys.items()}
            for setting in SETTINGS:
                got = mixture_sample(*moved, combine=combine, impl=impl, **moved_keys, **setting)
                exact = mixture_sample(double, weights.double(), combine=combine, **keys, **setting)
                rows = is_decided(log_probs, **keys, **setting)
                decided, total = decided + int(rows.sum()), total + 3
                tokens = got.tokens.cpu()
                assert bool(got.valid.all())
                assert torch.equal(tokens[rows], exact.tokens[rows]), (size, experts, setting)
                picked = log_probs.gather(-1, tokens[:, None])[:, 0]
                torch.testing.assert_close(got.log_probs.cpu().double(), picked, atol=1e-5, rtol=2e-6)
    assert decided > 0.9 * total or combine == "vote"


@pytest.mark.parametrize("impl", backends_of("token_scores"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(generator, impl, dtype):
    for size in SIZES:
        logits, weights, _ = inputs(generator, 3, 5, size, dtype)
        labels = torch.randint(0, size, (5,), generator=generator)
        labels[1] = -100
        double = [x.double() for x in logits]
        cases = [(token_scores, (logits[0],), (double[0],))]
        cases += [(mixture_scores, (logits, weights), (double, weights.double()))]
        for function, single, exact in cases:
            moved = [on_device(*x) if isinstance(x, list) else x.to(DEVICE) for x in single]
            got = function(*moved, labels.to(DEVICE), impl=impl)
            expected = function(*exact, labels)
            assert torch.equal(got.correct.cpu(), expected.correct)
            torch.testing.assert_close(got.log_probs.cpu().double(), expected.log_probs, atol=1e-5, rtol=2e-6)
            torch.testing.assert_close(got.entropy.cpu().double(), expected.entropy, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses(generator, name, dtype):
    for size in (3, 65, 4099 if DEVICE == "cuda" else 257):
        for impl in backends_of(name):
            case = Case(name, generator, size, dtype)
            exact, exact_gradients = case.with_gradients(case.define, [x.double() for x in case.leaves])
            moved = case.on(DEVICE)
            got, gradients = moved.with_gradients(moved.call, moved.leaves, impl=impl)
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(got.cpu().double(), exact, rtol=max(1e-5, unit), atol=1e-5)
            for ours, truth in zip(gradients, exact_gradients, strict=True):
                allowed = (4 * unit + 1e-5) * truth.abs().max() + 1e-6
                assert (ours.cpu().double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("impl", backends_of("mixture_sample"))
@pytest.mark.parametrize("combine", COMBINES)
def test_rows_of_their_own(generator, impl, combine):
    """Each row its own settings and weights, and the likeliest tokens beside: what the row is alone."""
    size, settings = SIZES[-1], settings_of_rows()
    logits, _, keys = inputs(generator, 3, len(ROWS), size)
    weights = weights_of_rows(generator, len(ROWS), 3)
    moved = {name: value.to(DEVICE) for name, value in (keys | settings).items()}
    got = mixture_sample(on_device(*logits), weights.to(DEVICE), combine=combine, impl=impl, top_logprobs=5, **moved)
    assert bool(got.valid.all())
    tokens = got.tokens.cpu()
    for row in range(len(ROWS)):
        z, w, rest = one_row(row, [x.double() for x in logits], weights.double(), keys, settings)
        log_probs = mixture_log_probs(z, w, combine)
        if is_decided(log_probs, **rest).item():
            assert tokens[row] == mixture_sample(z, w, combine=combine, **rest).tokens.item(), ROWS[row]
        torch.testing.assert_close(
            got.top_log_probs[row].cpu().double(), log_probs[0].topk(5).values, atol=1e-5, rtol=2e-6
        )
        picked = log_probs[0, got.top_tokens[row].cpu().clamp(min=0)].masked_fill(
            got.top_tokens[row].cpu() < 0, -torch.inf
        )
        torch.testing.assert_close(got.top_log_probs[row].cpu().double(), picked, atol=1e-5, rtol=2e-6)
    bad = {name: value[:2].to(DEVICE) for name, value in keys.items()}
    broken = mixture_sample(
        [x[:2].to(DEVICE) for x in logits], torch.ones(3, device=DEVICE), impl=impl,
        top_p=torch.tensor([0.9, 0.0], device=DEVICE), **bad,
    )  # fmt: skip
    assert broken.valid.tolist() == [True, False] and int(broken.tokens[1]) == -1


@pytest.mark.parametrize("impl", backends_of("mixture_sample"))
def test_broken_rows(impl):
    logits = torch.zeros(2, 6, 700)
    logits[0, 1, 5] = torch.nan
    logits[1, 2] = -torch.inf
    logits[0, 3, 699] = torch.inf
    logits[:, 4, 650] = 1e4
    logits[:, 5] = -1e4
    keys = {name: torch.zeros(6, dtype=torch.int64, device=DEVICE) for name in ("seeds", "positions")}
    for setting in ({}, {"temperature": 0.0}, {"top_k": 7, "top_p": 0.5}):
        got = mixture_sample(logits.to(DEVICE), [0.5, 0.5], impl=impl, **keys, **setting)
        assert got.valid.tolist() == [True, False, False, False, True, True]
        assert bool((got.tokens.cpu()[1:4] == -1).all()) and int(got.tokens[4]) == 650
        assert bool(got.log_probs.isnan().cpu()[1:4].all())


def small_calls(impl):
    """One call of every op that `impl` has, on inputs that stay the same."""
    draw = torch.Generator().manual_seed(1)
    logits, weights, keys = inputs(draw, 4, 8, 5003, torch.bfloat16)
    logits, weights = on_device(*logits), weights.to(DEVICE)
    keys = {name: value.to(DEVICE) for name, value in keys.items()}
    labels = torch.randint(0, 5003, (8,), generator=draw).to(DEVICE)
    calls = {"mixture_log_probs": lambda: mixture_log_probs(logits, weights, impl=impl)}
    calls["mixture_sample"] = lambda: [
        mixture_sample(logits, weights, impl=impl, **keys, **setting).tokens
        for setting in (*SETTINGS, {"temperature": torch.ones(8, device=DEVICE), "top_logprobs": 3})
    ]
    calls["token_scores"] = lambda: token_scores(logits[0], labels, impl=impl).entropy
    calls["mixture_scores"] = lambda: mixture_scores(logits, weights, labels, impl=impl).entropy
    for name in NAMES:
        case = Case(name, draw, 257, torch.bfloat16).on(DEVICE)
        calls[name] = lambda case=case: case.with_gradients(case.call, case.leaves, impl=impl)
    return {name: call for name, call in calls.items() if impl in backends_of(name)}


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for result in results for x in flat(result)]


needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="the interpreter has no streams")


@needs_gpu
@pytest.mark.parametrize("impl", sorted({impl for _, impl in BACKENDS}))
class TestOnlyOnAGpu:
    def test_nothing_waits_for_the_host(self, impl):
        calls = small_calls(impl)
        for call in calls.values():
            call()  # compiled and loaded
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for name, call in calls.items():
                # The checks of a loss's test are allowed to wait, the ops are not.
                if name not in NAMES:
                    call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_kernels_run_on_the_current_stream(self, impl):
        for name, call in small_calls(impl).items():
            expected = flat(call())
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Work that a kernel on another stream would overtake.
                busy = torch.randn(4096, 4096, device="cuda")
                for _ in range(20):
                    busy = busy @ busy / 64
                got = flat(call())
            torch.cuda.current_stream().wait_stream(stream)
            for ours, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)

    def test_cuda_graphs_capture_them(self, impl):
        for name, call in small_calls(impl).items():
            if name in NAMES:
                continue
            expected = flat(call())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = flat(call())
            graph.replay()
            torch.cuda.synchronize()
            for ours, theirs in zip(captured, expected, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)

    def test_compiles_whole(self, impl):
        torch.compiler.reset()
        for name, call in small_calls(impl).items():
            if name in NAMES:
                continue
            compiled = torch.compile(call, fullgraph=True)
            for ours, theirs in zip(flat(compiled()), flat(call()), strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)
