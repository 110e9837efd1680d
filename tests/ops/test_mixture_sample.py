from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ensemw2s.ops import draw_seeds, mixture_log_probs, mixture_sample
from ensemw2s.ops.checks import COMBINES
from ensemw2s.ops.mixture_sample import filtered_scores
from ensemw2s.ops.randomness import gumbel_noise
from tests.ops.helpers import DTYPES, needs_cpp

IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp)]
SETTINGS = (
    {"temperature": 0.0},  # greedy
    {},  # plain sampling: the race over all tokens
    {"temperature": 0.7},  # the same, sharpened
    {"top_k": 5},  # selection by count
    {"top_k": 300},  # more than there are groups in the small sizes
    {"top_p": 0.9},  # selection by mass that is known to sum to 1
    {"top_p": 0.9, "temperature": 1.5},  # selection by mass that has to be summed
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},  # all of them
)
# 1: one token; 33: below a tile; 257: past an AVX-512 tile; 8195: past one segment of the scan, odd.
SIZES = (1, 33, 257, 8195)


# Rows of every kind side by side: greedy, plain, sharpened, cold, by count, by mass, by ratio, all together.
ROWS = (
    {"temperature": 0.0, "top_k": 7, "top_p": 0.5},
    {},
    {"temperature": 0.7},
    {"temperature": 1e-4},
    {"top_k": 5},
    {"top_k": 2**40},
    {"top_p": 0.9},
    {"top_p": 0.8, "temperature": 1.5},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
)
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def settings_of_rows(rows=ROWS, real=torch.float32, whole=torch.int64):
    """A tensor of each setting; in float32 the values that rows have alone are those that it holds."""
    return {
        name: torch.tensor([row.get(name, off) for row in rows], dtype=whole if name == "top_k" else real)
        for name, off in OFF.items()
    }


def setting_of_row(settings, row):
    """The numbers of one row; what is a number already is every row's."""
    return {name: x[row].item() if isinstance(x, torch.Tensor) else x for name, x in settings.items()}


def weights_of_rows(generator, rows, experts):
    """Weights [rows, experts] in which some experts have no say."""
    weights = torch.rand(rows, experts, generator=generator) + 0.1
    idle = torch.rand(rows, experts, generator=generator) < 0.4
    idle[:, 0] &= ~idle.all(-1)
    return weights.masked_fill(idle, 0.0)


def one_row(row, logits, weights, keys, settings):
    """The arguments of one row of a batch, alone, with numbers as settings."""
    own = weights[row] if weights.dim() > 1 else weights
    alone = {name: value[row : row + 1] for name, value in keys.items()}
    return [x[row : row + 1] for x in logits], own, alone | setting_of_row(settings, row)


def inputs(generator, experts, rows, size, dtype=torch.float32, scale=3.0):
    logits = [(torch.randn(rows, size, generator=generator) * scale).to(dtype) for _ in range(experts)]
    weights = torch.rand(experts, generator=generator) + 0.1
    seeds = draw_seeds(rows, generator=generator)
    return logits, weights, {"seeds": seeds, "positions": torch.arange(rows)}


def is_decided(log_probs, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, *, seeds, positions):
    """Rows in which rounding cannot change the draw: perturbed top-two gap > 1e-4, no filter edge within 1e-5."""
    if log_probs.shape[-1] == 1:
        return torch.ones(len(log_probs), dtype=torch.bool)
    if temperature == 0:
        top = log_probs.topk(2).values
        return top[:, 0] - top[:, 1] > 1e-4
    narrow = filtered_scores(log_probs, temperature, top_k, top_p - 1e-5 if top_p < 1 else 1.0, min_p * (1 + 1e-5))
    wide = filtered_scores(log_probs, temperature, top_k, top_p + 1e-5 if top_p < 1 else 1.0, min_p * (1 - 1e-5))
    same_support = torch.equal(narrow.isfinite(), wide.isfinite())
    noise = gumbel_noise(seeds[:, None], positions[:, None], torch.arange(log_probs.shape[-1]))
    top = (wide + noise).topk(2).values
    return (top[:, 0] - top[:, 1] > 1e-4) & same_support


