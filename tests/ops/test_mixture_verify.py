"""Drafted tokens against a mixture, and draws by expert first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ensemw2s.ops import (
    draw_experts,
    draw_seeds,
    mixture_log_probs,
    mixture_sample,
    mixture_verify,
    pack_mask,
    token_adjustments,
)
from ensemw2s.ops.checks import COMBINES
from tests.ops.test_mixture_sample import IMPLS, SETTINGS, inputs


class Model:
    """T experts whose logits depend on the last token alone."""

    def __init__(self, generator, experts, size):
        self.tables = [3 * torch.randn(size, size, generator=generator) for _ in range(experts)]
        self.weights = torch.rand(experts, generator=generator) + 0.1

    def logits(self, last):
        return [table[last] for table in self.tables]


def one_after_the_other(model, last, length, seeds, positions, **asked):
    """Tokens ``[B, length]`` and their log-probabilities by a call of ``mixture_sample`` for each."""
    tokens, log_probs = [], []
    for i in range(length):
        drawn = mixture_sample(model.logits(last), model.weights, seeds=seeds, positions=positions + i, **asked)
        tokens.append(drawn.tokens)
        log_probs.append(drawn.log_probs)
        last = drawn.tokens
    return torch.stack(tokens, 1), torch.stack(log_probs, 1)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_tokens_are_those_of_one_draw_after_the_other(impl, data):
    """Whatever was drafted: right tokens, wrong ones, or drafts of different lengths."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, length, size = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5)), data.draw(st.sampled_from((2, 40)))
    asked = {"combine": data.draw(st.sampled_from(COMBINES)), "impl": impl} | data.draw(st.sampled_from(SETTINGS))
    model = Model(generator, 3, size)
    seeds, positions = draw_seeds(rows, generator=generator), torch.arange(rows) * 5
    last = torch.randint(0, size, (rows,), generator=generator)
    expected, log_probs = one_after_the_other(model, last, length + 1, seeds, positions, **asked)
    drafted = expected[:, :length].clone()
    wrong = torch.rand(drafted.shape, generator=generator) < 0.3
    drafted[wrong] = torch.randint(-1, size, (int(wrong.sum()),), generator=generator)
    behind = torch.cat([last[:, None], drafted.clamp(min=0)], 1)
    logits = [torch.stack([table[behind[:, i]] for i in range(length + 1)], 1) for table in model.tables]
    got = mixture_verify(logits, model.weights, drafted, seeds=seeds, positions=positions, **asked)
    for row in range(rows):
        right = (drafted[row] == expected[row, :length]).long().cumprod(0).sum()
        assert got.accepted[row] == right
        assert torch.equal(got.tokens[row, : right + 1], expected[row, : right + 1])
        torch.testing.assert_close(got.log_probs[row, : right + 1], log_probs[row, : right + 1])
        assert bool((got.tokens[row, right + 1 :] == -1).all()) and bool(got.log_probs[row, right + 1 :].isnan().all())
    assert bool(got.valid.all())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_distribution_is_the_mixtures(impl):
    """Two tokens behind drafts of a draft model of its own, that draws with other noise, or with the same."""
    generator = torch.Generator().manual_seed(5)
    draws, size = 60_000, 5
    model, draft = Model(generator, 2, size), Model(generator, 1, size)
    seeds, positions = draw_seeds(draws, generator=generator), torch.arange(draws)
    last = torch.zeros(draws, dtype=torch.int64)
    first = [table[0].double().expand(1, -1) for table in model.tables]
    p = mixture_log_probs(first, model.weights.double()).exp()[0]
    q = draft.tables[0][0].double().softmax(-1)
    held = []
    for noise in (draw_seeds(draws, generator=generator), seeds):
        drafted, _ = one_after_the_other(draft, last, 1, noise, positions, impl=impl)
        behind = torch.stack([last, drafted[:, 0]], 1)
        got = mixture_verify(
            [table[behind] for table in model.tables],
            model.weights,
            drafted,
            seeds=seeds,
            positions=positions,
            impl=impl,
        )
        counts = torch.bincount(got.tokens[:, 0], minlength=size).numpy()
        assert stats.chisquare(counts, (p * draws).numpy()).pvalue > 1e-6
        # What comes behind an accepted token is drawn from the mixture behind it.
        for token in range(size):
            rows = (got.accepted == 1) & (drafted[:, 0] == token)
            if int(rows.sum()) < 1000:
                continue
            then = [table[token].double().expand(1, -1) for table in model.tables]
            expected = mixture_log_probs(then, model.weights.double()).exp()[0] * int(rows.sum())
            counts = torch.bincount(got.tokens[rows, 1], minlength=size).numpy()
            assert stats.chisquare(counts, expected.numpy()).pvalue > 1e-6
        held.append(float((got.accepted == 1).double().mean()))
    distance = float((p - q).abs().sum() / 2)
    assert held[0] == pytest.approx(float((p * q).sum()), abs=0.01)
    assert held[1] >= (1 - distance) / (1 + distance) - 0.01 and held[1] > held[0] + 0.02


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_adjustments_and_settings_of_rows(impl, generator):
    rows, length, size = 3, 2, 40
    logits = [torch.randn(rows, length + 1, size, generator=generator) for _ in range(2)]
    weights = torch.rand(rows, 2, generator=generator) + 0.1
    seeds, positions = draw_seeds(rows, generator=generator), torch.arange(rows)
    allowed = torch.rand(rows, length + 1, size, generator=generator) < 0.5
    mask = pack_mask(allowed)
    changes = token_adjustments(size, prompt=torch.arange(9).expand(9, -1), repetition_penalty=3.0)
    asked = {"temperature": torch.tensor([0.0, 0.7, 1.5]), "top_p": 0.9, "top_k": torch.tensor([0, 5, 3])}
    drafted = torch.full((rows, length), -1)
    for i in range(length):  # draft what is drawn, so that all positions are seen
        got = mixture_verify(
            logits,
            weights,
            drafted,
            seeds=seeds,
            positions=positions,
            mask=mask,
            adjustments=changes,
            impl=impl,
            **asked,
        )
        drafted[:, i] = got.tokens[:, i]
    got = mixture_verify(
        logits, weights, drafted, seeds=seeds, positions=positions, mask=mask, adjustments=changes, impl=impl, **asked
    )
    assert got.accepted.tolist() == [length] * rows
    for i in range(length + 1):
        there = range(i, rows * (length + 1), length + 1)
        own = type(changes)(changes.tokens[there], changes.values[:, there], changes.listed[there])
        alone = mixture_sample(
            [x[:, i] for x in logits], weights, seeds=seeds, positions=positions + i, mask=mask[:, i], adjustments=own,
            impl=impl, **asked,
        )  # fmt: skip
        assert torch.equal(got.tokens[:, i], alone.tokens)
    assert bool(allowed.gather(2, got.tokens[..., None]).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_of_a_longer_text_are_not_copied_and_broken_rows_are_reported(impl, generator):
    text = [torch.randn(3, 9, 40, generator=generator) for _ in range(2)]
    text[0][1, 7] = torch.nan
    seeds, positions, weights = draw_seeds(3, generator=generator), torch.arange(3), torch.ones(2)
    drafted = torch.zeros(3, 2, dtype=torch.int64)
    keys = {"seeds": seeds, "positions": positions, "impl": impl}
    first = mixture_sample([x[:, 6] for x in text], weights, **keys)
    drafted[:, 0] = first.tokens
    got = mixture_verify([x[:, 6:] for x in text], weights, drafted, **keys)
    assert got.valid.tolist() == [True, False, True]
    assert got.tokens[1].tolist() == [-1] * 3 and got.accepted[1] == 0 and bool(got.log_probs[1].isnan().all())
    whole = mixture_verify([x[:, 6:].contiguous() for x in text], weights, drafted, **keys)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, whole, strict=True))
    # Behind the first token that does not hold nothing is looked at.
    drafted[1, 0] = (first.tokens[1] + 1) % 40
    assert mixture_verify([x[:, 6:] for x in text], weights, drafted, **keys).valid.tolist() == [True] * 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(2, 3, 5)}, ValueError, r"\[B, k \+ 1, V\].* got experts of shape \(3, 5\)"),
        ({"drafted": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"drafted must have shape \(3, 2\)"),
        ({"drafted": torch.zeros(3, 2)}, TypeError, "drafted must be an int64 tensor"),
        ({"seeds": None}, TypeError, r"seeds is missing: give an int64 tensor \[\d+\]; ops.draw_seeds\(B\)"),
        ({"top_p": torch.ones(9)}, ValueError, r"top_p must be one value, or have shape \(3,\), got \(9,\)"),
        ({"weights": torch.ones(9, 2)}, ValueError, r"weights must have shape \(2,\).* or \(3, 2\)"),
        ({"mask": torch.ones(3, 1, dtype=torch.int32)}, ValueError, r"mask must have shape \(9, 1\)"),
        ({"combine": "max"}, ValueError, "combine='max'"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {
        "logits": torch.zeros(2, 3, 3, 5), "weights": [1.0, 1.0], "drafted": torch.zeros(3, 2, dtype=torch.int64),
        "seeds": torch.zeros(3, dtype=torch.int64), "positions": torch.zeros(3, dtype=torch.int64),
    } | change  # fmt: skip
    with pytest.raises(error, match=words):
        mixture_verify(arguments.pop("logits"), arguments.pop("weights"), arguments.pop("drafted"), **arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_verification_compiles_whole(impl, generator, fresh_compiler):
    logits, weights = torch.randn(2, 3, 3, 33, generator=generator), torch.ones(2)
    drafted, positions = torch.zeros(3, 2, dtype=torch.int64), torch.arange(3)
    asked = {"seeds": draw_seeds(3, generator=generator), "positions": positions, "impl": impl}
    compiled = torch.compile(mixture_verify, fullgraph=True, backend="aot_eager")
    got, want = compiled(logits, weights, drafted, **asked), mixture_verify(logits, weights, drafted, **asked)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.accepted, want.accepted)


# By expert first


@pytest.mark.parametrize("impl", IMPLS)
def test_by_expert_first_the_distribution_is_the_same(impl, generator):
    draws, size = 100_000, 12
    logits, weights, _ = inputs(generator, 3, 1, size, scale=1.0)
    weights[1] = 0.0
    keys = {"seeds": draw_seeds(draws, generator=generator), "positions": torch.arange(draws) // 7}
    many = [x.expand(draws, -1) for x in logits]
    got = mixture_sample(many, weights, sample="expert_first", impl=impl, **keys)
    expected = mixture_log_probs([x.double() for x in logits], weights.double()).exp()[0] * draws
    counts = torch.bincount(got.tokens, minlength=size)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-6
    experts = draw_experts(weights, **keys)
    shares = (weights.double() / weights.double().sum() * draws)[[0, 2]].numpy()
    found = torch.bincount(experts, minlength=3)
    assert found[1] == 0 and stats.chisquare(found[[0, 2]].numpy(), shares).pvalue > 1e-6
    assert torch.equal(got.expert_log_probs.isfinite(), torch.arange(3)[:, None] == experts)
    torch.testing.assert_close(got.log_probs, got.expert_log_probs.gather(0, experts[None])[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_drawn_expert_alone_is_read(impl, generator):
    logits, _, keys = inputs(generator, 3, 40, 50)
    weights = torch.rand(40, 3, generator=generator)
    want = mixture_sample(logits, weights, sample="expert_first", impl=impl, **keys)
    experts = draw_experts(weights, **keys)
    for t, expert in enumerate(logits):
        expert[experts != t] = torch.nan
    got = mixture_sample(logits, weights, sample="expert_first", impl=impl, **keys)
    assert bool(got.valid.all()) and torch.equal(got.tokens, want.tokens)
    alone = mixture_sample(
        [torch.stack([logits[int(t)][row] for row, t in enumerate(experts)])], [1.0], impl=impl, **keys
    )
    assert torch.equal(got.tokens, alone.tokens)
    # A row's expert depends on nothing but the row.
    assert torch.equal(draw_experts(weights[7:9], **{k: x[7:9] for k, x in keys.items()}), experts[7:9])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.7}, "temperature acts on more than one expert's tokens"),
        ({"temperature": torch.ones(2)}, "temperature acts"),
        ({"top_k": 3}, "top_k acts"),
        ({"top_p": 0.9}, "top_p acts"),
        ({"min_p": 0.1}, "min_p acts"),
        ({"combine": "logprob"}, "combine acts"),
        ({"top_logprobs": 2}, "top_logprobs acts"),
        ({"mask": torch.ones(2, 1, dtype=torch.int32)}, "mask acts"),
        ({"adjustments": token_adjustments(9, prompt=torch.zeros(2, 1).long())}, "adjustments acts"),
        ({"sample": "first"}, "sample='first' is neither"),
        ({"weights": torch.tensor([[1.0, 1.0], [1.0, -1.0]])}, "weights must be finite and non-negative, .* row 1"),
    ],
)
def test_what_cannot_be_drawn_by_expert_first_is_refused(impl, change, words):
    keys = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64)}
    asked = {"sample": "expert_first", "weights": [1.0, 1.0]} | change
    with pytest.raises(ValueError, match=words):
        mixture_sample(torch.zeros(2, 2, 9), asked.pop("weights"), impl=impl, **keys, **asked)


def test_one_seed_without_an_axis_is_no_batch():
    with pytest.raises(ValueError, match=r"seeds must have shape \(1,\), got \(\)"):
        draw_experts([1.0, 2.0], torch.tensor(3), torch.tensor(0))


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_needs_no_seeds(impl, generator):
    logits, weights, keys = inputs(generator, 2, 3, 40)
    got = mixture_sample(logits, weights, temperature=0.0, impl=impl)
    assert torch.equal(got.tokens, mixture_sample(logits, weights, temperature=0.0, impl=impl, **keys).tokens)
    for asked in ({}, {"temperature": torch.zeros(3)}, {"temperature": 0, "positions": keys["positions"]}):
        with pytest.raises(TypeError, match=r"seeds is missing: give an int64 tensor \[\d+\]; ops.draw_seeds\(B\)"):
            mixture_sample(logits, weights, impl=impl, **asked)
