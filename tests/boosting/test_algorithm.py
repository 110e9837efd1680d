"""The rounds' arithmetic: every invariant of the method, and agreement with scikit-learn's AdaBoost."""

import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.datasets import make_classification
from sklearn.ensemble import AdaBoostClassifier
from sklearn.tree import DecisionTreeClassifier

from ensemw2s.boosting import algorithm
from ensemw2s.runtime.files import map_array, new_array

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 300)
open_unit = st.floats(0.001, 0.999)


def random_weights(generator, size):
    """Weights of very different sizes, some of them exactly 0."""
    weights = np.exp(4 * generator.standard_normal(size)) * (generator.random(size) < 0.9)
    weights[generator.integers(size)] += 1.0
    return weights / math.fsum(weights)


def exact_error(weights, wrong):
    return math.fsum(weights[wrong]) / math.fsum(weights)


# Units


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 5))
def test_windows_cut_each_answer_by_itself(lengths, window):
    expected, unit = [], -1
    for length in lengths:
        for position in range(length):
            unit += position % window == 0
            expected.append(unit)
    assert algorithm.unit_index(lengths, "window", window).tolist() == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_tokens_and_sequences_are_the_two_ends_of_windows(lengths):
    np.testing.assert_array_equal(algorithm.unit_index(lengths, "token"), algorithm.unit_index(lengths, "window", 1))
    np.testing.assert_array_equal(
        algorithm.unit_index(lengths, "sequence"), algorithm.unit_index(lengths, "window", max(lengths))
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 5), seeds)
def test_a_unit_is_wrong_exactly_if_one_of_its_tokens_is(lengths, window, seed):
    units = algorithm.unit_index(lengths, "window", window)
    token_wrong = np.random.default_rng(seed).random(units.size) < 0.3
    expected = [token_wrong[units == unit].any() for unit in range(units.max() + 1)]
    assert algorithm.unit_losses(token_wrong, units).tolist() == expected


# Weights, errors, updates


def reweighted(weights, mix):
    return algorithm.loss_weights(weights, sampling="reweight", uniform_mix=mix)


@given(seeds, sizes, st.floats(0, 0.999))
def test_mixing_keeps_a_distribution_and_a_floor(seed, size, mix):
    weights = random_weights(np.random.default_rng(seed), size)
    mixed = reweighted(weights, mix) / size
    np.testing.assert_allclose(mixed, (1 - mix) * weights + mix / size, rtol=1e-14)
    assert abs(math.fsum(mixed) - 1) < 1e-12
    assert mixed.min() >= mix / size * (1 - 1e-12)


def test_effective_sample_size_of_known_weights():
    assert algorithm.effective_sample_size(algorithm.initial_weights(40)) == pytest.approx(40)
    assert algorithm.effective_sample_size([0, 1, 0]) == 1
    assert algorithm.effective_sample_size([0.5, 0.25, 0.25]) == pytest.approx(1 / 0.375)


@given(seeds, sizes)
def test_weighted_error_is_the_weight_of_what_is_wrong(seed, size):
    generator = np.random.default_rng(seed)
    weights, wrong = random_weights(generator, size), generator.random(size) < 0.4
    assert algorithm.weighted_error(weights, wrong) == pytest.approx(math.fsum(weights[wrong]), abs=1e-15)
    assert algorithm.weighted_error(weights, np.zeros(size, bool)) == 0
    assert algorithm.weighted_error(weights, np.ones(size, bool)) <= 1


@given(st.floats(0, 1), st.integers(1, 10**9))
def test_clamping_moves_only_what_lies_outside_and_says_so(error, num_units):
    clamped, moved = algorithm.clamp_error(error, num_units)
    assert 1 / (2 * num_units) <= clamped <= 1 - 1 / (2 * num_units)
    assert moved == (not 1 / (2 * num_units) <= error <= 1 - 1 / (2 * num_units))
    assert moved or clamped == error
    assert math.isfinite(algorithm.expert_weight(clamped, 0.5))


@given(open_unit, open_unit)
def test_expert_weight_is_the_papers_formula_and_positive_exactly_below_the_prior(error, prior):
    expected = math.log((1 - error) / error) + math.log(1 / (1 - prior) - 1)
    assert algorithm.expert_weight(error, prior) == pytest.approx(expected, abs=1e-11)
    if error != prior:
        assert (algorithm.expert_weight(error, prior) > 0) == (error < prior)


@given(st.integers(2, 200_000), open_unit)
def test_uniform_prior_gives_samme(num_classes, error):
    prior = algorithm.prior_error("uniform", num_classes=num_classes)
    samme = math.log((1 - error) / error) + math.log(num_classes - 1)
    assert algorithm.expert_weight(error, prior) == pytest.approx(samme, abs=1e-9)


