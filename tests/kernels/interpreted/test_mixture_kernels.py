from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from ensemw2s.kernels import mixture_sample as kernel
from ensemw2s.kernels.mixture import rows_of
from ensemw2s.kernels.mixture_sample import gumbel, philox_words, philox_words_in_a_row
from ensemw2s.kernels.token_scores import token_scores as token_scores_kernel
from ensemw2s.ops import draw_seeds, mixture_log_probs, mixture_sample, mixture_scores, mixture_verify, token_scores
from ensemw2s.ops.checks import COMBINES
from ensemw2s.ops.mixture_sample import filtered_scores
from ensemw2s.ops.randomness import gumbel_noise, philox
from tests.ops.helpers import DTYPES, assert_as_good_as_torch, needs_cpp
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
from tests.ops.test_scores import labels_for
from tests.ops.test_token_adjustments import check_extremes, check_rows_without_a_token, offered, offers, part

# 1: one token; 33: below a group; 257: two groups and one token; 4099: two tiles and three tokens.
SIZES = (1, 33, 257, 4099)
EXPERTS = (1, 2, 5)
NAN = float("nan")


def sample(logits, weights, impl="triton", **settings):
    return mixture_sample(logits, weights, impl=impl, **settings)


def zero_keys(rows):
    return {"seeds": torch.zeros(rows, dtype=torch.int64), "positions": torch.zeros(rows, dtype=torch.int64)}


@triton.jit
def noise_kernel(seeds, positions, tokens, words, noise, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = philox_words(tl.load(seeds + tl.program_id(0)), tl.load(positions + tl.program_id(0)), tl.load(tokens + at))
    tl.store(words + at, word.to(tl.int64))
    tl.store(noise + at, gumbel(word))


@triton.jit
def row_of_words_kernel(seeds, positions, words, START: tl.constexpr, SIZE: tl.constexpr):
    word = philox_words_in_a_row(tl.load(seeds), tl.load(positions), START, SIZE)
    tl.store(words + tl.arange(0, SIZE), word.to(tl.int64))


@triton.jit
def gumbel_kernel(words, noise, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(noise + at, gumbel(tl.load(words + at).to(tl.uint32)))


class TestNoise:
    def test_words_and_noise_are_those_of_every_backend(self, generator):
        seeds = torch.randint(-(2**63), 2**63 - 1, (24,), generator=generator)
        seeds[:4] = torch.tensor([0, -1, -(2**63), 2**32])
        positions = torch.randint(0, 2**40, (24,), generator=generator)
        tokens = torch.randint(0, 2**31 - 1, (24, 64), generator=generator)
        words, noise = torch.empty((24, 64), dtype=torch.int64), torch.empty(24, 64)
        noise_kernel[(24,)](seeds, positions, tokens.int(), words, noise, SIZE=64)
        assert torch.equal(words, philox(seeds[:, None], positions[:, None], tokens))
        exact = gumbel_noise(seeds[:, None], positions[:, None], tokens)
        torch.testing.assert_close(noise.double(), exact, atol=2e-6, rtol=0)

    def test_words_in_a_row_are_those_of_single_tokens(self, generator):
        seeds, positions = draw_seeds(1, generator=generator), torch.tensor([7])
        words = torch.empty(64, dtype=torch.int64)
        row_of_words_kernel[(1,)](seeds, positions, words, START=1024, SIZE=64)
        assert torch.equal(words, philox(seeds, positions, torch.arange(1024, 1088)))

    def test_noise_is_precise_at_both_ends(self):
        near = [2**e + d for e in range(33) for d in (-1, 0, 1)]
        words = torch.tensor(sorted({w % 2**32 for near_word in near for w in (near_word, -near_word)}))
        words = torch.cat([words, words[:1].expand(256 - len(words))])
        noise = torch.empty(256)
        gumbel_kernel[(1,)](words, noise, SIZE=256)
        exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
        torch.testing.assert_close(noise.double(), exact, atol=4e-6, rtol=0)


class TestRows:
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x,
            lambda x: x[:, :-1],  # what scoring the next token needs
            lambda x: x.transpose(0, 1),
            lambda x: x[:1].expand(4, 5, 3, 7),
            lambda x: x[:, :, :2],
            lambda x: x.permute(2, 1, 0, 3),
            lambda x: x[0, 0, 0],
        ],
    )
    def test_rows_are_where_the_strides_say(self, view):
        x = torch.arange(4 * 5 * 3 * 7, dtype=torch.float32).view(4, 5, 3, 7)
        rows = rows_of([view(x), view(x + 0.5)])
        for t, expected in enumerate((view(x), view(x + 0.5))):
            tensor = rows.tensors[t]
            memory = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // 4,), (1,), 0)
            starts = [
                tensor.storage_offset() + i // rows.inner * rows.outer[t] + i % rows.inner * rows.step[t]
                for i in range(rows.count)
            ]
            got = torch.stack([memory[start : start + 7] for start in starts])
            assert torch.equal(got, expected.reshape(-1, 7))

    def test_logits_without_their_last_position_are_not_copied(self):
        x = torch.zeros(4, 5, 7)[:, :-1]
        assert rows_of([x]).tensors[0] is x


