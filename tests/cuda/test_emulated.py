"""The CUDA kernels, run without a GPU: the same sources with the threads of a block as fibers."""

from __future__ import annotations

import shutil

import pytest
import torch

from ensemw2s.ops import TokenAdjustments, mixture_log_probs, mixture_sample, token_adjustments
from ensemw2s.ops.checks import COMBINES
from tests.cuda.cases import run_cases
from tests.cuda.emulated import DTYPES, KERNELS, SANITIZE, compile_emulation
from tests.ops.helpers import assert_as_good_as_torch
from tests.ops.test_mixture_sample import (
    ROWS,
    SETTINGS,
    assert_likeliest,
    inputs,
    is_decided,
    one_row,
    settings_of_rows,
    weights_of_rows,
)
from tests.ops.test_token_adjustments import (
    assert_draws_what_float64_draws,
    check_extremes,
    check_rows_without_a_token,
)

# 1: one token; 33: past a group, rows that are not aligned; 257: the same for 16-bit types; 1031: past a chunk;
# 2100: rows aligned for float32, and more candidates than shared memory holds.
SIZES = (1, 33, 257, 1031, 2100)
EXPERTS = (1, 2, 5)
BROKEN_WEIGHTS = ([-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.0, 0.0])


def exact_expert_log_probs(logits, tokens):
    return torch.stack([x.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for x in logits])


def assert_same(a, b):
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_are_as_good_as_plain_torch(kernels, generator, dtype, combine):
    for experts in EXPERTS:
        for size in SIZES:
            logits, weights, _ = inputs(generator, experts, 3, size, dtype)
            exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
            plain = mixture_log_probs([x.float() for x in logits], weights, combine, impl="reference")
            # A card's power is off by two units in the last place, where torch's is off by one.
            assert_as_good_as_torch(kernels.mixture_log_probs(logits, weights, combine), plain, exact, atol=2e-6)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_those_of_float64(kernels, generator, dtype, combine):
    decided = total = 0
    for size in SIZES:
        for experts in EXPERTS:
            logits, weights, keys = inputs(generator, experts, 2, size, dtype)
            double = [x.double() for x in logits]
            log_probs = mixture_log_probs(double, weights.double(), combine)
            for setting in SETTINGS:
                got = kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting)
                exact = mixture_sample(double, weights.double(), combine=combine, **keys, **setting)
                rows = is_decided(log_probs, **keys, **setting)
                decided, total = decided + int(rows.sum()), total + len(rows)
                assert bool(got.valid.all())
                assert torch.equal(got.tokens[rows], exact.tokens[rows]), (size, experts, setting)
                picked = log_probs.gather(-1, got.tokens[:, None])[:, 0]
                torch.testing.assert_close(got.log_probs.double(), picked, atol=2e-6, rtol=1e-6)
                each = exact_expert_log_probs(logits, got.tokens)
                torch.testing.assert_close(got.expert_log_probs.double(), each, atol=2e-6, rtol=1e-6)
    assert decided > 0.9 * total or combine == "vote"


@pytest.mark.parametrize("combine", COMBINES)
def test_threads_may_run_in_any_order(kernels, generator, combine):
    logits, weights, keys = inputs(generator, 2, 2, 1500)
    for setting in SETTINGS:
        results = []
        for kernels.order in (1, 2, 3):
            results.append(kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting))
        assert_same(results[0], results[1])
        assert_same(results[0], results[2])


@pytest.mark.parametrize("combine", COMBINES)
def test_a_row_does_not_depend_on_its_batch(kernels, generator, combine):
    logits, weights, keys = inputs(generator, 3, 5, 1100, torch.bfloat16)
    for setting in SETTINGS:
        together = kernels.mixture_sample(logits, weights, combine=combine, top_logprobs=2, **keys, **setting)
        alone = kernels.mixture_sample(
            [x[3:4] for x in logits],
            weights,
            combine=combine,
            top_logprobs=2,
            **{k: v[3:4] for k, v in keys.items()},
            **setting,
        )
        mine = [x[:, 3:4] if x is together.expert_log_probs else x[3:4] for x in together]
        assert_same(mine, alone)