def test_prior_is_read_from_the_named_place():
    assert algorithm.prior_error("pretrained", 0.8, 10) == 0.8
    assert algorithm.prior_error("uniform", 0.8, 10) == pytest.approx(0.9)
    assert algorithm.prior_error(0.25, 0.8, 10) == 0.25
    assert algorithm.prior_error("pretrained", 0.8, unit="window") == 0.8


@given(seeds, sizes, open_unit, st.floats(0.05, 1))
def test_closing_identity_and_its_shrinkage_form(seed, size, prior, shrinkage):
    generator = np.random.default_rng(seed)
    weights = 0.8 * random_weights(generator, size) + 0.2 / size
    wrong = generator.random(size) < 0.4
    error = algorithm.weighted_error(weights, wrong)
    if not 0 < error < 1 or error >= prior:
        return
    expert_weight = algorithm.expert_weight(error, prior)
    full = algorithm.update_weights(weights, wrong, expert_weight)
    assert abs(exact_error(full, wrong) - prior) < 1e-12
    shrunk = algorithm.update_weights(weights, wrong, expert_weight, shrinkage)
    factor = math.exp(shrinkage * expert_weight)
    assert abs(exact_error(shrunk, wrong) - factor * error / (factor * error + 1 - error)) < 1e-12


@given(seeds, sizes, st.floats(0.05, 1))
@settings(max_examples=30)
def test_weights_stay_a_distribution_over_many_rounds(seed, size, shrinkage):
    generator = np.random.default_rng(seed)
    weights = algorithm.initial_weights(size)
    for _ in range(30):
        wrong = generator.random(size) < generator.random()
        error, _ = algorithm.clamp_error(algorithm.weighted_error(weights, wrong), size)
        expert_weight = algorithm.expert_weight(error, 0.999)
        if expert_weight > 0:
            before = weights.copy()
            following = algorithm.update_weights(weights, wrong, expert_weight, shrinkage)
            np.testing.assert_array_equal(weights, before, err_msg="the input was changed")
            weights = following
        assert abs(math.fsum(weights) - 1) < 1e-9
        assert weights.min() >= 0


def test_a_large_expert_weight_does_not_overflow():
    updated = algorithm.update_weights([0.5, 0.5], [True, False], 800.0)
    np.testing.assert_array_equal(updated, [1.0, 0.0])