@pytest.mark.parametrize("combine", COMBINES)
def test_log_probs_are_as_good_as_plain_torch(generator, combine):
    dtypes = itertools.cycle(DTYPES)
    for size in SIZES:
        for experts, dtype in zip(EXPERTS, dtypes, strict=False):
            logits, weights, _ = inputs(generator, experts, 2, size, dtype)
            exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
            plain = mixture_log_probs([x.float() for x in logits], weights, combine, impl="reference")
            kernel = mixture_log_probs(logits, weights, combine, impl="triton")
            assert kernel.dtype == torch.float32
            assert_as_good_as_torch(kernel, plain, exact, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("size", "experts"), [(1, 2), (33, 5), (257, 1), (4099, 2)])
def test_draws_are_those_of_float64(generator, size, experts, combine):
    decided = 0
    # The interpreter is slow: sizes share the settings, and settings the dtypes.
    chosen = SETTINGS[SIZES.index(size) % 2 :: 2]
    for number, setting in enumerate(chosen):
        logits, weights, keys = inputs(generator, experts, 2, size, DTYPES[number % 3])
        double = [x.double() for x in logits]
        log_probs = mixture_log_probs(double, weights.double(), combine)
        got = sample(logits, weights, combine=combine, **keys, **setting)
        exact = mixture_sample(double, weights.double(), combine=combine, **keys, **setting)
        rows = is_decided(log_probs, **keys, **setting)
        decided += int(rows.sum())
        assert bool(got.valid.all())
        assert torch.equal(got.tokens[rows], exact.tokens[rows]), setting
        picked = log_probs.gather(-1, got.tokens[:, None])[:, 0]
        torch.testing.assert_close(got.log_probs.double(), picked, atol=2e-6, rtol=1e-6)
        each = torch.stack([x.log_softmax(-1).gather(-1, got.tokens[:, None])[:, 0] for x in double])
        torch.testing.assert_close(got.expert_log_probs.double(), each, atol=2e-6, rtol=1e-6)
    assert decided >= len(chosen) or combine == "vote"


@needs_cpp
@pytest.mark.parametrize(
    "setting", [pytest.param(s, marks=pytest.mark.slow if i % 3 else ()) for i, s in enumerate(SETTINGS)]
)
def test_draws_are_those_of_the_cpu_kernel(generator, setting):
    logits, weights, keys = inputs(generator, 3, 4, 5000, torch.bfloat16)
    log_probs = mixture_log_probs([x.double() for x in logits], weights.double())
    rows = is_decided(log_probs, **keys, **setting)
    got, cpp = (sample(logits, weights, impl, **keys, **setting).tokens for impl in ("triton", "cpp"))
    assert torch.equal(got[rows], cpp[rows])


def peaked(generator, rows, size):
    """Logits with a few likely tokens in the whole vocabulary, as language models give them."""
    logits = torch.randn(rows, size, generator=generator) * 2
    likely = torch.randint(0, size, (rows, 12), generator=generator)
    return logits.scatter_add(1, likely, torch.rand(rows, 12, generator=generator) * 6 + 8)