@pytest.mark.parametrize("combine", COMBINES)
def test_rows_of_their_own_are_what_they_are_alone(kernels, generator, combine):
    for dtype, real, whole in (
        (torch.float32, torch.float32, torch.int64),
        (torch.float16, torch.float64, torch.int32),
    ):
        rows = [row for row in ROWS if whole == torch.int64 or row.get("top_k", 0) < 2**31]
        settings = settings_of_rows(rows, real, whole)
        logits, _, keys = inputs(generator, 3, len(rows), 1500, dtype)
        weights = weights_of_rows(generator, len(rows), 3)
        together = kernels.mixture_sample(logits, weights, combine=combine, top_logprobs=3, **keys, **settings)
        for row in range(len(rows)):
            z, w, rest = one_row(row, logits, weights, keys, settings)
            alone = kernels.mixture_sample(z, w, combine=combine, top_logprobs=3, **rest)
            mine = [x[:, row : row + 1] if x is together.expert_log_probs else x[row : row + 1] for x in together]
            assert_same(mine, alone)
            exact = mixture_sample([x.double() for x in z], w.double(), combine=combine, **rest)
            log_probs = mixture_log_probs([x.double() for x in z], w.double(), combine)
            if is_decided(log_probs, **rest).item():
                assert torch.equal(alone.tokens, exact.tokens), rows[row]


@pytest.mark.parametrize("combine", COMBINES)
def test_an_expert_without_weight_in_a_row_is_not_read_there(kernels, generator, combine):
    logits, _, keys = inputs(generator, 3, 3, 200)
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    clean = kernels.mixture_log_probs(logits, weights, combine)
    for row, expert in zip(*torch.where(weights == 0), strict=True):
        logits[expert][row] = float("nan")
    assert_same([kernels.mixture_log_probs(logits, weights, combine)], [clean])
    for setting in SETTINGS:
        got = kernels.mixture_sample(logits, weights, combine=combine, top_logprobs=2, **keys, **setting)
        assert got.valid.tolist() == [True, True, False]
        assert got.expert_log_probs.isnan().T.tolist() == (weights == 0).tolist()
        assert got.tokens[2] == -1 and bool(got.log_probs[2].isnan())
        assert got.top_tokens[2].tolist() == [-1, -1] and bool(got.top_log_probs[2].isnan().all())


# 300 tokens are more than 128 shared candidates; at 100 all of them are kept.
@pytest.mark.parametrize(("size", "temperature"), [(100, 1.0), (300, 0.7), (300, 1.0)])
def test_of_tokens_that_are_equally_likely_a_nucleus_holds_the_first(kernels, size, temperature):
    logits, weights = torch.zeros(2, 12, size), torch.tensor([1.0, 2.0])
    keys = {"seeds": torch.arange(12), "positions": torch.full((12,), 3)}
    setting = {"temperature": temperature, "top_p": 0.2003}
    got = kernels.mixture_sample(logits, weights, **keys, **setting)
    assert torch.equal(got.tokens, mixture_sample(logits.double(), weights.double(), **keys, **setting).tokens)
    unfiltered = kernels.mixture_sample(logits, weights, **keys, temperature=temperature).tokens
    kept = unfiltered <= 0.2003 * size
    # A winner within the nucleus stays; the others are replaced.
    assert torch.equal(got.tokens[kept], unfiltered[kept]) and not bool(kept.all())
    assert int(got.tokens.max()) <= 0.2003 * size


