"""Biases, penalties and masks: what they are made of, and that every backend draws by them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy import stats
from transformers import RepetitionPenaltyLogitsProcessor

from ensemw2s.ops import TokenAdjustments, draw_seeds, mixture_log_probs, mixture_sample, pack_mask, token_adjustments
from ensemw2s.ops.checks import COMBINES
from ensemw2s.ops.token_adjustments import adjusted, unpack_mask
from tests.ops.helpers import DTYPES, needs_cpp
from tests.ops.test_mixture_sample import (
    IMPLS,
    ROWS,
    SETTINGS,
    SIZES,
    assert_likeliest,
    inputs,
    is_decided,
    one_row,
    settings_of_rows,
    warped,
    weights_of_rows,
)

RATES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def ids(generator, rows, count, size):
    """Tokens with repeats and with gaps, where there is none."""
    tokens = torch.randint(0, size, (rows, count), generator=generator)
    return tokens.masked_fill(torch.rand(rows, count, generator=generator) < 0.2, -1)


def some_adjustments(generator, rows, size, count=12):
    """Adjustments of all kinds, which differ from row to row."""
    return token_adjustments(
        size,
        bias_tokens=ids(generator, rows, count, size),
        bias=torch.randn(rows, count, generator=generator) * 3,
        prompt=ids(generator, rows, count, size),
        generated=ids(generator, rows, count, min(size, 5)),
        repetition_penalty=torch.rand(rows, generator=generator) + 0.7,
        presence_penalty=0.4,
        frequency_penalty=torch.randn(rows, generator=generator),
    )


def some_mask(generator, rows, size, share):
    """A mask that allows each token with this probability, and at least one of them."""
    allowed = torch.rand(rows, size, generator=generator) < share
    allowed[torch.arange(rows), torch.randint(0, size, (rows,), generator=generator)] = True
    return pack_mask(allowed)


def offers(generator, rows, size):
    """Every kind of offer: few tokens, most of them, adjusted ones, both, and one that leaves adjusted tokens alone."""
    adjustments = some_adjustments(generator, rows, size)
    return (
        {"mask": some_mask(generator, rows, size, 0.02)},
        {"mask": some_mask(generator, rows, size, 0.9)},
        {"adjustments": adjustments},
        {"adjustments": adjustments, "mask": some_mask(generator, rows, size, 0.5)},
        {"adjustments": adjustments, "mask": adjustments.listed},
    )


def part(offer, rows):
    """The offer of some rows (a slice or a tensor of indices)."""
    found = dict(offer)
    if "mask" in found:
        found["mask"] = found["mask"][rows]
    if "adjustments" in found:
        tokens, values, listed = found["adjustments"]
        found["adjustments"] = TokenAdjustments(tokens[rows], values[:, rows], listed[rows])
    return found


def offered(log_probs, adjustments=None, mask=None):
    """Log-probabilities at which tokens are offered."""
    if adjustments is not None:
        log_probs, _ = adjusted(log_probs, adjustments)
    return log_probs if mask is None else log_probs.masked_fill(~unpack_mask(mask, log_probs.shape[-1]), -torch.inf)


def assert_draws_what_float64_draws(sample, generator, combine, dtype, sizes=SIZES, impl_atol=2e-6):
    """Compare ``sample(logits, weights, ...)`` with the reference in float64 for every offer and setting."""
    decided = total = 0
    for size in sizes:
        logits, weights, keys = inputs(generator, 3, 4, size, dtype)
        double = [x.double() for x in logits]
        log_probs = mixture_log_probs(double, weights.double(), combine)
        for offer in offers(generator, 4, size):
            scores = offered(log_probs, **offer)
            for setting in SETTINGS:
                got = sample(logits, weights, combine=combine, top_logprobs=min(3, size), **keys, **setting, **offer)
                exact = mixture_sample(double, weights.double(), combine=combine, **keys, **setting, **offer)
                assert torch.equal(got.valid, exact.valid), (size, setting, offer)
                rows = is_decided(scores, **keys, **setting) & exact.valid
                decided, total = decided + int(rows.sum()), total + int(exact.valid.sum())
                assert torch.equal(got.tokens[rows], exact.tokens[rows]), (size, setting, offer)
                good = exact.valid
                assert bool((scores.gather(1, got.tokens.clamp(min=0)[:, None])[good] > -torch.inf).all())
                picked = log_probs.gather(-1, got.tokens.clamp(min=0)[:, None])[:, 0]
                torch.testing.assert_close(got.log_probs[good].double(), picked[good], atol=impl_atol, rtol=1e-6)
                if bool(good.all()):
                    assert_likeliest(got.top_tokens, got.top_log_probs, log_probs, min(3, size))
    assert decided > 0.8 * total or combine == "vote"


# What they are made of


@examples(max_examples=60, deadline=None)
@given(st.data())
def test_they_are_what_a_loop_over_the_text_says(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size, rows = data.draw(st.sampled_from((1, 31, 32, 33, 70))), data.draw(st.integers(1, 3))
    counts = [data.draw(st.integers(0, 9)) for _ in range(3)]
    bias_tokens, prompt, generated = (ids(generator, rows, count, size) for count in counts)
    bias = torch.randn(rows, counts[0], generator=generator)
    rates = [torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5 for _ in range(3)]
    if data.draw(st.booleans()):
        rates = [float(rate[0]) for rate in rates]
    found = token_adjustments(
        size, bias_tokens=bias_tokens, bias=bias, prompt=prompt.int(), generated=generated,
        **dict(zip(RATES, rates, strict=True)),
    )  # fmt: skip
    log_probs = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    want, is_listed = log_probs.clone(), torch.zeros(rows, size, dtype=torch.bool)
    for row in range(rows):
        repetition, presence, frequency = (float(r if isinstance(r, float) else r[row]) for r in rates)
        said = generated[row][generated[row] >= 0].tolist()
        for token in {*bias_tokens[row].tolist(), *prompt[row].tolist(), *said} - {-1}:
            is_listed[row, token] = True
            score = float(log_probs[row, token] + bias[row][bias_tokens[row] == token].sum())
            if token in said or token in prompt[row].tolist():
                score = score * repetition if score < 0 else score / repetition
            count = said.count(token)
            want[row, token] = score - frequency * count - presence * (count > 0)
    got, usable = adjusted(log_probs, found)
    assert bool(usable.all())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(unpack_mask(found.listed, size), is_listed)
    for row in found.tokens.tolist():
        tokens = [token for token in row if token >= 0]
        assert tokens == sorted(set(tokens)) and row[len(tokens) :] == [-1] * (len(row) - len(tokens))


def test_repetition_is_that_of_transformers(generator):
    log_probs = torch.randn(3, 50, generator=generator).log_softmax(-1)
    text = torch.randint(0, 50, (3, 20), generator=generator)
    ours, _ = adjusted(
        log_probs, token_adjustments(50, prompt=text[:, :8], generated=text[:, 8:], repetition_penalty=1.3)
    )
    torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(1.3)(text, log_probs))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_masks_are_packed_as_grammar_libraries_pack_them(generator, size):
    allowed = torch.rand(3, size, generator=generator) < 0.5
    mask = pack_mask(allowed)
    assert mask.dtype == torch.int32 and mask.shape == (3, -(-size // 32))
    for row, token in [(0, 0), (1, size - 1), (2, size // 2)]:
        assert bool(int(mask[row, token // 32]) & (1 << (token % 32))) == bool(allowed[row, token])
    assert torch.equal(unpack_mask(mask, size), allowed)


# What is drawn


@needs_cpp
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_draw_what_float64_draws(generator, combine, dtype):
    def sample(*args, **kwargs):
        return mixture_sample(*args, impl="cpp", **kwargs)

    assert_draws_what_float64_draws(sample, generator, combine, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_follow_the_distribution_that_is_offered(generator, impl):
    draws, size = 100_000, 14
    logits, weights, _ = inputs(generator, 2, 1, size, scale=1.0)
    keys = {"seeds": draw_seeds(draws, generator=generator), "positions": torch.arange(draws) // 7}
    text = ids(generator, 1, 6, size)
    milder = token_adjustments(size, prompt=text, generated=text[:, :3], repetition_penalty=1.1, frequency_penalty=0.2)
    forbidden = torch.arange(size) < 4
    offer = {"adjustments": milder, "mask": pack_mask(~forbidden[None])}
    many = part(offer, torch.zeros(draws, dtype=torch.int64))
    scores = offered(mixture_log_probs([x.double() for x in logits], weights.double()), **offer)
    for setting in ({}, {"temperature": 0.7, "top_k": 6, "top_p": 0.95}):
        tokens = mixture_sample(
            [x.expand(draws, -1) for x in logits], weights, impl=impl, **keys, **setting, **many
        ).tokens
        expected = warped(scores, **setting).softmax(-1)[0] * draws
        counts = torch.bincount(tokens, minlength=size)
        assert counts[expected == 0].sum() == 0
        possible = expected > 0
        assert bool(possible[4:].any()) and not bool(possible[:4].any())
        if int(possible.sum()) > 1:
            expected = expected[possible] * draws / expected.sum()
            assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-6


@needs_cpp
@pytest.mark.parametrize("combine", COMBINES)
def test_a_row_is_what_it_is_alone(generator, combine):
    """Bit for bit, beside rows of other offers and settings, in any order and on any number of threads."""
    rows, threads = len(ROWS), torch.get_num_threads()
    row_settings = settings_of_rows()
    for size in SIZES:
        logits, _, keys = inputs(generator, 3, rows, size)
        weights = weights_of_rows(generator, rows, 3)
        for offer in offers(generator, rows, size):
            for number in (1, 2):
                torch.set_num_threads(number)
                batch = mixture_sample(
                    logits, weights, combine=combine, impl="cpp", top_logprobs=1, **keys, **row_settings, **offer
                )
                for row in range(rows):
                    z, w, rest = one_row(row, logits, weights, keys, row_settings)
                    own = part(offer, slice(row, row + 1))
                    alone = mixture_sample(z, w, combine=combine, impl="cpp", top_logprobs=1, **rest, **own)
                    for name, ours, theirs in zip(alone._fields, batch, alone, strict=True):
                        mine = ours[:, row : row + 1] if name == "expert_log_probs" else ours[row : row + 1]
                        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    torch.set_num_threads(threads)


def check_rows_without_a_token(sample, settings=(*SETTINGS, {"temperature": 1e-4})):
    """A mask of nothing, or of impossible tokens alone, makes a row invalid; an adjusted token can be its only one."""
    logits = torch.zeros(2, 4, 300)
    logits[:, :, 7] = -torch.inf
    allowed = torch.zeros(4, 300, dtype=torch.bool)
    allowed[1, 7] = allowed[2, 299] = allowed[3, [7, 8]] = True
    listed = token_adjustments(300, bias_tokens=torch.tensor([[5], [7], [-1], [8]]), bias=torch.full((4, 1), -50.0))
    keys = {"seeds": torch.arange(4), "positions": torch.arange(4)}
    for combine in COMBINES[:2]:
        for setting in settings:
            got = sample(
                logits, torch.tensor([0.5, 0.5]), combine=combine, top_logprobs=2, mask=pack_mask(allowed),
                adjustments=listed, **keys, **setting,
            )  # fmt: skip
            assert got.valid.tolist() == [False, False, True, True], (combine, setting)
            assert got.tokens.tolist() == [-1, -1, 299, 8]
            assert bool(got.log_probs[:2].isnan().all()) and bool(got.expert_log_probs[:, :2].isnan().all())
            assert got.top_tokens.tolist() == [[-1, -1]] * 2 + [[0, 1]] * 2
    votes = sample(logits, torch.tensor([0.5, 0.5]), combine="vote", mask=pack_mask(allowed), **keys)
    assert votes.valid.tolist() == [False] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_token(impl):
    check_rows_without_a_token(lambda *args, **kwargs: mixture_sample(*args, impl=impl, **kwargs))


def check_extremes(sample, settings=SETTINGS):
    """Biases that outweigh everything, that forbid, and that only just do not."""
    logits = torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(3)) * 3
    bias = torch.tensor([[1e30], [-torch.inf], [-1e30], [3.4e38], [100.0]])
    lifted = token_adjustments(400, bias_tokens=torch.tensor([[11], [12], [13], [14], [15]]), bias=bias)
    keys = {"seeds": torch.arange(5), "positions": torch.arange(5)}
    for combine in COMBINES[:2]:
        for setting in settings:
            tokens = sample(
                logits, torch.tensor([0.5, 0.5]), combine=combine, adjustments=lifted, **keys, **setting
            ).tokens
            assert tokens[[0, 3, 4]].tolist() == [11, 14, 15], (combine, setting)
            assert tokens[1] not in (-1, 12) and tokens[2] not in (-1, 13)
    sharp = token_adjustments(400, prompt=torch.arange(400).expand(5, -1), repetition_penalty=1000.0)
    cold = sample(logits, torch.tensor([0.5, 0.5]), adjustments=sharp, **keys)
    plain = sample(logits, torch.tensor([0.5, 0.5]), temperature=0.0, **keys)
    assert torch.equal(cold.tokens, plain.tokens)


@pytest.mark.parametrize("impl", IMPLS)
def test_extremes(impl):
    check_extremes(lambda *args, **kwargs: mixture_sample(*args, impl=impl, **kwargs))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_changes_nothing_changes_nothing(impl, generator):
    logits, weights, keys = inputs(generator, 3, 4, 300)
    none = torch.full((4, 3), -1)
    idle = (
        {"mask": pack_mask(torch.ones(4, 300, dtype=torch.bool))},
        {"mask": torch.full((4, 10), -1, dtype=torch.int32)},
        {"adjustments": token_adjustments(300, prompt=none, repetition_penalty=2.0)},
        {"adjustments": token_adjustments(300, prompt=none[:, :0])},
        {"adjustments": token_adjustments(300, prompt=torch.arange(300).expand(4, -1))},
    )
    for combine in COMBINES:
        for setting in SETTINGS:
            want = mixture_sample(logits, weights, combine=combine, impl=impl, **keys, **setting)
            for offer in idle:
                got = mixture_sample(logits, weights, combine=combine, impl=impl, **keys, **setting, **offer)
                assert torch.equal(got.tokens, want.tokens), (combine, setting, offer)


# Bad input


@pytest.mark.parametrize(
    ("given_", "error", "words"),
    [
        ({}, ValueError, "no tokens to adjust: give bias_tokens and bias, prompt or generated"),
        ({"bias": torch.zeros(2, 1)}, ValueError, "bias_tokens and bias go together"),
        (
            {"prompt": torch.zeros(2, 1).long(), "presence_penalty": 0.5},
            ValueError,
            r"presence_penalty counts what was generated, which is not given: give generated, a tensor \[B, G\]",
        ),
        (
            {"bias_tokens": torch.ones(2, 1).long(), "bias": torch.ones(2, 1), "frequency_penalty": torch.zeros(2)},
            ValueError,
            "frequency_penalty counts what was generated",
        ),
        ({"prompt": torch.zeros(2, 3)}, TypeError, "prompt must be int64 or int32, got torch.float32"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, ValueError, r"prompt must be \[B, N\], got shape \(3,\)"),
        ({"prompt": [[1]]}, TypeError, "prompt must be a tensor, got list"),
        ({"prompt": torch.tensor([[1], [9]])}, ValueError, "prompt must be below the vocabulary of 9.* got 9 in row 1"),
        (
            {"prompt": torch.zeros(2, 1).long(), "generated": torch.zeros(3, 1).long()},
            ValueError,
            "generated has 3 rows, prompt has 2",
        ),
        ({"bias_tokens": torch.ones(2, 1).long(), "bias": torch.ones(2, 2)}, ValueError, "the shape of bias_tokens"),
        ({"bias_tokens": torch.ones(2, 1).long(), "bias": torch.ones(2, 1).long()}, TypeError, "bias must be floating"),
        (
            {"bias_tokens": torch.ones(2, 1).long(), "bias": torch.tensor([[0.0], [torch.inf]])},
            ValueError,
            "bias must be a number below infinity, got inf in row 1",
        ),
        (
            {"bias_tokens": torch.ones(1, 1).long(), "bias": torch.tensor([[torch.nan]])},
            ValueError,
            "bias must be a number below infinity, got nan in row 0",
        ),
        ({"repetition_penalty": 0.0}, ValueError, r"repetition_penalty=0.0 must be positive and finite \(1 is off\)"),
        ({"repetition_penalty": 1e39}, ValueError, r"repetition_penalty=1e\+39 must be positive and finite"),
        ({"repetition_penalty": "2"}, TypeError, "repetition_penalty must be a number, got str"),
        ({"repetition_penalty": torch.tensor([1.0, -1.0])}, ValueError, "repetition_penalty must be .* in row 1"),
        ({"presence_penalty": torch.ones(3)}, ValueError, r"presence_penalty must be one value, or have shape \(2,\)"),
        ({"frequency_penalty": float("nan")}, ValueError, "frequency_penalty=nan must be finite"),
        ({"frequency_penalty": torch.ones(2).long()}, TypeError, "frequency_penalty must be a number, or of torch.f"),
    ],
)
def test_bad_adjustments(given_, error, words):
    named = {"bias_tokens", "prompt", "generated"} & given_.keys() or not given_ or "bias" in given_
    with pytest.raises(error, match=words):
        token_adjustments(9, **({} if named else {"generated": torch.zeros(2, 1).long()}) | given_)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, TypeError, r"mask must be int32.*ops.pack_mask\(allowed\)"),
        ({"mask": torch.ones(2, 2, dtype=torch.int32)}, ValueError, r"mask must have shape \(2, 1\), a bit for each"),
        (
            {"adjustments": token_adjustments(30, prompt=torch.tensor([[1], [20]]))},
            ValueError,
            "tokens of adjustments must .*below 9, got 20 in row 1",
        ),
        (
            {"temperature": [0.0, 1.0]},
            TypeError,
            r"temperature must be a number, or a tensor \[B\] of each row's, got list",
        ),
        ({"mask": [1]}, TypeError, "mask must be a tensor, got list"),
        ({"adjustments": torch.ones(2)}, TypeError, "must be what ops.token_adjustments returns, got Tensor"),
        (
            {"adjustments": token_adjustments(9, prompt=torch.zeros(3, 1).long())},
            ValueError,
            "are of 3 rows, .* have 2",
        ),
        (
            {"adjustments": token_adjustments(40, prompt=torch.zeros(2, 1).long())},
            ValueError,
            r"adjustments.listed must have shape \(2, 1\), a bit for each of 9 tokens",
        ),
    ],
)
def test_bad_offers(impl, change, error, words):
    keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=words):
        mixture_sample(torch.zeros(2, 2, 9), [1.0, 1.0], impl=impl, **keys, **change)


@needs_cpp
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.tensor([[3, 2]])}, "must ascend and be below 9, got 2 in row 0"),
        ({"tokens": torch.tensor([[3, 12]])}, "must ascend and be below 9, got 12 in row 0"),
        ({"tokens": torch.tensor([[-1, 3]])}, "must ascend and be below 9, got 3 in row 0"),
        ({"listed": torch.tensor([[1 << 3]])}, "the bits of adjustments lack token 5 in row 0"),
        ({"values": torch.zeros(3, 1, 2)}, "values of adjustments for token 3 cannot be used in row 0"),
    ],
)
def test_compiled_kernels_refuse_adjustments_that_nobody_made(change, words):
    made = token_adjustments(9, prompt=torch.tensor([[3, 5]]), repetition_penalty=2.0)
    kept = {name: x if name == "values" else x.int() for name, x in change.items()}
    keys = {"seeds": torch.zeros(1, dtype=torch.int64), "positions": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(ValueError, match=words):
        mixture_sample(torch.zeros(1, 1, 9), [1.0], impl="cpp", adjustments=made._replace(**kept), **keys)


# torch.compile


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl, generator, fresh_compiler):
    logits, weights, keys = inputs(generator, 2, 3, 33)
    text, mask = ids(generator, 3, 6, 33), some_mask(generator, 3, 33, 0.5)

    def draw(text, mask):
        changes = token_adjustments(33, generated=text, repetition_penalty=1.5, frequency_penalty=0.2)
        return mixture_sample(logits, weights, adjustments=changes, mask=mask, impl=impl, **keys)

    got = torch.compile(draw, fullgraph=True, backend="aot_eager")(text, mask)
    assert torch.equal(got.tokens, draw(text, mask).tokens)


@needs_cpp
def test_opcheck(generator):
    logits, weights, keys = inputs(generator, 2, 3, 20)
    changes = some_adjustments(generator, 3, 20, 4)
    arguments = (
        logits, weights, 0.7, 5, 0.9, 0.0, *(None,) * 4, keys["seeds"], keys["positions"], 0, 2, *changes,
        some_mask(generator, 3, 20, 0.5),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.ensemw2s.mixture_sample, arguments)