@needs_cpp
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_draws_what_float64_draws(generator, dtype, combine):
    decided = 0
    for size in SIZES:
        for experts in (1, 2, 5):
            logits, weights, keys = inputs(generator, experts, 3, size, dtype)
            double = [x.double() for x in logits]
            log_probs = mixture_log_probs(double, weights.double(), combine)
            for setting in SETTINGS:
                got = mixture_sample(logits, weights, combine=combine, impl="cpp", **keys, **setting)
                exact = mixture_sample(double, weights.double(), combine=combine, **keys, **setting)
                rows = is_decided(log_probs, **keys, **setting)
                decided += int(rows.sum())
                assert bool(got.valid.all())
                assert torch.equal(got.tokens[rows], exact.tokens[rows]), (size, experts, setting)
                picked = log_probs.gather(-1, got.tokens[:, None])[:, 0]
                torch.testing.assert_close(got.log_probs.double(), picked, atol=2e-6, rtol=1e-6)
                each = torch.stack([x.log_softmax(-1).gather(-1, got.tokens[:, None])[:, 0] for x in double])
                torch.testing.assert_close(got.expert_log_probs.double(), each, atol=2e-6, rtol=1e-6)
    assert decided > 0.9 * len(SIZES) * 3 * len(SETTINGS) * 3 or combine == "vote"


def assert_likeliest(tokens, log_probs, exact, count):
    """The likeliest of ``exact``, falling; rounding may change the order of those that are nearly as likely."""
    ordered = exact.sort(dim=-1, descending=True, stable=True)
    want, ids = ordered.values[:, :count], ordered.indices[:, :count]
    assert tokens.shape == log_probs.shape == want.shape
    torch.testing.assert_close(log_probs.double(), want, atol=2e-6, rtol=1e-6)
    assert bool((log_probs[:, 1:] <= log_probs[:, :-1]).all())
    possible = want > -torch.inf
    assert torch.equal(tokens == -1, ~possible)
    picked = exact.gather(-1, tokens.clamp(min=0)).masked_fill(~possible, -torch.inf)
    torch.testing.assert_close(picked, want, atol=4e-6, rtol=2e-6)
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in tokens)
    # A token that is clearly apart from its neighbours stands where it belongs.
    wider = exact.sort(-1, descending=True).values[:, : count + 1]
    gaps = torch.cat([wider[:, :1] * 0 + 1, wider[:, :-1] - wider[:, 1:]], -1).nan_to_num(nan=1.0)
    after = gaps[:, 1:] if wider.shape[1] > count else torch.cat([gaps[:, 1:], gaps[:, :1] * 0 + 1], -1)
    clear = (gaps[:, :count] > 1e-4) & (after > 1e-4) & possible
    assert torch.equal(tokens[clear], ids[clear])


def warped(log_probs, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Transformers' own warpers, in the order in which generate applies them."""
    scores = TemperatureLogitsWarper(float(temperature))(None, log_probs)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return MinPLogitsWarper(min_p)(None, scores) if min_p else scores


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_support_is_that_of_transformers(generator, impl, setting):
    logits, weights, _ = inputs(generator, 3, 1, 700)
    draws = 2000
    keys = {"seeds": torch.full((draws,), 77), "positions": torch.arange(draws)}
    tokens = mixture_sample([x.expand(draws, -1) for x in logits], weights, impl=impl, **keys, **setting).tokens
    log_probs = mixture_log_probs([x.double() for x in logits], weights.double())
    top_p = setting.get("top_p", 1.0)
    support = [
        warped(log_probs, **(setting | ({"top_p": top_p + margin} if top_p < 1 else {}))).softmax(-1)[0]
        for margin in (-1e-5, 1e-5)
    ]
    seen = torch.bincount(tokens, minlength=700) > 0
    assert not bool((seen & (support[1] == 0)).any())
    # A token of probability 0.01 or more stays away from 2000 draws with probability below 1e-8.
    assert bool(seen[support[0] > 0.01].all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.95}])
def test_draws_follow_the_distribution(generator, impl, combine, setting):
    logits, weights, _ = inputs(generator, 3, 1, 12, scale=1.0)
    draws = 200_000
    seeds, positions = draw_seeds(draws, generator=generator), torch.arange(draws) // 7
    expanded = [x.expand(draws, -1) for x in logits]
    tokens = mixture_sample(
        expanded, weights, seeds=seeds, positions=positions, combine=combine, impl=impl, **setting
    ).tokens
    log_probs = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
    expected = warped(log_probs, **setting).softmax(-1)[0] * draws
    counts = torch.bincount(tokens, minlength=12)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    if int(possible.sum()) > 1:  # votes may leave one token
        expected = expected[possible] * draws / expected.sum()
        assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("impl", IMPLS)