@pytest.mark.parametrize("combine", COMBINES)
def test_rows_with_bad_values_are_not_valid_and_alone(kernels, generator, combine):
    nan, inf = float("nan"), float("inf")
    bad = {
        "temperature": torch.tensor([0.8, nan, -1.0, inf]),
        "top_k": torch.tensor([5, -1, -(2**60), 3]),
        "top_p": torch.tensor([0.9, 0.0, 1.5, nan], dtype=torch.float64),
        "min_p": torch.tensor([0.1, -0.1, 1.5, nan]),
    }
    logits, weights, keys = inputs(generator, 2, 4, 300)
    for name, values in bad.items():
        got = kernels.mixture_sample(logits, weights, combine=combine, top_logprobs=2, **keys, **{name: values})
        valid = [True, False, False, name == "top_k"]
        assert got.valid.tolist() == valid, name
        assert ((got.tokens == -1) == ~got.valid).all() and bool(got.log_probs[~got.valid].isnan().all())
        assert bool((got.top_tokens[~got.valid] == -1).all()) and bool(got.top_log_probs[~got.valid].isnan().all())
    of_rows = weights.repeat(4, 1)
    of_rows[1, 1], of_rows[2, 0], of_rows[3, 1] = -0.5, nan, inf
    got = kernels.mixture_sample(logits, of_rows, combine=combine, **keys)
    assert got.valid.tolist() == [True, False, False, False]


@pytest.mark.parametrize("combine", COMBINES)
def test_the_likeliest_tokens(kernels, generator, combine):
    for size, dtype in ((1, torch.float32), (33, torch.float16), (1031, torch.bfloat16), (2100, torch.float32)):
        logits, weights, keys = inputs(generator, 2, 2, size, dtype)
        exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
        for setting in ({"temperature": 0.0}, {}, {"top_k": 2, "temperature": 1.3}, {"top_p": 0.5}):
            count = min(64 if not setting else 6, size)
            got = kernels.mixture_sample(logits, weights, combine=combine, top_logprobs=count, **keys, **setting)
            assert_likeliest(got.top_tokens, got.top_log_probs, exact, count)
            plain = kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting)
            assert_same(got[:4], plain[:4])
    tied = torch.zeros(1, 1, 1500)
    tied[..., [1499, 7]] = 3.0
    got = kernels.mixture_sample(tied, torch.ones(1), top_logprobs=4, **{k: x[:1] for k, x in keys.items()})
    assert got.top_tokens.tolist() == [[7, 1499, 0, 1]]


def test_greedy_takes_the_lowest_of_equals(kernels):
    logits = torch.zeros(2, 3, 1500)
    logits[:, 0, [1499, 1130, 1131]] = 4.0
    logits[:, 1, [2, 1]] = 4.0
    keys = {"seeds": torch.zeros(3, dtype=torch.int64), "positions": torch.zeros(3, dtype=torch.int64)}
    for combine in COMBINES:
        got = kernels.mixture_sample(logits, torch.tensor([0.4, 0.6]), temperature=0.0, combine=combine, **keys)
        assert got.tokens.tolist() == [1130, 1, 0]


def test_top_k_keeps_ties_and_top_p_admits_lowest_ids_first(kernels):
    draws = 60
    logits = torch.zeros(1, draws, 100)
    logits[..., [90, 10, 50, 30]] = 5.0
    keys = {"seeds": torch.arange(draws), "positions": torch.zeros(draws, dtype=torch.int64)}
    p = float(logits[0, 0].softmax(-1)[10])
    one = torch.ones(1)
    assert set(kernels.mixture_sample(logits, one, top_k=2, **keys).tokens.tolist()) == {10, 30, 50, 90}
    assert set(kernels.mixture_sample(logits, one, top_p=1.5 * p, **keys).tokens.tolist()) == {10, 30}
    assert set(kernels.mixture_sample(logits, one, top_p=0.5 * p, **keys).tokens.tolist()) == {10}


@pytest.mark.parametrize("combine", COMBINES)
def test_broken_rows_are_reported_and_alone(kernels, generator, combine):
    logits, weights, keys = inputs(generator, 2, 4, 300)
    logits[0][1, 299] = float("nan")
    logits[1][2] = -torch.inf
    logits[1][3, 0] = torch.inf
    log_probs = kernels.mixture_log_probs(logits, weights, combine)
    assert log_probs.isnan().all(-1).tolist() == [False, True, True, True]
    assert not bool(log_probs[0].isnan().any())
    for setting in SETTINGS:
        got = kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting)
        assert got.valid.tolist() == [True, False, False, False]
        assert got.tokens[1:].tolist() == [-1, -1, -1]
        assert bool(got.log_probs[1:].isnan().all()) and bool(got.expert_log_probs[:, 1:].isnan().all())
        exact = mixture_sample([x[:1] for x in logits], weights, combine=combine, impl="reference",
                               seeds=keys["seeds"][:1], positions=keys["positions"][:1], **setting)  # fmt: skip
        torch.testing.assert_close(got.log_probs[:1], exact.log_probs)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("values", BROKEN_WEIGHTS)