@pytest.mark.parametrize(
    "top_p", [pytest.param(0.3, marks=pytest.mark.slow), 0.9, pytest.param(0.999, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("temperature", "combine"), [(0.3, "logprob"), (1.0, "prob"), (1.0, "logprob"), (1.7, "prob")])
def test_the_nucleus_is_found_among_few_candidates(generator, temperature, top_p, combine):
    """Where the candidates are cut down before top-p, the draw is still that of the whole vocabulary."""
    first = peaked(generator, 3, 4500)
    logits = [first, first + torch.randn(3, 4500, generator=generator)]
    setting = {"temperature": temperature, "top_p": top_p}
    keys = {"seeds": draw_seeds(3, generator=generator), "positions": torch.arange(3)}
    double = [x.double() for x in logits]
    log_probs = mixture_log_probs(double, [0.6, 0.4], combine)
    got = sample(logits, [0.6, 0.4], combine=combine, **keys, **setting).tokens
    exact = mixture_sample(double, [0.6, 0.4], combine=combine, **keys, **setting).tokens
    # Row by row: one row at the filter's edge must not excuse the others.
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in keys.items()}
        if is_decided(log_probs[row : row + 1], **own, **setting):
            assert got[row] == exact[row]
    kept = filtered_scores(log_probs, temperature, 0, top_p + 1e-5, 0.0)
    assert bool(kept.gather(1, got[:, None]).isfinite().all())


@pytest.mark.parametrize("combine", ["prob", "logprob"])
@pytest.mark.parametrize("temperature", [0.8, pytest.param(1.0, marks=pytest.mark.slow), 1.25])
def test_the_tail_counts_in_the_nucleus(temperature, combine):
    """A third of the mass lies in the tail; without it the nucleus would hold one token instead of two."""
    probs = torch.full((4500,), 0.33 / 4497, dtype=torch.double)
    probs[[4400, 7, 2100]] = torch.tensor([0.4, 0.15, 0.12], dtype=torch.double)
    logits = (probs.log() * temperature).float().expand(2, 4, -1)
    keys = {"seeds": torch.arange(1003, 1007), "positions": torch.zeros(4, dtype=torch.int64)}
    setting = {"temperature": temperature, "top_p": 0.5}
    tokens = sample(logits, [0.5, 0.5], combine=combine, **keys, **setting).tokens
    exact = mixture_sample(logits.double(), [0.5, 0.5], combine=combine, **keys, **setting).tokens
    assert set(exact.tolist()) == {4400, 7}
    assert torch.equal(tokens, exact)


@pytest.mark.parametrize(
    ("combine", "setting"),
    [("prob", {"top_p": 0.9, "temperature": 1.3}), ("logprob", {"top_k": 3, "top_p": 0.8}), ("vote", {"top_k": 2})],
)
def test_candidates_take_bounded_memory_and_rows_come_in_portions(monkeypatch, generator, combine, setting):
    logits, weights, keys = inputs(generator, 3, 5, 300)
    given = {"combine": combine, "top_logprobs": 2, **keys, **setting}
    whole = sample(logits, weights, **given)
    made, empty = [], kernel._Draw._empty

    def recorded(self, *shape, **dtype):
        made.append(shape)
        return empty(self, *shape, **dtype)

    monkeypatch.setattr(kernel._Draw, "_empty", recorded)
    monkeypatch.setattr(kernel, "MOST_CANDIDATES", 2 * 300 + 5)
    in_portions = sample(logits, weights, **given)
    for name, got, expected in zip(whole._fields, in_portions, whole, strict=True):
        assert torch.equal(got, expected), name
    assert (combine == "vote") == ((2, 300) not in made)
    assert all(len(shape) < 2 or shape[0] * shape[1] <= 2 * 300 for shape in made)


# The quick tests hold that the noise is Philox's and that draws are those of float64, hence this.
@pytest.mark.slow
def test_draws_follow_the_distribution(generator):
    logits, weights, _ = inputs(generator, 2, 1, 8, scale=0.5)
    draws = 150
    keys = {"seeds": draw_seeds(draws, generator=generator), "positions": torch.arange(draws) // 7}
    tokens = sample([x.expand(draws, -1) for x in logits], weights, **keys).tokens
    expected = mixture_log_probs([x.double() for x in logits], weights.double()).exp()[0] * draws
    assert stats.chisquare(torch.bincount(tokens, minlength=8).numpy(), expected.numpy()).pvalue > 1e-6


# The interpreter is slow: the ways to combine take turns.
@pytest.mark.parametrize(("combine", "setting"), zip(itertools.cycle(COMBINES), SETTINGS))
def test_a_row_depends_on_nothing_but_itself(generator, combine, setting):
    logits, weights, keys = inputs(generator, 2, 4, 2500)
    whole = sample(logits, weights, combine=combine, top_logprobs=2, **keys, **setting)
    order = torch.randperm(4, generator=generator)[:2]
    padded = [torch.cat([x, torch.full((4, 3), 99.0)], 1)[order, :2500] for x in logits]
    some = {name: value[order] for name, value in keys.items()}
    part = sample(padded, weights, combine=combine, top_logprobs=2, **some, **setting)
    for name, got, expected in zip(part._fields, part, whole, strict=True):
        assert torch.equal(got, expected[order] if name.startswith("top") else expected[..., order])


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("size", [33, pytest.param(4099, marks=pytest.mark.slow)])
def test_rows_of_their_own_offers(generator, combine, size):
    """In one launch rows of all settings, which the interpreter would take minutes for one after the other."""
    logits, _, keys = inputs(generator, 2, len(ROWS), size, torch.bfloat16)
    weights, of_rows = weights_of_rows(generator, len(ROWS), 2), settings_of_rows(real=torch.float64)
    decided = 0
    for offer in offers(generator, len(ROWS), size):
        batch = sample(logits, weights, combine=combine, top_logprobs=2, **keys, **of_rows, **offer)
        for row in range(len(ROWS)):
            z, w, rest = one_row(row, [x.double() for x in logits], weights.double(), keys, of_rows)
            own = part(offer, slice(row, row + 1))
            exact = mixture_sample(z, w, combine=combine, top_logprobs=2, **rest, **own)
            assert bool(batch.valid[row]) == exact.valid.item(), (size, ROWS[row], offer)
            if not exact.valid.item():
                continue
            log_probs = mixture_log_probs(z, w, combine)
            if is_decided(offered(log_probs, **own), **rest).item():
                decided += 1
                assert batch.tokens[row] == exact.tokens.item(), (size, ROWS[row], offer)
            picked = log_probs[0, int(batch.tokens[row])]
            assert float(batch.log_probs[row]) == pytest.approx(float(picked), rel=1e-6, abs=2e-6)
            assert_likeliest(batch.top_tokens[row, None], batch.top_log_probs[row, None], log_probs, 2)
    assert decided > 30 or combine == "vote"


@pytest.mark.parametrize("setting", SETTINGS)
def test_offers_in_every_mode(generator, setting):
    logits, weights, keys = inputs(generator, 2, 2, 300)
    for offer in offers(generator, 2, 300)[3:]:
        got = sample(logits, weights, **keys, **setting, **offer)
        double, shares = [x.double() for x in logits], weights.double()
        exact = mixture_sample(double, shares, **keys, **setting, **offer)
        rows = is_decided(offered(mixture_log_probs(double, shares), **offer), **keys, **setting)
        assert bool(got.valid.all()) and torch.equal(got.tokens[rows], exact.tokens[rows])


def test_drafts_are_verified_on_logits_of_a_longer_text(generator):
    text = [torch.randn(2, 7, 300, generator=generator) for _ in range(2)]
    weights, keys = torch.rand(2, 2, generator=generator) + 0.1, {"seeds": draw_seeds(2), "positions": torch.arange(2)}
    asked = {"temperature": torch.tensor([0.0, 0.8]), "top_p": 0.9} | keys
    drafted = torch.full((2, 2), -1)
    for i in range(3):
        got = mixture_verify([x[:, 4:] for x in text], weights, drafted, impl="triton", **asked)
        want = mixture_verify([x[:, 4:] for x in text], weights, drafted, impl="reference", **asked)
        assert got.accepted.tolist() == [i, i] and torch.equal(got.tokens, want.tokens)
        drafted[:, i : i + 1] = got.tokens[:, i : i + 1]


def test_offers_at_their_edges():
    check_rows_without_a_token(sample, SETTINGS[:3])
    check_extremes(sample, [SETTINGS[1], SETTINGS[-1]])


class TestSampleEdges:
    def test_greedy_takes_the_lowest_of_equals(self):
        logits = torch.zeros(2, 3, 4200)
        logits[:, 0, [4150, 130, 131]] = 4.0
        logits[:, 1, [2, 1]] = 4.0
        for combine in COMBINES:
            got = sample(logits, [0.4, 0.6], temperature=0.0, combine=combine, **zero_keys(3))
            assert got.tokens.tolist() == [130, 1, 0]

    def test_top_k_keeps_ties_and_top_p_admits_lowest_ids_first(self):
        logits = torch.zeros(1, 8, 100)
        logits[..., [90, 10, 50, 30]] = 5.0
        keys = {"seeds": torch.arange(8), "positions": torch.zeros(8, dtype=torch.int64)}
        p = float(logits[0, 0].softmax(-1)[10])
        for setting, kept in (
            ({"top_k": 2}, {10, 30, 50, 90}),
            ({"top_p": 1.5 * p}, {10, 30}),
            ({"top_p": 0.5 * p}, {10}),
        ):
            tokens = sample(logits, [1.0], **keys, **setting).tokens
            assert set(tokens.tolist()) <= kept
            assert torch.equal(tokens, mixture_sample(logits.double(), [1.0], **keys, **setting).tokens)

    def test_ties_at_the_edge_of_top_p_span_chunks(self):
        keys = {"seeds": torch.arange(5), "positions": torch.zeros(5, dtype=torch.int64)}
        logits, top_p = torch.zeros(1, 5, 3000), 1500.5 / 3000
        got = sample(logits, [1.0], top_p=top_p, **keys).tokens
        assert torch.equal(got, mixture_sample(logits.double(), [1.0], top_p=top_p, **keys).tokens)

    @pytest.mark.parametrize("combine", COMBINES)
    def test_broken_rows_are_reported_and_alone(self, combine, generator):
        logits, weights, keys = inputs(generator, 2, 4, 300)
        logits[0][1, 299] = NAN
        logits[1][2] = -torch.inf
        logits[1][3, 0] = torch.inf
        for setting in SETTINGS[::2]:
            got = sample(logits, weights, combine=combine, **keys, **setting)
            assert got.valid.tolist() == [True, False, False, False]
            assert got.tokens[1:].tolist() == [-1, -1, -1]
            assert bool(got.log_probs[1:].isnan().all()) and bool(got.expert_log_probs[:, 1:].isnan().all())
            alone = {name: value[:1] for name, value in keys.items()}
            assert got.tokens[0] == sample([x[:1] for x in logits], weights, combine=combine, **alone, **setting).tokens

    def test_expert_of_weight_zero_has_no_say(self, generator):
        logits, _, keys = inputs(generator, 3, 2, 200)
        logits[1][:] = NAN
        for combine in COMBINES:
            for setting in SETTINGS[:4]:
                got = sample(logits, [0.5, 0.0, 0.5], combine=combine, **keys, **setting)
                want = sample([logits[0], logits[2]], [0.5, 0.5], combine=combine, **keys, **setting)
                assert torch.equal(got.tokens, want.tokens) and bool(got.valid.all())
                assert bool(got.expert_log_probs[1].isnan().all())

    def test_masked_tokens_are_never_drawn(self, generator):
        logits, weights, keys = inputs(generator, 2, 3, 150)
        for expert in logits:
            expert[:, 3:] = -torch.inf
        settings = (*SETTINGS, {"top_k": 140, "temperature": 100.0})
        for combine, setting in itertools.product(COMBINES, settings[1::2]):
            got = sample(logits, weights, combine=combine, **keys, **setting)
            assert bool(got.valid.all()) and bool((got.tokens < 3).all()), (combine, setting)

    def test_experts_without_a_common_token(self):
        logits = torch.full((2, 1, 20), -torch.inf)
        logits[0, 0, 3] = logits[1, 0, 4] = 0.0
        for setting in SETTINGS:
            assert not sample(logits, [0.5, 0.5], combine="logprob", **zero_keys(1), **setting).valid.item()
            assert sample(logits, [0.5, 0.5], **zero_keys(1), **setting).valid.item()

    def test_extremes(self):
        keys = {"seeds": torch.arange(3), "positions": torch.zeros(3, dtype=torch.int64)}
        logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, -3e38, 0.0]])[None]
        for setting in (*SETTINGS, {"temperature": 1e-9}, {"temperature": 1e-45, "top_p": 0.5}):
            got = sample(logits, [3.0], **keys, **setting)
            assert bool(got.valid.all()) and got.tokens[0] == 0 and got.tokens[2] == 0, setting
        assert bool(sample(logits, [3.0], temperature=1e6, **keys).valid.all())

    def test_no_rows(self):
        empty = torch.zeros(0, dtype=torch.int64)
        got = sample(torch.zeros(3, 0, 9), [1.0, 1.0, 1.0], seeds=empty, positions=empty)
        assert got.tokens.shape == (0,) and got.expert_log_probs.shape == (3, 0)

    # The interpreter is slow: the dtypes, and the rows, take turns.
    @pytest.mark.parametrize(("combine", "wide"), [("prob", False), ("logprob", True), ("vote", False)])
    def test_rows_of_their_own_are_what_they_are_alone(self, combine, wide, generator):
        rows = [row for row in ROWS if wide or row.get("top_k", 0) < 2**31][wide::2]
        settings = settings_of_rows(rows, *((torch.float64, torch.int64) if wide else (torch.float32, torch.int32)))
        logits, _, keys = inputs(generator, 3, len(rows), 2500)
        weights = weights_of_rows(generator, len(rows), 3)
        together = sample(logits, weights, combine=combine, top_logprobs=2, **keys, **settings)
        assert bool(together.valid.all())
        for row in range(len(rows)):
            z, w, rest = one_row(row, logits, weights, keys, settings)
            alone = sample(z, w, combine=combine, top_logprobs=2, **rest)
            for name, ours, theirs in zip(alone._fields, together, alone, strict=True):
                mine = ours[:, row : row + 1] if name == "expert_log_probs" else ours[row : row + 1]
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
            exact = mixture_sample([x.double() for x in z], w.double(), combine=combine, **rest)
            if is_decided(mixture_log_probs([x.double() for x in z], w.double(), combine), **rest).item():
                assert torch.equal(alone.tokens, exact.tokens), rows[row]

    @pytest.mark.parametrize("combine", COMBINES)
    def test_an_expert_without_weight_in_a_row_is_not_read_there(self, combine, generator):
        logits, _, keys = inputs(generator, 3, 3, 200)
        weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        labels = torch.tensor([3, 4, 5])
        clean = (
            mixture_log_probs(logits, weights, combine, impl="triton"),
            *mixture_scores(logits, weights, labels, combine, impl="triton"),
        )
        for row, expert in zip(*torch.where(weights == 0), strict=True):
            logits[expert][row] = NAN
        again = (
            mixture_log_probs(logits, weights, combine, impl="triton"),
            *mixture_scores(logits, weights, labels, combine, impl="triton"),
        )
        for ours, theirs in zip(again, clean, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            assert ours.dtype == torch.bool or bool(ours[2].isnan().all())
        exact = mixture_log_probs(logits, weights, combine, impl="reference")
        torch.testing.assert_close(again[0], exact, equal_nan=True, atol=2e-6, rtol=1e-6)
        for setting in SETTINGS[::4]:
            got = sample(logits, weights, combine=combine, top_logprobs=2, **keys, **setting)
            assert got.valid.tolist() == [True, True, False]
            assert got.expert_log_probs.isnan().T.tolist() == (weights == 0).tolist()
            assert got.tokens[2] == -1 and got.top_tokens[2].tolist() == [-1, -1]

    @pytest.mark.parametrize("combine", COMBINES)
    def test_rows_with_bad_values_are_not_valid_and_alone(self, combine, generator):
        bad = {
            "temperature": torch.tensor([0.8, NAN, -1.0, float("inf")]),
            "top_k": torch.tensor([5, -1, -(2**60), 3]),
            "top_p": torch.tensor([0.9, 0.0, 1.5, NAN], dtype=torch.float64),
            "min_p": torch.tensor([0.1, -0.1, 1.5, NAN]),
        }
        logits, weights, keys = inputs(generator, 2, 4, 300)
        for name, values in bad.items():
            got = sample(logits, weights, combine=combine, top_logprobs=2, **keys, **{name: values})
            assert got.valid.tolist() == [True, False, False, name == "top_k"], name
            assert ((got.tokens == -1) == ~got.valid).all() and bool(got.log_probs[~got.valid].isnan().all())
            assert bool((got.top_tokens[~got.valid] == -1).all()) and bool(got.top_log_probs[~got.valid].isnan().all())
        of_rows = weights.repeat(4, 1)
        of_rows[1, 1], of_rows[2, 0], of_rows[3, 1] = -0.5, NAN, float("inf")
        assert sample(logits, of_rows, combine=combine, **keys).valid.tolist() == [True, False, False, False]

    @pytest.mark.parametrize("combine", COMBINES)
    def test_the_likeliest_tokens(self, combine, generator):
        for size, setting in ((1, {}), (257, {"temperature": 0.0}), (4099, {"top_p": 0.5}), (2500, {"min_p": 0.1})):
            logits, weights, keys = inputs(generator, 2, 2, size)
            exact = mixture_log_probs([x.double() for x in logits], weights.double(), combine)
            count = min(size, 5)
            got = sample(logits, weights, combine=combine, top_logprobs=count, **keys, **setting)
            assert_likeliest(got.top_tokens, got.top_log_probs, exact, count)
            assert torch.equal(got.tokens, sample(logits, weights, combine=combine, **keys, **setting).tokens)
        tied = torch.zeros(1, 1, 700)
        tied[..., [699, 7]] = 3.0
        assert sample(tied, [1.0], top_logprobs=4, **zero_keys(1)).top_tokens.tolist() == [[7, 699, 0, 1]]

    @pytest.mark.parametrize("weights", [[-1.0, 2.0], [NAN, 1.0], [0.0, 0.0], [float("inf"), 1.0]])
    def test_weights_that_cannot_be_checked_make_rows_invalid(self, weights, generator):
        """As on a GPU, where nothing looks into a tensor before the kernel runs."""
        logits, _, keys = inputs(generator, 2, 2, 40)
        weights = torch.tensor(weights)
        for combine in COMBINES:
            for setting in SETTINGS[::2]:
                got = sample(logits, weights, combine=combine, **keys, **setting)
                assert not bool(got.valid.any()) and got.tokens.tolist() == [-1, -1]
            assert bool(mixture_log_probs(logits, weights, combine, impl="triton").isnan().all())
            scores = mixture_scores(logits, weights, torch.tensor([1, 2]), combine, impl="triton")
            assert bool(scores.log_probs.isnan().all()) and not bool(scores.correct.any())


@pytest.mark.parametrize("combine", COMBINES)
class TestLogProbsEdges:
    def test_extreme_logits(self, combine):
        logits = torch.tensor([[[1e4, -1e4, 0.0, 9999.0]], [[-1e4, 1e4, 5.0, 1e4]]])
        weights = torch.tensor([0.25, 0.75])
        exact = mixture_log_probs(logits.double(), weights.double(), combine)
        got = mixture_log_probs(logits, weights, combine, impl="triton")
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)

    def test_equal_logits_are_uniform(self, combine):
        got = mixture_log_probs(torch.full((2, 1, 100), 7.0), [1.0, 1.0], combine, impl="triton")
        expected = torch.full((1, 100), -torch.inf) if combine == "vote" else torch.full((1, 100), 0.01).log()
        if combine == "vote":
            expected[0, 0] = 0.0
        torch.testing.assert_close(got, expected)

    def test_masked_tokens_are_impossible(self, combine, generator):
        logits, weights, _ = inputs(generator, 2, 2, 2500)
        for expert in logits:
            expert[:, 5:2100] = -torch.inf
        got = mixture_log_probs(logits, weights, combine, impl="triton")
        assert bool((got[:, 5:2100] == -torch.inf).all())
        torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))

    @pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
    def test_broken_rows_are_nan_and_alone(self, combine, broken, generator):
        logits, weights, _ = inputs(generator, 3, 3, 300)
        logits[1][1, slice(None) if broken == -float("inf") else 299] = broken
        got = mixture_log_probs(logits, weights, combine, impl="triton")
        assert bool(got[1].isnan().all())
        torch.testing.assert_close(got[[0, 2]].exp().sum(-1), torch.ones(2))

    def test_leading_shapes(self, combine, generator):
        weights = torch.tensor([0.3, 0.7])
        stacked = torch.randn(2, 3, 4, 9, generator=generator)
        expected = mixture_log_probs(stacked, weights, combine, impl="reference")
        strided = torch.empty(4, 2, 3, 12)[..., :9].permute(1, 2, 0, 3).copy_(stacked)
        expanded = stacked[:, :1, :1].expand(2, 3, 4, 9)
        for given, wanted in (
            (strided, expected),
            (expanded, expected[:1, :1].expand(3, 4, 9)),
            (stacked[:, 0, 0], expected[0, 0]),
            (stacked[:, :0], expected[:0]),
        ):
            torch.testing.assert_close(mixture_log_probs(given, weights, combine, impl="triton"), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_scores_are_as_good_as_plain_torch(generator, dtype):
    for size in SIZES:
        logits = (torch.randn(6, size, generator=generator) * 3).to(dtype)
        labels = labels_for(generator, logits, 6)
        exact = token_scores(logits.double(), labels)
        plain = token_scores(logits, labels, impl="reference")
        kernel = token_scores(logits, labels, impl="triton")
        assert_as_good_as_torch(kernel.log_probs, plain.log_probs, exact.log_probs, atol=1e-6)
        assert_as_good_as_torch(kernel.entropy, plain.entropy, exact.entropy, atol=4e-6)
        assert torch.equal(kernel.correct, exact.correct)


@pytest.mark.parametrize("combine", COMBINES)
def test_mixture_scores_are_as_good_as_plain_torch(generator, combine):
    # The interpreter is slow: the dtypes take turns.
    dtypes = itertools.cycle(DTYPES)
    for size in SIZES:
        for experts, dtype in zip((1, 3, 2), dtypes, strict=False):
            logits, weights, _ = inputs(generator, experts, 6, size, dtype)
            labels = labels_for(generator, logits[0], 6)
            double = [x.double() for x in logits]
            exact = mixture_scores(double, weights.double(), labels, combine)
            plain = mixture_scores(logits, weights, labels, combine, impl="reference")
            kernel = mixture_scores(logits, weights, labels, combine, impl="triton")
            assert_as_good_as_torch(kernel.log_probs, plain.log_probs, exact.log_probs, atol=1e-6)
            # Eight units of float32 at an entropy of 7.
            assert_as_good_as_torch(kernel.entropy, plain.entropy, exact.entropy, atol=4e-6)
            ranked = mixture_log_probs(double, weights.double(), combine).sort(-1, descending=True).values
            clear = torch.ones(6, dtype=torch.bool) if size == 1 else ranked[:, 0] - ranked[:, 1] > 1e-5
            assert torch.equal(kernel.correct[clear], exact.correct[clear])


class TestScoreEdges:
    def test_known_values(self):
        logits = torch.tensor([[0.0, 0.0], [3.0, -torch.inf], [0.0, 0.0]])
        got = token_scores(logits, torch.tensor([0, 0, 1]), impl="triton")
        torch.testing.assert_close(got.log_probs, torch.tensor([-0.693147, 0.0, -0.693147]))
        torch.testing.assert_close(got.entropy, torch.tensor([0.693147, 0.0, 0.693147]))
        assert got.correct.tolist() == [True, True, False]  # the lowest id wins a tie

    def test_extremes(self):
        logits = torch.full((4, 2500), -1e4)
        logits[0, 2499] = 1e4
        logits[1, :] = torch.linspace(-1e4, 1e4, 2500)
        logits[3, :2] = torch.tensor([3e38, -3e38])
        labels = torch.tensor([2499, 0, 7, 0])
        exact = token_scores(logits.double(), labels)
        one = token_scores(logits, labels, impl="triton")
        for got in (one, mixture_scores(logits[None], [2.0], labels, impl="triton")):
            for ours, theirs in zip(got, exact, strict=True):
                torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
    def test_broken_rows_are_nan_and_alone(self, broken, generator):
        logits = torch.randn(2, 3, 70, generator=generator)
        logits[0, 1, slice(None) if broken == -float("inf") else 3] = broken
        labels = torch.tensor([4, 5, 6])
        for got in (
            token_scores(logits[0], labels, impl="triton"),
            *(mixture_scores(logits, [0.5, 0.5], labels, combine, impl="triton") for combine in COMBINES[:2]),
        ):
            assert got.log_probs.isnan().tolist() == got.entropy.isnan().tolist() == [False, True, False]
            assert not got.correct[1]

    def test_masked_rows_are_not_read(self):
        logits = torch.full((2, 2, 9), NAN)
        masked = torch.full((2,), -100)
        for got in (
            token_scores(logits[0], masked, impl="triton"),
            *(mixture_scores(logits, [1.0, 1.0], masked, combine, impl="triton") for combine in COMBINES),
        ):
            assert got.log_probs.tolist() == got.entropy.tolist() == [0.0, 0.0]
            assert got.correct.tolist() == [False, False]

    @pytest.mark.parametrize("label", [9, -1, -99, 2**62])
    def test_labels_out_of_range_are_nan(self, label):
        """The interpreter reads real memory: what lies far outside would end the process."""
        labels = torch.tensor([0, label])
        for got in (
            token_scores(torch.zeros(2, 9), labels, impl="triton"),
            *(mixture_scores(torch.zeros(1, 2, 9), [1.0], labels, combine, impl="triton") for combine in COMBINES),
        ):
            assert got.log_probs.isnan().tolist() == got.entropy.isnan().tolist() == [False, True]
            assert got.correct.tolist() == [True, False]

    def test_leading_shapes(self, generator):
        logits = torch.randn(2, 3, 4, 9, generator=generator)
        labels = torch.randint(0, 9, (3, 4), generator=generator)
        expected = mixture_scores(logits, [0.4, 0.6], labels, impl="reference")
        strided = torch.empty(4, 2, 3, 12)[..., :9].permute(1, 2, 0, 3).copy_(logits)
        for ours, theirs in zip(
            mixture_scores(strided, [0.4, 0.6], labels.T.contiguous().T, impl="triton"), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        shifted = token_scores(logits[0, :, :-1], labels[:, 1:], impl="triton")
        wanted = token_scores(logits[0, :, :-1], labels[:, 1:], impl="reference")
        for ours, theirs in zip(shifted, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert token_scores(logits[0, :0], labels[:0], impl="triton").entropy.shape == (0, 4)

    def test_a_row_depends_on_nothing_but_itself(self, generator):
        logits = torch.randn(5, 2500, generator=generator)
        labels = torch.randint(0, 2500, (5,), generator=generator)
        order = torch.randperm(5, generator=generator)
        whole, shuffled = token_scores_kernel(logits, labels), token_scores_kernel(logits[order], labels[order])
        for ours, theirs in zip(shuffled, whole, strict=True):
            assert torch.equal(ours, theirs[order])


def test_ops_accept_the_kernels(generator):
    """Schema, fake and kernel agree, as torch's own check sees it."""
    logits, weights, keys = inputs(generator, 2, 3, 20)
    labels = torch.tensor([1, -100, 7])
    ops = torch.ops.ensemw2s
    offer = offers(generator, 3, 20)[3]
    of_rows = (torch.tensor([0.0, 0.5, 1.0]), None, torch.tensor([0.9, 0.5, 1.0]).double(), None)
    for setting, rows, last in (
        ((0.0, 0, 1.0, 0.0), (None,) * 4, (0, *(None,) * 4)),
        ((0.8, 5, 0.9, 0.02), of_rows, (2, *offer["adjustments"], offer["mask"])),
    ):
        arguments = (logits, weights.expand(3, 2), *setting, *rows, keys["seeds"], keys["positions"], 0, *last)
        torch.library.opcheck(ops.mixture_sample_triton, arguments)
    torch.library.opcheck(ops.token_scores_triton, (logits[0], labels))
    torch.library.opcheck(ops.mixture_scores_triton, (logits, weights, labels, 0))
    for tensor in (weights, *logits):
        tensor.requires_grad_()
    torch.library.opcheck(ops.mixture_log_probs_triton, (logits, weights, 1))
