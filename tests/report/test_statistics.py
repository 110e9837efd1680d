"""Statistics on right and wrong answers, against SciPy, slow references and simulated coverage."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ensemw2s.report import statistics
from tests.many_runs import simulate as simulate_runs

seeds = st.integers(0, 2**32 - 1)


def simulate(generator, n, weak=0.3, student=0.5, ceiling=0.8):
    """Three arms that agree on the hardness of a question more than chance would."""
    hardness = generator.random(n)
    noise = 0.2 * generator.standard_normal((3, n))
    return [hardness + row < skill for row, skill in zip(noise, (weak, student, ceiling), strict=True)]


def slow_bootstrap(arms, resamples, seed):
    """Accuracies of arms [arms, seeds, n] with resampled seeds and questions, one resample at a time."""
    generator = np.random.default_rng(seed)
    _, num_seeds, n = arms.shape
    means = []
    for _ in range(resamples):
        rows, columns = generator.integers(num_seeds, size=num_seeds), generator.integers(n, size=n)
        means.append(arms[:, rows][:, :, columns].mean(axis=(1, 2)))
    return np.array(means)


def paired_difference(first, second, **settings):
    """The difference in a pool of one task."""
    return statistics.pooled_difference({"task": first}, {"task": second}, **settings)


def gap_recovered(*arms, **settings):
    return statistics.pooled_gap_recovered(*({"task": arm} for arm in arms), **settings)


# Single figures


@given(seeds, st.integers(2, 200))
def test_accuracy_has_the_standard_error_of_a_mean(seed, n):
    correct = np.random.default_rng(seed).random(n) < 0.4
    value, standard_error = statistics.accuracy(correct)
    assert value == pytest.approx(correct.mean())
    assert standard_error == pytest.approx(stats.sem(correct.astype(float)), abs=1e-15)


def test_token_error_of_one_token_answers_is_their_error_rate():
    wrong = np.random.default_rng(0).random(90) < 0.2
    expected = statistics.accuracy(wrong)
    assert statistics.token_error([[bit] for bit in wrong]) == pytest.approx(expected)


def test_token_error_counts_questions_not_tokens():
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 9, size=400)
    # All tokens of an answer are wrong together.
    wrong = [np.full(length, generator.random() < 0.6) for length in lengths]
    value, standard_error = statistics.token_error(wrong)
    assert value == pytest.approx(np.concatenate(wrong).mean())
    picks = generator.integers(400, size=(4000, 400))
    errors = np.array([bits.sum() for bits in wrong])
    resampled = errors[picks].sum(axis=1) / lengths[picks].sum(axis=1)
    assert standard_error == pytest.approx(resampled.std(), rel=0.06)
    as_if_independent = math.sqrt(value * (1 - value) / lengths.sum())
    assert standard_error > 1.5 * as_if_independent


# Differences


def test_paired_difference_equals_scipys_paired_bootstrap():
    weak, student, _ = simulate(np.random.default_rng(2), 250)
    ours = paired_difference(student, weak, resamples=40_000)
    theirs = stats.bootstrap(
        (student.astype(float), weak.astype(float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True, method="percentile", n_resamples=40_000, batch=2000, rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert ours.value == pytest.approx(student.mean() - weak.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.0041)  # one question of 250, and rounding


def test_pairing_makes_the_interval_shorter_than_unpaired_arms_would():
    weak, student, _ = simulate(np.random.default_rng(4), 300)
    shuffled = np.random.default_rng(5).permutation(weak)
    paired = paired_difference(student, weak)
    unpaired = paired_difference(student, shuffled)
    assert paired.high - paired.low < 0.85 * (unpaired.high - unpaired.low)


def test_difference_with_seeds_equals_the_slow_two_way_bootstrap():
    generator = np.random.default_rng(6)
    seed_effect = 0.2 * generator.standard_normal((2, 4, 1))
    arms = generator.random(60) + 0.1 * generator.standard_normal((2, 4, 60)) + seed_effect < 0.5
    ours = paired_difference(arms[0], arms[1], resamples=20_000)
    means = slow_bootstrap(arms, 20_000, 7)
    expected = np.quantile(means[:, 0] - means[:, 1], [0.025, 0.975])
    assert (ours.low, ours.high) == pytest.approx(expected, abs=0.008)
    one_seed = paired_difference(arms[0, 0], arms[1, 0])
    assert ours.high - ours.low > 1.1 * (one_seed.high - one_seed.low), "the spread between seeds counts"


def test_identical_seeds_add_no_uncertainty_and_no_certainty():
    weak, student, _ = simulate(np.random.default_rng(8), 200)
    one = paired_difference(student, weak, resamples=20_000)
    repeated = paired_difference(np.tile(student, (5, 1)), np.tile(weak, (5, 1)), resamples=20_000)
    assert repeated == pytest.approx(one, abs=0.0051)


def test_ninety_five_percent_intervals_cover_the_truth_about_that_often():
    generator = np.random.default_rng(9)
    population = np.array(simulate(generator, 400_000)).astype(float)
    weak, student, ceiling = population.mean(axis=1)
    truth_difference, truth_recovered = student - weak, (student - weak) / (ceiling - weak)
    covered = np.zeros(2)
    for trial in range(400):
        sample = population[:, generator.integers(population.shape[1], size=120)]
        difference = paired_difference(sample[1], sample[0], resamples=600, seed=trial)
        recovered = gap_recovered(*sample, resamples=600, seed=trial)
        covered += (
            difference.low <= truth_difference <= difference.high,
            recovered.low <= truth_recovered <= recovered.high,
        )
    # 95% of 400 trials with 3 binomial standard errors, and a little less for percentile intervals of 120 questions.
    assert (covered / 400 > 0.91).all()
    assert (covered / 400 < 0.985).all()


# Performance gap recovered


def test_recovered_share_and_interval_equal_a_slow_bootstrap():
    arms = np.array(simulate(np.random.default_rng(10), 150))
    recovered = gap_recovered(*arms, resamples=20_000)
    weak, student, ceiling = arms.mean(axis=1)
    assert recovered.defined
    assert recovered.value == pytest.approx((student - weak) / (ceiling - weak))
    assert recovered.gap == pytest.approx(ceiling - weak)
    means = slow_bootstrap(arms[:, None], 20_000, 11)
    gaps = means[:, 2] - means[:, 0]
    assert (recovered.low, recovered.high) == pytest.approx(
        np.quantile((means[:, 1] - means[:, 0]) / gaps, [0.025, 0.975]), abs=0.015
    )
    assert (recovered.gap_low, recovered.gap_high) == pytest.approx(np.quantile(gaps, [0.025, 0.975]), abs=0.0068)


def test_the_ends_of_the_scale():
    weak, _, ceiling = simulate(np.random.default_rng(12), 150)
    all_of_it = gap_recovered(weak, ceiling, ceiling)
    nothing = gap_recovered(weak, weak, ceiling)
    assert (all_of_it.value, all_of_it.low, all_of_it.high) == (1, 1, 1)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_undefined_where_the_gap_may_be_nothing():
    generator = np.random.default_rng(13)
    weak, ceiling = generator.random((2, 100)) < [[0.5], [0.55]]
    recovered = gap_recovered(weak, generator.random(100) < 0.9, ceiling)
    assert recovered.gap_low <= 0
    assert (recovered.defined, recovered.value, recovered.low, recovered.high) == (False, None, None, None)
    worse = gap_recovered(np.ones(50), np.ones(50), np.zeros(50))
    assert not worse.defined
    assert worse.gap == -1


@given(seeds, st.integers(2, 40), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_never_a_nan_or_an_infinity(seed, n, weak, student, ceiling):
    arms = np.random.default_rng(seed).random((3, n)) < [[weak], [student], [ceiling]]
    recovered = gap_recovered(*arms, resamples=200, seed=seed % 1000)
    json.dumps(dataclasses.asdict(recovered), allow_nan=False)
    assert recovered.defined == (recovered.gap_low > 0) == (recovered.value is not None)
    if recovered.defined:
        assert recovered.low <= recovered.high


def test_same_seed_same_interval():
    weak, student, ceiling = simulate(np.random.default_rng(14), 80)
    first, again, other = (gap_recovered(weak, student, ceiling, resamples=301, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


# Pooled over tasks


def several_tasks(seed):
    """Weak, student and ceiling on tasks of different seeds and numbers of questions: per arm {task: [seeds, n]}."""
    generator = np.random.default_rng(seed)
    shapes = {"short": (2, 30), "long": (5, 90), "alone": (1, 60)}
    arms = {task: simulate_runs(generator, (0.3, 0.45, 0.8), *shape, spread=0.3) for task, shape in shapes.items()}
    return [{task: by_arm[i] for task, by_arm in arms.items()} for i in range(3)]


def slow_pooled(arms, resamples, seed):
    """Mean accuracies over tasks [resamples, arms], each task resampled by itself."""
    by_task = [
        slow_bootstrap(np.stack([arm[task] for arm in arms]), resamples, [seed, index])
        for index, task in enumerate(arms[0])
    ]
    return np.mean(by_task, axis=0)


def test_pooled_figures_equal_a_slow_bootstrap_within_tasks():
    weak, student, ceiling = several_tasks(20)
    means = slow_pooled((weak, student, ceiling), 20_000, 21)

    def ends(samples):
        return pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=0.007)

    difference = statistics.pooled_difference(student, weak, resamples=20_000)
    assert difference.value == pytest.approx(np.mean([student[task].mean() - weak[task].mean() for task in weak]))
    assert (difference.low, difference.high) == ends(means[:, 1] - means[:, 0])
    accuracy = statistics.pooled_accuracy(ceiling, resamples=20_000)
    assert accuracy.value == pytest.approx(np.mean([answers.mean() for answers in ceiling.values()]))
    assert (accuracy.low, accuracy.high) == ends(means[:, 2])
    recovered = statistics.pooled_gap_recovered(weak, student, ceiling, resamples=20_000)
    gain, gap = (np.mean([more[task].mean() - weak[task].mean() for task in weak]) for more in (student, ceiling))
    assert recovered.value == pytest.approx(gain / gap)
    assert (recovered.gap_low, recovered.gap_high) == ends(means[:, 2] - means[:, 0])
    ratios = (means[:, 1] - means[:, 0]) / (means[:, 2] - means[:, 0])
    assert (recovered.low, recovered.high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.015)


def test_figures_on_some_questions_equal_a_slow_bootstrap_of_these():
    weak, student, _ = several_tasks(30)
    generator = np.random.default_rng(31)
    # Other questions with every seed, in some tasks few of them.
    among = {task: generator.random(answers.shape) < 0.4 for task, answers in weak.items()}
    samples = []
    for _ in range(6000):
        moves = []
        for task, counted in among.items():
            seeds, n = counted.shape
            rows, columns = generator.integers(seeds, size=seeds), generator.integers(n, size=n)
            drawn = counted[rows][:, columns]
            first, second = (arm[task][rows][:, columns][drawn] for arm in (student, weak))
            moves.append(first.mean() - second.mean())
        samples.append(np.mean(moves))
    found = statistics.pooled_difference(student, weak, among=among, resamples=20_000)
    assert found.value == pytest.approx(
        np.mean([student[task][c].mean() - weak[task][c].mean() for task, c in among.items()])
    )
    assert (found.low, found.high) == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=0.02)


def test_all_questions_are_the_whole():
    weak, student, _ = several_tasks(32)
    everything = {task: np.ones(answers.shape) for task, answers in weak.items()}
    assert statistics.pooled_difference(student, weak, among=everything) == statistics.pooled_difference(student, weak)


def test_resamples_without_any_of_the_questions_say_nothing():
    answers, one = np.zeros((1, 20)), np.zeros((1, 20))
    answers[0, 3] = one[0, 3] = 1
    assert statistics.pooled_accuracy({"a": answers}, among={"a": one}) == (1.0, 1.0, 1.0)


def test_seeds_are_resampled():
    # Every seed is right on all questions or on none: the spread is one between seeds alone.
    half = {"task": np.repeat([[1], [1], [0], [0]], 30, axis=1)}
    assert statistics.pooled_accuracy(half) == (0.5, 0.0, 1.0)
    assert statistics.pooled_difference(half, {"task": np.zeros((4, 30))}) == (0.5, 0.0, 1.0)


def test_tasks_are_fixed():
    right, wrong = np.ones((2, 20)), np.zeros((2, 20))
    won_and_lost = statistics.pooled_difference({"a": right, "b": wrong}, {"a": wrong, "b": right})
    assert won_and_lost == (0.0, 0.0, 0.0), "resampled tasks would give an interval from -1 to 1"


def test_tasks_are_resampled_apart():
    weak, student, _ = (arm["long"] for arm in several_tasks(23))
    one = statistics.pooled_difference({"a": student}, {"a": weak})
    four = statistics.pooled_difference(dict.fromkeys("abcd", student), dict.fromkeys("abcd", weak))
    assert four.value == pytest.approx(one.value)
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.05)


def test_tasks_weigh_the_same_whatever_their_size():
    answers = {"short": np.ones(10), "long": np.zeros((5, 400))}
    assert statistics.pooled_accuracy(answers).value == 0.5


def test_figures_on_the_same_questions_share_their_draws(monkeypatch):
    weak, student, ceiling = several_tasks(24)
    forth, back = statistics.pooled_difference(student, weak), statistics.pooled_difference(weak, student)
    assert forth == (-back.value, -back.high, -back.low)
    recovered = statistics.pooled_gap_recovered(weak, student, ceiling)
    assert statistics.pooled_difference(ceiling, weak) == (recovered.gap, recovered.gap_low, recovered.gap_high)
    monkeypatch.setattr(statistics, "MOST_CACHED_QUESTIONS", 0)
    assert statistics.pooled_difference(student, weak) == forth, "draws that are not kept are the same"


def test_equal_resamples_differ_by_exactly_nothing():
    generator = np.random.default_rng(25)
    second = generator.random((3, 47)) < 0.4
    first = second.copy()
    first[:, np.flatnonzero(~second.any(axis=0))[0]] = True
    difference = paired_difference(first, second)
    # That question is in no resample of more than a third of them.
    assert difference.value == pytest.approx(1 / 47)
    assert difference.low == 0.0


@pytest.mark.parametrize(("seeds_by_task", "fresh_questions"), [((4, 5, 6), False), ((5, 5, 5), True)])
def test_pooled_intervals_cover_the_truth_about_as_often_as_they_say(seeds_by_task, fresh_questions):
    generator = np.random.default_rng(26)
    skills, covered, trials = ((0.3, 0.45), (0.5, 0.6), (0.7, 0.75)), 0, 400
    truth = np.mean([second - first for first, second in skills])
    for trial in range(trials):
        first, second = {}, {}
        for task, (skill, seeds) in enumerate(zip(skills, seeds_by_task, strict=True)):
            # So wide a spread between seeds that intervals which ignore it cover the truth in 54% of the trials.
            if fresh_questions:
                runs = [simulate_runs(generator, skill, 1, 40, spread=0.4) for _ in range(seeds)]
                first[task], second[task] = np.concatenate(runs, axis=1)
            else:
                first[task], second[task] = simulate_runs(generator, skill, seeds, 40, spread=0.4)
        difference = statistics.pooled_difference(second, first, resamples=400, seed=trial)
        covered += difference.low <= truth <= difference.high
    # 95% within 3 binomial standard errors, and a little less: five seeds understate the spread between seeds by 11%.
    assert 0.9 < covered / trials < 0.985


def test_a_pooled_gap_that_may_be_nothing_leaves_the_ratio_undefined():
    generator = np.random.default_rng(27)
    weak, ceiling = ({task: generator.random((2, 40)) < skill for task in "ab"} for skill in (0.5, 0.52))
    recovered = statistics.pooled_gap_recovered(weak, weak, ceiling)
    assert recovered.gap_low <= 0
    assert (recovered.defined, recovered.value, recovered.low, recovered.high) == (False, None, None, None)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.accuracy([1]), "n >= 2 questions"),
        (lambda: statistics.accuracy([[1, 0], [0, 1]]), r"correct must have shape \[n\]"),
        (lambda: statistics.accuracy([0.5, 1]), r"correct must hold 0 \(wrong\) and 1 \(right\) only"),
        (lambda: statistics.accuracy([math.nan, 1]), "correct must hold 0"),
        (lambda: statistics.accuracy([]), "not be empty"),
        (lambda: statistics.token_error([[1]]), "at least 2 questions, got 1"),
        (lambda: statistics.token_error([[1], []]), r"wrong\[1\] must have shape"),
        (lambda: paired_difference([1, 0], [1]), r"same questions.*first\['task'\] \(2,\), second\['task'\] \(1,\)"),
        (lambda: paired_difference([1, 0], [1, 0], resamples=10), "resamples must be at least 100, got 10"),
        (lambda: gap_recovered([1, 0], [1, 2], [1, 1]), r"student\['task'\] must hold 0"),
        (lambda: statistics.pooled_accuracy({}), "correct holds no task: give the answers of at least one"),
        (lambda: statistics.pooled_accuracy({"a": [0, 2]}), r"correct\['a'\] must hold 0"),
        (
            lambda: statistics.pooled_difference({"a": [0]}, {"b": [0]}),
            r"same tasks, got first \['a'\] and second \['b'\]",
        ),
        (
            lambda: statistics.pooled_difference({"a": [0, 1]}, {"a": [0]}),
            r"same questions.*first\['a'\] \(2,\), second\['a'\] \(1,\)",
        ),
        (lambda: statistics.pooled_accuracy({"a": [0, 1]}, resamples=-1), "resamples must be at least 100, got -1"),
        (lambda: statistics.pooled_accuracy({"a": [0, 1]}, among={"a": [0, 0]}), r"among\['a'\] must mark some"),
        (lambda: statistics.pooled_accuracy({"a": [0, 1]}, among={"b": [1, 0]}), r"among\['a'\] must mark some"),
        (lambda: statistics.pooled_accuracy({"a": [0, 1]}, among={"a": [1]}), r"in shape \(1, 2\)"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