def test_broken_weights_make_rows_invalid(kernels, generator, combine, values):
    logits, _, keys = inputs(generator, 2, 2, 100)
    weights = torch.tensor(values)
    assert bool(kernels.mixture_log_probs(logits, weights, combine).isnan().all())
    for setting in SETTINGS:
        got = kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting)
        assert not bool(got.valid.any()) and got.tokens.tolist() == [-1, -1]
        assert bool(got.log_probs.isnan().all()) and bool(got.expert_log_probs.isnan().all())


@pytest.mark.parametrize("combine", COMBINES)
def test_expert_of_weight_zero_has_no_say(kernels, generator, combine):
    logits, _, keys = inputs(generator, 3, 2, 200)
    logits[1][:] = float("nan")
    others = [logits[0], logits[2]]
    weights, half = torch.tensor([0.5, 0.0, 0.5]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(
        kernels.mixture_log_probs(logits, weights, combine), kernels.mixture_log_probs(others, half, combine)
    )
    for setting in SETTINGS:
        got = kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting)
        want = kernels.mixture_sample(others, half, combine=combine, **keys, **setting)
        assert torch.equal(got.tokens, want.tokens) and bool(got.valid.all())
        assert bool(got.expert_log_probs[1].isnan().all())


@pytest.mark.parametrize("combine", COMBINES)
def test_masked_tokens_are_never_drawn(kernels, generator, combine):
    logits, weights, keys = inputs(generator, 2, 8, 150)
    for expert in logits:
        expert[:, 3:] = -torch.inf
    assert bool((kernels.mixture_log_probs(logits, weights, combine)[:, 3:] == -torch.inf).all())
    for setting in (*SETTINGS, {"top_k": 140, "temperature": 100.0}):
        got = kernels.mixture_sample(logits, weights, combine=combine, **keys, **setting)
        assert bool((got.tokens < 3).all()), setting


def test_experts_without_a_common_token(kernels):
    logits = torch.full((2, 1, 20), -torch.inf)
    logits[0, 0, 3] = logits[1, 0, 4] = 0.0
    keys = {"seeds": torch.zeros(1, dtype=torch.int64), "positions": torch.zeros(1, dtype=torch.int64)}
    half = torch.tensor([0.5, 0.5])
    assert not kernels.mixture_sample(logits, half, combine="logprob", **keys).valid.item()
    assert kernels.mixture_sample(logits, half, combine="prob", **keys).valid.item()


@pytest.mark.parametrize("combine", COMBINES)
def test_extremes(kernels, combine):
    keys = {"seeds": torch.arange(3), "positions": torch.zeros(3, dtype=torch.int64)}
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, -3e38, 0.0]])[None]
    exact = mixture_log_probs(logits.double(), torch.tensor([3.0], dtype=torch.double), combine)
    got = kernels.mixture_log_probs(logits, torch.tensor([3.0]), combine)
    torch.testing.assert_close(got[:2].double(), exact[:2], rtol=1e-6, atol=1e-6)
    for setting in (*SETTINGS, {"temperature": 1e6}, {"temperature": 1e-6}, {"temperature": 1e-40, "top_p": 0.9}):
        drawn = kernels.mixture_sample(logits, torch.tensor([3.0]), combine=combine, **keys, **setting)
        assert bool(drawn.valid.all())
        assert setting == {"temperature": 1e6} or (drawn.tokens[0] == 0 and drawn.tokens[2] == 0)