@given(seeds, st.sampled_from(["independent", "systematic"]), st.floats(0, 0.9))
@settings(max_examples=20)
def test_blocks_change_no_bit(seed, method, mix):
    # More units than two blocks of 64, the last one cut short; the whole fits one block of the ordinary size.
    size = 2 * 64 + 17
    generator = np.random.default_rng(seed)
    weights, wrong = random_weights(generator, size), generator.random(size) < 0.4
    units = np.repeat(np.arange(size), 2)

    def everything():
        drawn = [
            algorithm.loss_weights(
                weights, sampling=name, uniform_mix=mix, method=method, generator=np.random.default_rng(seed)
            )
            for name in ("draw", "reweight", "bagging")
        ]
        updated = algorithm.update_weights(weights, wrong, 1.3, 0.7)
        counts = algorithm.draw_counts(weights, 3 * size, np.random.default_rng(seed), method)
        return [*drawn, updated, counts, algorithm.unit_losses(np.repeat(wrong, 2), units)]

    with pytest.MonkeyPatch.context() as patch:
        # The rows of the prefix sum are the same in both, since their borders decide its rounding.
        patch.setattr(algorithm, "PREFIX_SUM_BLOCK", 16)
        whole = everything()
        error = algorithm.weighted_error(weights, wrong)
        patch.setattr(algorithm, "BLOCK", 64)
        for one, other in zip(everything(), whole, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        assert algorithm.weighted_error(weights, wrong) == pytest.approx(error, abs=1e-15)


def test_draws_invert_the_cumulative_distribution_across_blocks(monkeypatch):
    monkeypatch.setattr(algorithm, "PREFIX_SUM_BLOCK", 8)
    monkeypatch.setattr(algorithm, "BLOCK", 16)
    # Exact in binary, so that the reference's cumulative sums are the same numbers.
    generator = np.random.default_rng(5)
    weights = np.bincount(generator.integers(0, 90, 1024), minlength=100) / 1024
    expected = np.zeros(100, dtype=np.int64)
    for uniform in np.random.default_rng(6).random(500):
        expected[np.flatnonzero(np.cumsum(weights) > uniform)[0]] += 1
    counts = algorithm.draw_counts(weights, 500, np.random.default_rng(6))
    np.testing.assert_array_equal(counts, expected)


@given(seeds, sizes)
def test_quantiles_of_the_scaled_weights(seed, size):
    weights = random_weights(np.random.default_rng(seed), size)
    before = weights.copy()
    quantiles = algorithm.weight_quantiles(weights, [0, 0.3, 0.5, 1])
    np.testing.assert_allclose(quantiles, np.quantile(weights * size, [0, 0.3, 0.5, 1]), rtol=1e-14)
    np.testing.assert_array_equal(weights, before)


def test_results_go_where_they_are_asked_to(tmp_path):
    weights = algorithm.initial_weights(5)
    with new_array(tmp_path / "weights.npy", 5) as out:
        assert algorithm.update_weights(weights, [True, False, False, False, True], 1.0, out=out) is out
    expected = algorithm.update_weights(weights, [True, False, False, False, True], 1.0)
    np.testing.assert_array_equal(map_array(tmp_path / "weights.npy"), expected)
    np.testing.assert_array_equal(algorithm.loss_weights(expected, sampling="reweight", out=weights), expected * 5)
    for bad in (np.empty(4), np.empty(5, dtype=np.float32)):
        with pytest.raises(ValueError, match=r"out must be float64 of shape \(5,\), one entry per unit; got float"):
            algorithm.initial_weights(5, out=bad)


def round_of_boosting(folder: Path, size: int) -> None:
    """One round on arrays that live on the disk, as `BoostingTrainer` keeps them."""
    generator = np.random.default_rng(0)
    with new_array(folder / "weights.npy", size) as weights:
        algorithm.initial_weights(size, out=weights)
    with new_array(folder / "wrong.npy", size, bool) as wrong:
        for start in range(0, size, 1 << 20):
            wrong[start : start + (1 << 20)] = generator.random(len(wrong[start : start + (1 << 20)])) < 0.3
    with new_array(folder / "units.npy", size, np.int64) as units:
        for start in range(0, size, 1 << 20):
            units[start : start + (1 << 20)] = np.arange(start, min(start + (1 << 20), size))
    weights, wrong = map_array(folder / "weights.npy"), map_array(folder / "wrong.npy")
    wrong = algorithm.unit_losses(wrong, map_array(folder / "units.npy"))
    error = algorithm.weighted_error(weights, wrong)
    with new_array(folder / "next.npy", size) as out:
        algorithm.update_weights(weights, wrong, algorithm.expert_weight(error, 0.8), out=out)
    weights = map_array(folder / "next.npy")
    assert algorithm.weighted_error(weights, wrong) == pytest.approx(0.8, abs=1e-12)
    assert algorithm.effective_sample_size(weights) < size
    for how in ({"sampling": "draw", "uniform_mix": 0.5}, {"sampling": "reweight"}, {"sampling": "bagging"}):
        with new_array(folder / "loss.npy", size) as out:
            algorithm.loss_weights(weights, generator=generator, out=out, **how)
        assert map_array(folder / "loss.npy").sum() == pytest.approx(size, rel=1e-9)


def test_arrays_on_the_disk_are_not_read_into_memory(tmp_path, monkeypatch):
    size = 4_000_000
    monkeypatch.setattr(algorithm, "DRAWS_PER_CHUNK", 1 << 18)
    tracemalloc.start()
    round_of_boosting(tmp_path, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A few blocks of 8 MB, and the wrong bits; every float64 copy of the weights would be 32 MB.
    assert peak < 50e6


@pytest.mark.slow
def test_a_round_of_a_hundred_million_units_needs_little_memory(tmp_path):
    tracemalloc.start()
    round_of_boosting(tmp_path, 100_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 128 MB of draws and 100 MB of wrong bits, against 800 MB for each float64 copy of the weights.
    assert peak < 400e6


@pytest.mark.slow
def test_a_hundred_million_units():
    size = 100_000_000
    generator = np.random.default_rng(0)
    weights = algorithm.initial_weights(size)
    for _ in range(2):
        wrong = generator.random(size, dtype=np.float32) < 0.3
        error = algorithm.weighted_error(weights, wrong)
        weights = algorithm.update_weights(weights, wrong, algorithm.expert_weight(error, 0.8))
        # Blocks whose sums are added exactly: a reference that does not share NumPy's rounding.
        assert abs(math.fsum(weights.reshape(10_000, -1).sum(axis=1)) - 1) < 1e-9
        assert algorithm.weighted_error(weights, wrong) == pytest.approx(0.8, abs=1e-12)
    del wrong
    counts = algorithm.draw_counts(weights, 20_000_000, generator)
    assert counts.sum() == 20_000_000
    heavy = weights > 2 / size
    share = counts[heavy].sum() / 20_000_000
    assert share == pytest.approx(weights[heavy].sum(), abs=5 * math.sqrt(0.25 / 20_000_000))


def test_systematic_draws_take_each_of_many_uniform_units_once():
    counts = algorithm.draw_counts(
        algorithm.initial_weights(3_000_001), 3_000_001, np.random.default_rng(1), "systematic"
    )
    assert counts.min() == counts.max() == 1


# Draws


def test_independent_draws_have_the_right_frequencies():
    generator = np.random.default_rng(20)
    weights = random_weights(generator, 50)
    size = 200_000
    counts = algorithm.draw_counts(weights, size, generator)
    expected = weights * size
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    assert stats.chisquare(observed, np.append(expected[~rare], expected[rare].sum())).pvalue > 0.01


def test_counts_of_independent_draws_spread_like_a_multinomial():
    weights = np.array([0.5, 0.3, 0.2])
    generator = np.random.default_rng(3)
    counts = np.array([algorithm.draw_counts(weights, 100, generator) for _ in range(4000)])
    covariance = 100 * (np.diag(weights) - np.outer(weights, weights))
    np.testing.assert_allclose(np.cov(counts.T), covariance, atol=1.5)


def test_draws_do_not_depend_on_the_chunk_size(monkeypatch):
    weights = random_weights(np.random.default_rng(5), 1000)
    whole = algorithm.draw_counts(weights, 5000, np.random.default_rng(6))
    monkeypatch.setattr(algorithm, "DRAWS_PER_CHUNK", 17)
    np.testing.assert_array_equal(whole, algorithm.draw_counts(weights, 5000, np.random.default_rng(6)))


def test_draws_are_the_inverse_cdf_of_the_generators_uniforms():
    weights = random_weights(np.random.default_rng(7), 200)
    uniforms = np.random.default_rng(8).random(3000)
    cumulative = np.cumsum(weights)
    drawn = [next(i for i, c in enumerate(cumulative) if u * cumulative[-1] < c) for u in uniforms]
    expected = np.bincount(drawn, minlength=200)
    np.testing.assert_array_equal(algorithm.draw_counts(weights, 3000, np.random.default_rng(8)), expected)


class FixedUniforms:
    """A generator that gives the uniforms it was made with."""

    def __init__(self, *uniforms):
        self.uniforms = uniforms

    def random(self, size):
        assert size == len(self.uniforms)
        return np.array(self.uniforms)


def test_a_uniform_on_the_border_takes_the_next_unit_with_weight():
    counts = algorithm.draw_counts([0, 0.5, 0, 0.5, 0], 2, FixedUniforms(0.0, 0.5))
    assert counts.tolist() == [0, 1, 0, 1, 0]


@given(seeds, sizes)
def test_the_largest_uniform_takes_the_last_unit_with_weight(seed, size):
    weights = random_weights(np.random.default_rng(seed), size)
    cumulative = np.cumsum(weights)
    counts = algorithm.draw_counts(weights, 1, FixedUniforms(np.nextafter(1.0, 0.0)))
    # A unit too light to move the prefix sum cannot be drawn; the last one that does can.
    assert counts[cumulative.searchsorted(cumulative[-1])] == counts.sum() == 1


@given(seeds, sizes, st.integers(0, 1000), st.sampled_from(["independent", "systematic"]))
def test_draws_add_up_and_never_take_a_unit_without_weight(seed, size, draws, method):
    generator = np.random.default_rng(seed)
    weights = random_weights(generator, size)
    counts = algorithm.draw_counts(weights, draws, generator, method)
    assert counts.sum() == draws
    assert counts.min() >= 0
    assert not counts[weights == 0].any()
    if method == "systematic":
        assert np.abs(counts - draws * weights).max() < 1 + 1e-9


def test_systematic_draws_are_unbiased():
    weights = np.array([0.05, 0.15, 0.45, 0.35])
    generator = np.random.default_rng(9)
    mean = np.mean([algorithm.draw_counts(weights, 3, generator, "systematic") for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, 3 * weights, atol=0.015)


# Weights in the loss


def test_reweighting_is_n_times_the_mixed_weights():
    weights = random_weights(np.random.default_rng(1), 30)
    in_loss = algorithm.loss_weights(weights, sampling="reweight", uniform_mix=0.5)
    np.testing.assert_allclose(in_loss, 0.5 + 0.5 * 30 * weights, rtol=1e-13)


def test_draws_for_the_loss_come_from_the_mixed_weights():
    weights = np.zeros(1000)
    weights[:500] = 1 / 500
    in_loss = algorithm.loss_weights(weights, sampling="draw", uniform_mix=0.5, generator=np.random.default_rng(2))
    expected = algorithm.draw_counts(0.5 * weights + 0.5 / 1000, 1000, np.random.default_rng(2))
    np.testing.assert_array_equal(in_loss, expected)
    assert in_loss[500:].sum() == pytest.approx(250, abs=60)


def test_draws_for_the_loss_use_the_named_method():
    in_loss = algorithm.loss_weights(
        algorithm.initial_weights(50), sampling="draw", method="systematic", generator=np.random.default_rng(2)
    )
    assert in_loss.tolist() == [1.0] * 50


def test_bagging_ignores_the_weights_and_draws_uniformly():
    one_unit = np.zeros(2000)
    one_unit[0] = 1
    in_loss = algorithm.loss_weights(one_unit, sampling="bagging", generator=np.random.default_rng(4))
    assert in_loss.sum() == 2000
    histogram = np.bincount(in_loss.astype(int), minlength=5)
    expected = 2000 * stats.poisson.pmf(range(4), 1)
    assert stats.chisquare(np.append(histogram[:4], histogram[4:].sum()),
                           np.append(expected, 2000 - expected.sum())).pvalue > 0.01  # fmt: skip


def test_deduplicated_draws_mark_the_same_units_once():
    weights = random_weights(np.random.default_rng(1), 100)
    counted, once = (
        algorithm.loss_weights(weights, sampling="draw", deduplicate=deduplicate, generator=np.random.default_rng(3))
        for deduplicate in (False, True)
    )
    assert counted.max() > 1
    np.testing.assert_array_equal(once, counted > 0)


# scikit-learn


class WatchedStump(DecisionTreeClassifier):
    """A weak learner that remembers the sample weights of every fit."""

    seen: list[np.ndarray] = []  # noqa: RUF012  (clones must share it)

    def fit(self, inputs, labels, sample_weight=None):
        self.seen.append(np.array(sample_weight))
        return super().fit(inputs, labels, sample_weight)


@pytest.mark.parametrize("learning_rate", [1.0, 0.4])
@pytest.mark.parametrize(("num_classes", "prior"), [(2, 0.5), (2, "uniform"), (4, "uniform")])
def test_equals_scikit_learns_adaboost(num_classes, prior, learning_rate):
    inputs, labels = make_classification(
        400, n_features=12, n_informative=8, n_classes=num_classes, flip_y=0.05, random_state=num_classes
    )
    WatchedStump.seen.clear()
    reference = AdaBoostClassifier(
        WatchedStump(max_depth=2), n_estimators=8, learning_rate=learning_rate, random_state=1
    ).fit(inputs, labels)
    prior_error = algorithm.prior_error(prior, num_classes=num_classes)

    weights = algorithm.initial_weights(labels.size)
    votes = np.zeros((labels.size, num_classes))
    for number, theirs in enumerate(reference.estimators_):
        np.testing.assert_allclose(weights, WatchedStump.seen[number], rtol=1e-9)
        expert = DecisionTreeClassifier(max_depth=2, random_state=theirs.random_state)
        in_loss = algorithm.loss_weights(weights, sampling="reweight")
        predicted = expert.fit(inputs, labels, in_loss / labels.size).predict(inputs)
        wrong = predicted != labels
        error = algorithm.weighted_error(weights, wrong)
        expert_weight = algorithm.expert_weight(error, prior_error)
        assert error == pytest.approx(reference.estimator_errors_[number], rel=1e-9)
        assert learning_rate * expert_weight == pytest.approx(reference.estimator_weights_[number], rel=1e-9)
        votes[np.arange(labels.size), predicted] += expert_weight
        if number + 1 < len(reference.estimators_):
            weights = algorithm.update_weights(weights, wrong, expert_weight, learning_rate)
    assert len(reference.estimators_) == 8
    np.testing.assert_array_equal(votes.argmax(axis=1), reference.predict(inputs))


# Soft errors, caps, draws of different units, fitted mixtures


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 5), seeds)
def test_a_unit_s_soft_loss_is_the_largest_of_its_tokens(lengths, window, seed):
    units = algorithm.unit_index(lengths, "window", window)
    token_losses = np.random.default_rng(seed).random(units.size).astype(np.float32)
    expected = [token_losses[units == unit].max() for unit in range(units.max() + 1)]
    losses = algorithm.unit_losses(token_losses, units)
    assert losses.dtype == np.float32
    assert losses.tolist() == expected


@given(seeds, sizes, st.floats(0.01, 8), st.floats(0.05, 1))
def test_soft_losses_of_0_and_1_are_hard_errors_and_others_follow_the_formula(seed, size, alpha, shrinkage):
    generator = np.random.default_rng(seed)
    weights, wrong = random_weights(generator, size), generator.random(size) < 0.4
    hard = algorithm.weighted_error(weights, wrong)
    assert algorithm.weighted_error(weights, wrong.astype(np.float64)) == pytest.approx(hard, abs=1e-15)
    soft = generator.random(size)
    assert algorithm.weighted_error(weights, soft) == pytest.approx(math.fsum(weights * soft), abs=1e-14)
    grown = weights * np.exp(shrinkage * alpha * soft)
    updated = algorithm.update_weights(weights, soft, alpha, shrinkage)
    np.testing.assert_allclose(updated, grown / math.fsum(grown), rtol=1e-12)
    if weights[wrong].any():
        np.testing.assert_allclose(
            algorithm.update_weights(weights, wrong.astype(np.float64), alpha, shrinkage),
            algorithm.update_weights(weights, wrong, alpha, shrinkage),
            rtol=1e-12,
        )


@given(seeds, sizes, st.floats(0.1, 8), st.floats(0.2, 0.95), st.booleans(), st.floats(0.1, 1))
def test_a_tempered_update_goes_as_far_as_the_floor_allows(seed, size, alpha, floor, soft, most):
    generator = np.random.default_rng(seed)
    uniform = algorithm.initial_weights(size)
    losses = generator.random(size) if soft else generator.random(size) < 0.2
    if not losses.any():
        losses[0] = True
    step = algorithm.tempered_shrinkage(uniform, losses, alpha, floor, most)
    assert 0 < step <= most

    def spread(shrinkage):
        return algorithm.effective_sample_size(algorithm.update_weights(uniform, losses, alpha, shrinkage)) / size

    assert spread(step) >= floor
    # From uniform weights the spread falls with every step, so a little more would be too much.
    if step < most:
        assert spread(min(most, step * (1 + 1e-4) + 1e-5)) < floor + 1e-9


def test_weights_below_the_floor_stay_where_an_update_would_spread_them_further():
    weights = np.array([0.7, 0.1, 0.1, 0.1])
    assert algorithm.tempered_shrinkage(weights, [True, False, False, False], 2.0, 0.9) == 0.0
    # An update that evens them out is taken whole.
    assert algorithm.tempered_shrinkage(weights, [False, True, True, True], 1.0, 0.6) == 1.0


@given(seeds, sizes, st.floats(1.0, 20.0))
def test_capped_weights_are_the_nearest_below_the_limit(seed, size, cap):
    generator = np.random.default_rng(seed)
    weights = np.exp(4 * generator.standard_normal(size))
    weights /= math.fsum(weights)
    capped = algorithm.cap_weights(weights, cap)
    assert abs(math.fsum(capped) - 1) < 1e-12
    limit = cap / size
    assert capped.max() <= limit * (1 + 1e-9)
    # The conditions of the optimum of KL(capped || weights): one factor for all that are below the limit, and those at
    # the limit would exceed it with that factor.
    below = capped < limit * (1 - 1e-9)
    if below.any():
        factors = capped[below] / weights[below]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-9)
        assert (weights[~below] * factors[0] >= limit * (1 - 1e-6)).all()
    unchanged = np.full(size, 1 / size)
    np.testing.assert_allclose(algorithm.cap_weights(unchanged, 1.0), unchanged, rtol=1e-12)


def test_capping_across_blocks_and_in_place(monkeypatch):
    weights = random_weights(np.random.default_rng(5), 500)
    whole = algorithm.cap_weights(weights, 3.0)
    monkeypatch.setattr(algorithm, "BLOCK", 64)
    np.testing.assert_allclose(algorithm.cap_weights(weights, 3.0), whole, rtol=1e-12)
    assert algorithm.cap_weights(weights, 3.0, out=weights) is weights
    np.testing.assert_allclose(weights, whole, rtol=1e-12)


@given(seeds, sizes, st.floats(0, 1))
def test_different_units_are_drawn_and_none_without_weight(seed, size, share):
    generator = np.random.default_rng(seed)
    weights = random_weights(generator, size)
    count = int(share * np.count_nonzero(weights))
    units = algorithm.draw_without_replacement(weights, count, generator)
    assert len(set(units.tolist())) == count == units.size
    assert (np.diff(units) > 0).all()
    assert (weights[units] > 0).all()


def test_units_are_drawn_one_after_the_other_by_weight():
    # Chances of each pair: w_i w_j / (1 - w_i) + w_j w_i / (1 - w_j).
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    generator = np.random.default_rng(11)
    counts = dict.fromkeys([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], 0)
    for _ in range(6000):
        counts[tuple(algorithm.draw_without_replacement(weights, 2, generator).tolist())] += 1
    expected = [6000 * weights[i] * weights[j] * (1 / (1 - weights[i]) + 1 / (1 - weights[j])) for i, j in counts]
    assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-3


def test_other_ways_into_the_loss():
    generator = np.random.default_rng(3)
    weights = random_weights(generator, 101)
    np.testing.assert_array_equal(algorithm.loss_weights(weights, sampling="all"), np.ones(101))
    drawn = algorithm.loss_weights(
        weights, sampling="without_replacement", draw_fraction=0.3, uniform_mix=0.5, generator=generator
    )
    assert drawn.sum() == 30
    assert set(drawn) == {0.0, 1.0}
    # The weights have their say: a unit with most of the mixed weight is nearly always there.
    heavy = np.full(100, 0.1 / 99)
    heavy[7] = 0.9
    hits = [
        algorithm.loss_weights(heavy, sampling="without_replacement", draw_fraction=0.05, generator=generator)[7]
        for _ in range(50)
    ]
    assert np.mean(hits) > 0.9


@given(seeds, st.integers(1, 6), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_fitted_mixture_weights_are_scipys_optimum(seed, experts, tokens):
    log_probs = np.log(np.random.default_rng(seed).random((experts, tokens)))
    fitted = algorithm.fit_mixture_weights(log_probs)
    assert (fitted >= 0).all()
    assert math.fsum(fitted) == pytest.approx(1, abs=1e-12)
    probs = np.exp(log_probs)
    # The conditions of the optimum of a concave function on the simplex.
    gradient = (probs / (fitted @ probs)).mean(axis=1)
    assert gradient.max() <= 1 + 1e-6
    reference = optimize.minimize(
        lambda w: -np.log(w @ probs).mean(), np.full(experts, 1 / experts), method="SLSQP",
        bounds=[(0, 1)] * experts, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    assert np.log(fitted @ probs).mean() >= -reference.fun - 1e-6


def test_an_expert_that_is_best_everywhere_gets_all_the_weight():
    log_probs = np.log([[0.9, 0.8, 0.7], [0.2, 0.1, 0.3]])
    np.testing.assert_allclose(algorithm.fit_mixture_weights(log_probs), [1, 0], atol=1e-6)
    # Very small probabilities do not become 0 / 0.
    assert algorithm.fit_mixture_weights([[-900.0, -1.0], [-1000.0, -1.0]])[0] > 0.99


# Bad input

HALVES = [0.5, 0.5]
GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: algorithm.unit_index([3], "word"), "unknown unit 'word'; choose one of 'token', 'window', 'sequence'"),
        (lambda: algorithm.unit_index([3], "window"), r"needs window >= 1 .* got None"),
        (lambda: algorithm.unit_index([3], "window", 0), "needs window >= 1 .* got 0"),
        (lambda: algorithm.unit_index([3], "token", 2), 'window=2 only applies to unit="window"'),
        (lambda: algorithm.unit_index([3, 0]), r"answer_lengths\[1\] is 0"),
        (lambda: algorithm.unit_index([]), "answer_lengths must be a non-empty vector"),
        (lambda: algorithm.unit_losses([True], [0, 0]), r"token_losses must have shape \(2,\)"),
        (lambda: algorithm.unit_losses([True, False], [0, 2]), "units must rise from 0"),
        (lambda: algorithm.initial_weights(0), "num_units must be at least 1, got 0"),
        (lambda: reweighted(HALVES, 1.0), r"uniform_mix must be in \[0, 1\), got 1.0"),
        (lambda: reweighted(HALVES, -0.1), "uniform_mix must be in"),
        (lambda: reweighted(HALVES, math.nan), "uniform_mix must be in"),
        (lambda: algorithm.effective_sample_size([1.5, -0.5]), "non-negative and not NaN, smallest is -0.5"),
        (lambda: algorithm.effective_sample_size([math.nan, 1]), "not NaN, smallest is nan"),
        (lambda: algorithm.effective_sample_size([0.5, 0.6]), "must sum to 1 within 1e-09, but the sum is 1.1"),
        (lambda: algorithm.effective_sample_size([math.inf, 0]), "the sum is inf"),
        (lambda: algorithm.effective_sample_size([[1.0]]), r"non-empty vector, got shape \(1, 1\)"),
        (lambda: algorithm.weighted_error(HALVES, [True]), r"losses must have shape \(2,\).* got \(1,\)"),
        (lambda: algorithm.clamp_error(math.nan, 5), r"error must be in \[0, 1\], got nan"),
        (lambda: algorithm.clamp_error(1.1, 5), "error must be in"),
        (lambda: algorithm.prior_error("guess"), 'prior must be "pretrained", "uniform" or a number in'),
        (lambda: algorithm.prior_error(1.0), r"a number in \(0, 1\), got 1.0"),
        (lambda: algorithm.prior_error(True), "got True"),
        (lambda: algorithm.prior_error("uniform", num_classes=4, unit="window"), 'needs unit="token", got'),
        (lambda: algorithm.prior_error("uniform"), "needs num_classes >= 2"),
        (lambda: algorithm.prior_error("pretrained"), "needs pretrained_error"),
        (lambda: algorithm.prior_error("pretrained", 1.0), "clamped by clamp_error; got 1.0"),
        (lambda: algorithm.expert_weight(0.0, 0.5), r"^error must be in \(0, 1\), got 0.0"),
        (lambda: algorithm.expert_weight(0.5, 1.0), r"^prior_error must be in \(0, 1\), got 1.0"),
        (lambda: algorithm.update_weights(HALVES, [True, False], 0.0), "no better than the prior is not added"),
        (
            lambda: algorithm.update_weights(HALVES, [True, False], math.inf),
            "expert_weight must be positive and finite",
        ),
        (lambda: algorithm.update_weights(HALVES, [True, False], 1.0, 0.0), r"shrinkage must be in \(0, 1\], got 0.0"),
        (lambda: algorithm.update_weights(HALVES, [True, False], 1.0, 1.5), "shrinkage must be in"),
        (lambda: algorithm.update_weights(HALVES, [False, False], 900.0), "leaves no weight on any unit"),
        (lambda: algorithm.draw_counts(HALVES, -1, GENERATOR), "at least 0, got -1"),
        (lambda: algorithm.draw_counts(HALVES, 1, GENERATOR, "sobol"), "choose one of 'independent', 'systematic'"),
        (lambda: algorithm.loss_weights(HALVES, sampling="boost"), "choose one of 'draw', 'without_replacement', 'rew"),
        (lambda: algorithm.loss_weights(HALVES, sampling="draw"), "sampling='draw' needs a generator"),
        (lambda: algorithm.loss_weights(HALVES, sampling="reweight", deduplicate=True), "only applies to draws"),
        (lambda: algorithm.loss_weights(HALVES, sampling="all", deduplicate=True), "only applies to draws"),
        (lambda: algorithm.loss_weights(HALVES, sampling="all", draw_fraction=0.0), r"draw_fraction must be in \(0"),
        (lambda: algorithm.unit_losses([1.5], [0]), r"token_losses must be in \[0, 1\] and not NaN"),
        (lambda: algorithm.weighted_error(HALVES, [0.5, math.nan]), r"losses must be in \[0, 1\] and not NaN"),
        (lambda: algorithm.update_weights(HALVES, [-0.1, 1.0], 1.0), "losses must be in"),
        (lambda: algorithm.tempered_shrinkage(HALVES, [True, False], 1.0, 0.0), "floor is a share of the units"),
        (lambda: algorithm.tempered_shrinkage(HALVES, [True, False], 1.0, 1.0), "floor is a share of the units"),
        (lambda: algorithm.cap_weights(HALVES, 0.9), "cap must be at least 1 .* got 0.9"),
        (lambda: algorithm.cap_weights(HALVES, math.nan), "cap must be at least 1"),
        (lambda: algorithm.cap_weights([0.0, 1.0, 0.0], 2.0), "cap=2.0 is too low: only 1 of 3 units"),
        (lambda: algorithm.draw_without_replacement([0.5, 0.5, 0.0], 3, GENERATOR), "from 0 to 2"),
        (lambda: algorithm.draw_without_replacement(HALVES, -1, GENERATOR), "size must be from 0 to 2"),
        (lambda: algorithm.fit_mixture_weights([0.0, -1.0]), r"shape \[experts, tokens\]"),
        (lambda: algorithm.fit_mixture_weights([[0.1]]), "at most 0 and not NaN"),
        (lambda: algorithm.fit_mixture_weights([[math.nan]]), "at most 0 and not NaN"),
        (lambda: algorithm.fit_mixture_weights([[-1.0, -math.inf]]), "no expert gives token 1 any probability"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: algorithm.unit_index([1.5]), "answer_lengths must hold integers"),
        (lambda: algorithm.weighted_error(HALVES, [0, 1]), "losses must be boolean .* or floats"),
        (lambda: algorithm.unit_losses([1], [0]), "token_losses must be boolean .* or floats"),
    ],
)
def test_wrong_types_are_refused_in_words(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_importing_it_needs_neither_torch_nor_transformers_nor_datasets():
    code = (
        "import sys, ensemw2s.boosting; "
        "sys.exit(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