class TestEveryBackend:
    def test_greedy_takes_the_lowest_of_equals(self, impl):
        logits = torch.zeros(2, 3, 500)
        logits[:, 0, [499, 130, 131]] = 4.0
        logits[:, 1, [2, 1]] = 4.0
        keys = {"seeds": torch.zeros(3, dtype=torch.int64), "positions": torch.zeros(3, dtype=torch.int64)}
        for combine in COMBINES:
            got = mixture_sample(logits, [0.4, 0.6], temperature=0.0, combine=combine, impl=impl, **keys)
            assert got.tokens.tolist() == [130, 1, 0]

    def test_top_k_keeps_ties_and_top_p_admits_lowest_ids_first(self, impl):
        draws = 400
        logits = torch.zeros(1, draws, 100)
        logits[..., [90, 10, 50, 30]] = 5.0
        keys = {"seeds": torch.arange(draws), "positions": torch.zeros(draws, dtype=torch.int64)}
        tied = mixture_sample(logits, [1.0], top_k=2, impl=impl, **keys).tokens
        assert set(tied.tolist()) == {10, 30, 50, 90}
        p = float(logits[0, 0].softmax(-1)[10])
        nucleus = mixture_sample(logits, [1.0], top_p=1.5 * p, impl=impl, **keys).tokens
        assert set(nucleus.tolist()) == {10, 30}
        one = mixture_sample(logits, [1.0], top_p=0.5 * p, impl=impl, **keys).tokens
        assert set(one.tolist()) == {10}

    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("combine", COMBINES)
    def test_broken_rows_are_reported_and_alone(self, impl, setting, combine, generator):
        logits, weights, keys = inputs(generator, 2, 4, 300)
        logits[0][1, 299] = float("nan")
        logits[1][2] = -torch.inf
        logits[1][3, 0] = torch.inf
        got = mixture_sample(logits, weights, combine=combine, impl=impl, **keys, **setting)
        assert got.valid.tolist() == [True, False, False, False]
        assert got.tokens[1:].tolist() == [-1, -1, -1]
        assert bool(got.log_probs[1:].isnan().all()) and bool(got.expert_log_probs[:, 1:].isnan().all())
        alone = mixture_sample(
            [x[:1] for x in logits], weights, combine=combine, impl=impl, seeds=keys["seeds"][:1],
            positions=keys["positions"][:1], **setting,
        )  # fmt: skip
        assert got.tokens[0] == alone.tokens[0]

    def test_expert_of_weight_zero_has_no_say(self, impl, generator):
        logits, _, keys = inputs(generator, 3, 4, 200)
        logits[1][:] = float("nan")
        for setting in SETTINGS:
            got = mixture_sample(logits, [0.5, 0.0, 0.5], impl=impl, **keys, **setting)
            want = mixture_sample([logits[0], logits[2]], [0.5, 0.5], impl=impl, **keys, **setting)
            assert torch.equal(got.tokens, want.tokens) and bool(got.valid.all())
            assert bool(got.expert_log_probs[1].isnan().all())

    def test_masked_tokens_are_never_drawn(self, impl, generator):
        logits, weights, keys = inputs(generator, 2, 64, 150)
        for expert in logits:
            expert[:, 3:] = -torch.inf
        for combine in COMBINES:
            for setting in (*SETTINGS, {"top_k": 140, "temperature": 100.0}):
                got = mixture_sample(logits, weights, combine=combine, impl=impl, **keys, **setting)
                assert bool((got.tokens < 3).all()), (combine, setting)

    def test_experts_without_a_common_token(self, impl):
        logits = torch.full((2, 1, 20), -torch.inf)
        logits[0, 0, 3] = logits[1, 0, 4] = 0.0
        keys = {"seeds": torch.zeros(1, dtype=torch.int64), "positions": torch.zeros(1, dtype=torch.int64)}
        assert not mixture_sample(logits, [0.5, 0.5], combine="logprob", impl=impl, **keys).valid.item()
        assert mixture_sample(logits, [0.5, 0.5], combine="prob", impl=impl, **keys).valid.item()

    def test_extremes(self, impl):
        keys = {"seeds": torch.arange(3), "positions": torch.zeros(3, dtype=torch.int64)}
        logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, -3e38, 0.0]])[None]
        for setting in SETTINGS:
            got = mixture_sample(logits, [3.0], impl=impl, **keys, **setting)
            assert bool(got.valid.all()) and got.tokens[0] == 0 and got.tokens[2] == 0
        hot = mixture_sample(logits, [3.0], impl=impl, temperature=1e6, **keys)
        assert bool(hot.valid.all())

    def test_no_rows(self, impl):
        empty = torch.zeros(0, dtype=torch.int64)
        got = mixture_sample(torch.zeros(3, 0, 9), [1.0, 1.0, 1.0], seeds=empty, positions=empty, impl=impl)
        assert got.tokens.shape == (0,) and got.expert_log_probs.shape == (3, 0)

    def test_seeds_and_positions_both_matter(self, impl, generator):
        logits, weights, _ = inputs(generator, 2, 500, 50, scale=0.1)
        same = torch.full((500,), 3)
        for keys in ({"seeds": torch.arange(500), "positions": same}, {"seeds": same, "positions": torch.arange(500)}):
            tokens = mixture_sample(logits, weights, impl=impl, **keys).tokens
            assert len(tokens.unique()) == 50
        again = mixture_sample(logits, weights, impl=impl, **keys).tokens
        assert torch.equal(tokens, again)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"logits": torch.zeros(2, 3)}, ValueError, r"\[B, V\]"),
            ({"temperature": -0.1}, ValueError, "temperature=-0.1"),
            ({"temperature": float("nan")}, ValueError, "temperature=nan"),
            ({"top_k": -1}, ValueError, "top_k=-1"),
            ({"top_k": 2.0}, TypeError, "top_k must be an int"),
            ({"top_p": 0.0}, ValueError, "top_p=0.0"),
            ({"top_p": 1.1}, ValueError, "top_p=1.1"),
            ({"min_p": 1.1}, ValueError, "min_p=1.1"),
            ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds must have shape \(2,\)"),
            ({"positions": torch.zeros(2)}, TypeError, "positions must be an int64 tensor"),
            ({"seeds": 3}, TypeError, r"seeds must be an int64 tensor, got int; ops.draw_seeds\(B\) makes them"),
            ({"weights": [-1.0, 2.0]}, ValueError, "-1"),
            ({"combine": "max"}, ValueError, "combine='max'"),
        ],
    )
    def test_bad_input(self, impl, change, error, words):
        arguments = {
            "logits": torch.zeros(2, 2, 3),
            "weights": torch.ones(2),
            "seeds": torch.zeros(2, dtype=torch.int64),
            "positions": torch.zeros(2, dtype=torch.int64),
            "impl": impl,
        } | change
        with pytest.raises(error, match=words):
            mixture_sample(arguments.pop("logits"), arguments.pop("weights"), **arguments)

    def test_compiles_whole(self, impl, generator, fresh_compiler):
        logits, weights, keys = inputs(generator, 2, 3, 33)
        compiled = torch.compile(mixture_sample, fullgraph=True, backend="aot_eager")
        for setting in SETTINGS[1:3]:
            got = compiled(logits, weights, impl=impl, **keys, **setting)
            assert torch.equal(got.tokens, mixture_sample(logits, weights, impl=impl, **keys, **setting).tokens)