def test_rows_of_any_stride_and_no_rows(kernels, generator):
    logits, weights, keys = inputs(generator, 2, 3, 130, torch.float16)
    wide = [torch.full((3, 137), float("nan"), dtype=torch.float16)[:, 1:131].copy_(x) for x in logits]
    expanded = [x[:1].expand(3, -1) for x in logits]
    for setting in SETTINGS:
        want = kernels.mixture_sample(logits, weights, **keys, **setting)
        assert_same(kernels.mixture_sample(wide, weights, **keys, **setting), want)
        repeated = kernels.mixture_sample(expanded, weights, **keys, **setting)
        assert repeated.tokens[0] == want.tokens[0]
    assert_same([kernels.mixture_log_probs(wide, weights)], [kernels.mixture_log_probs(logits, weights)])
    empty = torch.zeros(0, dtype=torch.int64)
    none = kernels.mixture_sample([x[:0] for x in logits], weights, seeds=empty, positions=empty)
    assert none.tokens.shape == (0,)
    assert kernels.mixture_log_probs([x[:0] for x in logits], weights).shape == (0, 130)


# ---- the emulation finds what it is there for ----


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_offers(kernels, generator, dtype, combine):
    assert_draws_what_float64_draws(kernels.mixture_sample, generator, combine, dtype, sizes=(33, 1031))


def test_offers_at_their_edges(kernels):
    check_rows_without_a_token(kernels.mixture_sample)
    check_extremes(kernels.mixture_sample)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": torch.tensor([[3, 2]])},
        {"tokens": torch.tensor([[3, 50]])},
        {"tokens": torch.tensor([[-1, 3]])},
        {"values": torch.zeros(3, 1, 2)},
        {"values": torch.full((3, 1, 2), torch.nan)},
        {"values": torch.full((3, 1, 2), torch.inf)},
    ],
)
def test_adjustments_that_nobody_made_spoil_their_row(kernels, change):
    made = token_adjustments(50, prompt=torch.tensor([[3, 5]]), repetition_penalty=2.0)
    kept = {name: x.float() if name == "values" else x.int() for name, x in change.items()}
    keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
    both = TokenAdjustments(
        *(torch.cat((mine, its), mine.dim() - 2) for mine, its in zip(made._replace(**kept), made, strict=True))
    )
    got = kernels.mixture_sample(torch.zeros(1, 2, 50), torch.ones(1), adjustments=both, **keys)
    assert got.valid.tolist() == [False, True] and got.tokens[0] == -1


def test_no_access_out_of_bounds(tmp_path):
    assert run_cases(compile_emulation(tmp_path / "cases", *SANITIZE, program=True)) == ""


# A fault: the file, what stands there, what takes its place, and whether only a sanitizer can see it.
FAULTS = {
    "no barrier before the warps' results are read": (
        "device.h",
        "  barrier();\n  value = slots",
        "  value = slots",
        False,
    ),
    "no barrier before they are written again": ("device.h", "  barrier();  // the slots may be", "  //", False),
    "one group more than there are": (
        "mixture_sample.cu",
        "    for (int g = thread_index(); g < groups; g += kRowThreads) {\n      if constexpr",
        "    for (int g = thread_index(); g <= groups; g += kRowThreads) {\n      if constexpr",
        True,
    ),
    "a vector that ends one past the row": (
        "mixture.cuh",
        "first + kVector<T> <= vocabulary)",
        "first + kVector<T> <= vocabulary + 1)",
        True,
    ),
    "one shared candidate more than there are": (
        "mixture_sample.cu",
        "    if (i >= kSharedCandidates) return;",
        "    if (i > kSharedCandidates) return;",
        True,
    ),
}
QUICK = ("no barrier before they are written again",)


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_is_found(tmp_path, fault):
    file, right, wrong, needs_sanitizer = FAULTS[fault]
    kernels = tmp_path / "cuda"
    shutil.copytree(KERNELS, kernels)
    text = (kernels / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: plant this fault anew"
    (kernels / file).write_text(text.replace(right, wrong))
    flags = SANITIZE if needs_sanitizer else ()
    found = run_cases(compile_emulation(tmp_path / "cases", *flags, program=True, kernels=kernels))
    # Without a barrier, garbage may be used as an index: a crash tells too.
    unsynchronised = ("wrong", "emulation:", "exit status -")
    words = ("heap-buffer-overflow", "out of bounds") if needs_sanitizer else unsynchronised
    assert any(word in found for word in words), found