@needs_cpp
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_depends_on_nothing_but_itself(data):
    """Batch order, batch size and row stride leave each draw alone, and so does the number of threads."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, size = data.draw(st.integers(1, 9)), data.draw(st.sampled_from((7, 300, 9000)))
    setting = data.draw(st.sampled_from(SETTINGS))
    combine = data.draw(st.sampled_from(COMBINES))
    logits, weights, keys = inputs(generator, 2, rows, size)
    whole = mixture_sample(logits, weights, combine=combine, impl="cpp", top_logprobs=3, **keys, **setting)
    order = torch.tensor(data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))])
    some = {name: value[order] for name, value in keys.items()}
    padded = [torch.cat([x, torch.full((rows, 3), 99.0)], 1)[order, :size] for x in logits]
    threads = torch.get_num_threads()
    for number in (1, 2):
        torch.set_num_threads(number)
        part = mixture_sample(padded, weights, combine=combine, impl="cpp", top_logprobs=3, **some, **setting)
        for name, got, expected in zip(part._fields, part, whole, strict=True):
            assert torch.equal(got, expected[order] if name.startswith("top") else expected[..., order])
    torch.set_num_threads(threads)


class TestRowsOfTheirOwn:
    """Each row its own settings and weights."""

    @needs_cpp
    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize(("real", "whole"), [(torch.float32, torch.int32), (torch.float64, torch.int64)])
    def test_a_row_is_what_it_is_alone(self, generator, combine, real, whole):
        """Bit for bit, whatever the other rows are asked for, in any order and on any number of threads."""
        rows = ROWS if whole == torch.int64 else [row for row in ROWS if row.get("top_k", 0) < 2**31]
        settings = settings_of_rows(rows, real, whole)
        for size in SIZES:
            logits, _, keys = inputs(generator, 3, len(rows), size)
            weights = weights_of_rows(generator, len(rows), 3)
            threads = torch.get_num_threads()
            for number in (1, 2):
                torch.set_num_threads(number)
                whole_batch = mixture_sample(
                    logits, weights, combine=combine, impl="cpp", top_logprobs=min(4, size), **keys, **settings
                )
                for row in range(len(rows)):
                    z, w, rest = one_row(row, logits, weights, keys, settings)
                    alone = mixture_sample(z, w, combine=combine, impl="cpp", top_logprobs=min(4, size), **rest)
                    for name, ours, theirs in zip(alone._fields, whole_batch, alone, strict=True):
                        mine = ours[:, row : row + 1] if name == "expert_log_probs" else ours[row : row + 1]
                        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_draw_what_float64_draws(self, generator, impl, combine, dtype):
        settings = settings_of_rows(real=torch.float64)
        decided = 0
        for size in SIZES:
            logits, _, keys = inputs(generator, 3, len(ROWS), size, dtype)
            weights = weights_of_rows(generator, len(ROWS), 3)
            got = mixture_sample(logits, weights, combine=combine, impl=impl, **keys, **settings)
            assert bool(got.valid.all())
            for row in range(len(ROWS)):
                z, w, rest = one_row(row, [x.double() for x in logits], weights.double(), keys, settings)
                exact = mixture_sample(z, w, combine=combine, **rest)
                log_probs = mixture_log_probs(z, w, combine)
                token = int(got.tokens[row])
                if is_decided(log_probs, **rest).item():
                    decided += 1
                    assert token == exact.tokens.item(), (size, ROWS[row])
                # Plain torch sums in float32, and rounds a little more than the kernels.
                atol = 1e-5 if impl == "reference" else 2e-6
                assert float(got.log_probs[row]) == pytest.approx(float(log_probs[0, token]), rel=1e-6, abs=atol)
                each = torch.stack([x.log_softmax(-1)[0, token] for x in z]).masked_fill(w == 0, torch.nan)
                torch.testing.assert_close(
                    got.expert_log_probs[:, row].double(), each, atol=atol, rtol=1e-6, equal_nan=True
                )
        assert decided > 0.8 * len(SIZES) * len(ROWS) or combine == "vote"

    @pytest.mark.parametrize("impl", IMPLS)
    def test_numbers_beside_tensors_and_rows_that_lie_apart(self, generator, impl):
        logits, weights, keys = inputs(generator, 2, 4, 300)
        temperature = torch.tensor([[0.0, 9.0], [0.7, 9.0], [1.0, 9.0], [1.3, 9.0]])[:, 0]
        top_k = torch.tensor([3]).expand(4)
        mixed = mixture_sample(logits, weights, temperature=temperature, top_k=top_k, top_p=0.9, impl=impl, **keys)
        full = {"temperature": temperature, "top_k": top_k.int(), "top_p": torch.full((4,), 0.9).double()}
        assert torch.equal(mixed.tokens, mixture_sample(logits, weights, impl=impl, **full, **keys).tokens)
        for row in range(4):
            z, w, rest = one_row(row, logits, weights, keys, full)
            assert mixed.tokens[row] == mixture_sample(z, w, impl=impl, **rest).tokens.item()

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("combine", COMBINES)
    def test_an_expert_without_weight_in_a_row_is_not_read_there(self, generator, impl, combine):
        logits, _, keys = inputs(generator, 3, 3, 200)
        weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        for row, expert in zip(*torch.where(weights == 0), strict=True):
            logits[expert][row] = float("nan")
        for setting in SETTINGS:
            got = mixture_sample(logits, weights, combine=combine, impl=impl, top_logprobs=2, **keys, **setting)
            assert got.valid.tolist() == [True, True, False]
            assert got.expert_log_probs.isnan().T.tolist() == (weights == 0).tolist()
            assert got.tokens[2] == -1 and bool(got.log_probs[2].isnan())
            assert got.top_tokens[2].tolist() == [-1, -1] and bool(got.top_log_probs[2].isnan().all())
            want = mixture_sample(
                [logits[0][:1], logits[2][:1]], [1.0, 1.0], combine=combine, impl=impl,
                **{name: value[:1] for name, value in keys.items()}, **setting,
            )  # fmt: skip
            assert got.tokens[0] == want.tokens[0]

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"top_p": torch.tensor([1.0, 0.5, 0.9, 0.0])}, r"top_p must be in \(0, 1\].*got 0.* in row 3"),
            ({"top_p": torch.tensor([1.0, 1.5, 0.9, 0.0]).double()}, r"top_p must be .*got 1\.5 in row 1"),
            ({"temperature": torch.tensor([1.0, float("nan"), 0.9, 1.0])}, r"temperature must be .*got nan in row 1"),
            ({"temperature": torch.tensor([1.0, 1.0, -0.5, 1.0])}, r"temperature must be .*got -0\.5 in row 2"),
            ({"temperature": torch.tensor([float("inf"), 1.0, 1, 1])}, r"temperature must be .*got inf in row 0"),
            ({"top_k": torch.tensor([0, 1, -3, 4])}, r"top_k must be .*got -3 in row 2"),
            ({"min_p": torch.tensor([0.0, 0.1, 0.2, 1.25])}, r"min_p must be .*got 1\.25 in row 3"),
            ({"min_p": torch.tensor([0.0, float("nan"), 0.2, 1.0])}, r"min_p must be .*got nan in row 1"),
            ({"weights": torch.tensor([[1.0, 1.0]] * 3 + [[1.0, -0.5]])}, r"weights must be .*got -0\.5 in row 3"),
            ({"weights": torch.tensor([[1.0, float("inf")]] + [[1.0, 0.5]] * 3)}, r"weights .*got inf in row 0"),
        ],
    )
    def test_bad_values_are_named_with_their_row(self, impl, change, words):
        keys = {"seeds": torch.zeros(4, dtype=torch.int64), "positions": torch.zeros(4, dtype=torch.int64)}
        with pytest.raises(ValueError, match=words):
            mixture_sample(torch.zeros(2, 4, 5), **{"weights": [1.0, 1.0]} | change, impl=impl, **keys)

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"temperature": torch.ones(3)}, ValueError, r"temperature must be .* shape \(2,\), got \(3,\)"),
            ({"top_p": torch.tensor(0.9)}, ValueError, r"top_p must be .* shape \(2,\), got \(\)"),
            (
                {"top_p": torch.ones(2).half()},
                TypeError,
                "top_p must be a number, or of torch.float32 or torch.float64",
            ),
            ({"min_p": torch.zeros(2, dtype=torch.int64)}, TypeError, "min_p must be a number, or of torch.float32"),
            ({"top_k": torch.zeros(2)}, TypeError, "top_k must be an int, or of torch.int32 or torch.int64"),
            ({"top_k": torch.zeros(2, dtype=torch.bool)}, TypeError, "top_k must be an int.*torch.bool"),
            ({"top_k": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "top_k is on meta"),
            ({"weights": torch.ones(3, 2)}, ValueError, r"weights must have shape \(2,\).*or \(2, 2\)"),
        ],
    )
    def test_bad_tensors_are_named(self, impl, change, error, words):
        keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
        with pytest.raises(error, match=words):
            mixture_sample(torch.zeros(2, 2, 5), **{"weights": [1.0, 1.0]} | change, impl=impl, **keys)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_compiles_whole(self, impl, generator, fresh_compiler):
        logits, _, keys = inputs(generator, 2, len(ROWS), 33)
        settings, weights = settings_of_rows(), weights_of_rows(generator, len(ROWS), 2)
        compiled = torch.compile(mixture_sample, fullgraph=True, backend="aot_eager")
        got = compiled(logits, weights, impl=impl, top_logprobs=3, **keys, **settings)
        want = mixture_sample(logits, weights, impl=impl, top_logprobs=3, **keys, **settings)
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.top_tokens, want.top_tokens)


class TestTopLogprobs:
    @needs_cpp
    @pytest.mark.parametrize("combine", COMBINES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_they_are_the_likeliest_before_temperature_and_filters(self, generator, dtype, combine):
        for size in SIZES:
            logits, weights, keys = inputs(generator, 3, 3, size, dtype)
            exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
            for count in {1, min(5, size), min(64, size)}:
                for setting in ({"temperature": 0.0}, {"temperature": 1.7}, {"top_k": 2, "top_p": 0.5}):
                    got = mixture_sample(
                        logits, weights, combine=combine, impl="cpp", top_logprobs=count, **keys, **setting
                    )
                    assert_likeliest(got.top_tokens, got.top_log_probs, exact, count)
                    if setting == {"temperature": 0.0}:
                        assert torch.equal(got.top_tokens[:, 0], got.tokens)
                        assert torch.equal(got.top_log_probs[:, 0], got.log_probs)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_equals_stand_in_the_order_of_their_ids(self, impl):
        logits = torch.zeros(1, 2, 300)
        logits[0, 0, [299, 7, 130]] = 4.0
        keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
        got = mixture_sample(logits, [1.0], top_logprobs=5, impl=impl, **keys)
        assert got.top_tokens.tolist() == [[7, 130, 299, 0, 1], [0, 1, 2, 3, 4]]

    @pytest.mark.parametrize("impl", IMPLS)
    def test_where_fewer_are_possible(self, impl, generator):
        logits = torch.full((2, 2, 90), -torch.inf)
        logits[..., 33], logits[..., 5] = 1.0, 2.0
        logits[0, 1, 0] = float("nan")
        keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
        for combine in COMBINES:
            got = mixture_sample(logits, [0.5, 0.5], combine=combine, top_logprobs=4, impl=impl, **keys)
            possible = [5] if combine == "vote" else [5, 33]
            assert got.top_tokens.tolist() == [possible + [-1] * (4 - len(possible)), [-1] * 4]
            assert (got.top_log_probs[0] == -torch.inf).tolist() == [i >= len(possible) for i in range(4)]
            assert bool(got.top_log_probs[1].isnan().all())

    @pytest.mark.parametrize("impl", IMPLS)
    def test_none_are_asked_for(self, impl, generator):
        logits, weights, keys = inputs(generator, 2, 3, 20)
        got = mixture_sample(logits, weights, impl=impl, **keys)
        assert got.top_tokens.shape == got.top_log_probs.shape == (3, 0)
        assert got.top_tokens.dtype == torch.int64 and got.top_log_probs.dtype == torch.float32

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        ("count", "size", "error", "words"),
        [
            (-1, 100, ValueError, r"top_logprobs=-1 must be between 0 \(off\) and 64"),
            (65, 100, ValueError, r"top_logprobs=65 must be between 0 \(off\) and 64"),
            (6, 5, ValueError, r"top_logprobs=6 .* and 5, the size of the vocabulary"),
            (2.0, 5, TypeError, "top_logprobs must be an int, got float"),
            (True, 5, TypeError, "top_logprobs must be an int, got bool"),
        ],
    )
    def test_bad_counts(self, impl, count, size, error, words):
        keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
        with pytest.raises(error, match=words):
            mixture_sample(torch.zeros(1, 2, size), [1.0], top_logprobs=count, impl=impl, **keys)


SCRIPT = """
import torch
from ensemw2s.ops import draw_seeds, mixture_sample
generator = torch.Generator().manual_seed(11)
settings = ({"temperature": 0.0}, {}, {"top_p": 0.9, "temperature": 1.5}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02})
for combine in ("prob", "logprob", "vote"):
    for size in (33, 9001):
        logits = 3 * torch.randn(3, 8, size, generator=generator)
        keys = {"seeds": draw_seeds(8, generator=generator), "positions": torch.arange(8)}
        for setting in settings:
            tokens = mixture_sample(logits, [0.5, 0.2, 0.3], combine=combine, impl="cpp", **keys, **setting).tokens
            print(*tokens.tolist())
"""


@needs_cpp
def test_draws_do_not_depend_on_the_instruction_set():
    outputs = set()
    for capability in ("default", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1


@needs_cpp
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[-1]])
def test_opcheck(generator, setting):
    logits, weights, keys = inputs(generator, 2, 3, 20)
    values = (OFF | setting).values()
    for rows, own, count in (((None,) * 4, weights, 0), (settings_of_rows(ROWS[:3]).values(), weights.expand(3, 2), 4)):
        arguments = (logits, own, *values, *rows, keys["seeds"], keys["positions"], 0, count, *(None,) * 4)
        torch.library.opcheck(torch.ops.ensemw2s.mixture_sample, arguments)
