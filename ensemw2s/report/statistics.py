"""Statistics on measured answers: accuracies, paired differences, performance gap recovered. No model in sight.

Measurements are arrays of right (1) and wrong (0), one entry per test question, of shape `[n]`, or
`[seeds, n]` when the same questions were answered by runs with several seeds. Arms that are compared answered
the same questions in the same order, which is what makes their differences far less noisy than either accuracy.

Pooled figures take one such array per task, by the task's name; a single run is a pool of one task and one seed. Each
is the mean over tasks, which all weigh the same [choice], with the percentile bootstrap's 95% interval: questions are
resampled within each task, the same ones for all arms, and so are seeds, independently of the questions (the two-way
bootstrap of Owen, "The pigeonhole bootstrap", 2007). S seeds understate the spread between seeds by about
`sqrt((S - 1) / S)`; where the seeds of a task answered different questions, which the two-way bootstrap takes for the
same ones, the interval is wider than it need be. **Tasks are fixed, not resampled**: the interval is about these tasks
and says nothing about others.

A figure on some of the questions (`among`) counts these alone, in every resample as many of them as it drew. A resample
without any of them says nothing and is left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES_PER_CHUNK = 1000
# Draws for as many questions take 2 MB a chunk, and are kept for the next figure on them.
MOST_CACHED_QUESTIONS = 1000


class Estimate(NamedTuple):
    """A measured value and its standard error, in the same unit."""

    value: float
    standard_error: float


class Interval(NamedTuple):
    """A measured value and the ends of its 95% interval, in the same unit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PerformanceGapRecovered:
    """The share of the gap between the weak baseline and the ceiling that a student closes.

    Attributes:
        value: `(student - weak) / (ceiling - weak)`, 1 for a student as good as the ceiling; None if undefined.
        low: lower end of its 95% interval; None if undefined.
        high: upper end of its 95% interval; None if undefined.
        defined: whether the gap's interval lies above 0. Otherwise the ratio divides by noise.
        gap: `ceiling - weak`, a difference of accuracies.
        gap_low: lower end of the gap's 95% interval.
        gap_high: upper end of the gap's 95% interval.
    """

    value: float | None
    low: float | None
    high: float | None
    defined: bool
    gap: float
    gap_low: float
    gap_high: float


def accuracy(correct: ArrayLike) -> Estimate:
    """Return the share of right answers and its standard error over questions, `sqrt(p (1 - p) / (n - 1))`.

    The standard error is 0 when all answers are right or all are wrong, which leaves open what other questions bring.
    `correct` is 0/1 or bool `[n]`, n at least 2; another shape and other values raise ValueError.
    """
    outcomes = _outcomes("correct", correct)
    if outcomes.shape[0] != 1 or outcomes.shape[1] < 2:
        raise ValueError(f"correct must have shape [n] with n >= 2 questions, got {np.shape(correct)}")
    return Estimate(float(outcomes.mean()), float(outcomes[0].std(ddof=1) / math.sqrt(outcomes.shape[1])))


def token_error(wrong: Sequence[ArrayLike]) -> Estimate:
    """Return the share of wrong answer tokens, with a standard error that counts questions and not tokens.

    The tokens of one answer stand and fall together, so they are no independent samples; this is the usual
    linearised standard error of a ratio of two sums over questions. `wrong` holds, for each question, 0/1 or bool
    `[answer tokens]`, 1 where the teacher-forced argmax was wrong; fewer than two questions, a question without tokens
    and other values raise ValueError.
    """
    if len(wrong) < 2:
        raise ValueError(f"wrong must hold at least 2 questions, got {len(wrong)}")
    answers = [_outcomes(f"wrong[{i}]", bits).ravel() for i, bits in enumerate(wrong)]
    errors = np.array([bits.sum() for bits in answers])
    lengths = np.array([bits.size for bits in answers])
    rate = errors.sum() / lengths.sum()
    residuals = errors - rate * lengths
    variance = len(wrong) / (len(wrong) - 1) * np.dot(residuals, residuals) / lengths.sum() ** 2
    return Estimate(float(rate), math.sqrt(variance))


def pooled_accuracy(
    correct: Mapping[str, ArrayLike],
    *,
    among: Mapping[str, ArrayLike] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over tasks of an arm's accuracy, with its interval.

    Args:
        correct: per task, 0/1 or bool, `[n]` or `[seeds, n]`; tasks may differ in seeds and n.
        among: per task, of the same shape, 1 for the questions that count; None counts all.
        resamples: number of bootstrap samples, at least 100.
        seed: of the bootstrap; same seed, same interval.

    Raises:
        ValueError: no task, values other than 0 and 1, fewer resamples, or a task of which no question counts.
    """
    values, means = _pooled_means({"correct": correct}, resamples, seed, among)
    return Interval(float(values[0]), *_percentiles(means[:, 0]))


def pooled_difference(
    first: Mapping[str, ArrayLike],
    second: Mapping[str, ArrayLike],
    *,
    among: Mapping[str, ArrayLike] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over tasks of `accuracy(first) - accuracy(second)`, with its interval.

    The arguments are those of `pooled_accuracy`, for two arms on the same tasks, seeds and questions; other tasks or
    shapes raise ValueError as well.
    """
    values, means = _pooled_means({"first": first, "second": second}, resamples, seed, among)
    return Interval(float(values[0] - values[1]), *_percentiles(means[:, 0] - means[:, 1]))


def pooled_gap_recovered(
    weak: Mapping[str, ArrayLike],
    student: Mapping[str, ArrayLike],
    ceiling: Mapping[str, ArrayLike],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> PerformanceGapRecovered:
    """Return `PGR = (student - weak) / (ceiling - weak)` (Burns et al., 2023), of means over tasks, with its interval.

    A ratio of means and not a mean of ratios [choice], which one task with a small gap would rule. Undefined unless the
    lower end of the gap's interval is above 0. The few resamples whose gap is not positive count as an unbounded ratio
    on the side of the student's gain.

    The arguments are those of `pooled_accuracy`, for the weak baseline, the student, and the student that was taught by
    the truth, on the same tasks, seeds and questions; other tasks or shapes raise ValueError as well.
    """
    values, means = _pooled_means({"weak": weak, "student": student, "ceiling": ceiling}, resamples, seed)
    gains, gaps = means[:, 1] - means[:, 0], means[:, 2] - means[:, 0]
    gap_low, gap_high = _percentiles(gaps)
    gain, gap = float(values[1] - values[0]), float(values[2] - values[0])
    if gap_low <= 0.0:
        return PerformanceGapRecovered(None, None, None, False, gap, gap_low, gap_high)
    unbounded = np.where(gains < 0, -np.inf, np.inf)
    low, high = _percentiles(np.divide(gains, gaps, out=unbounded, where=gaps > 0))
    return PerformanceGapRecovered(gain / gap, low, high, True, gap, gap_low, gap_high)


def _pooled_means(
    arms: Mapping[str, Mapping[str, ArrayLike]],
    resamples: int,
    seed: int,
    among: Mapping[str, ArrayLike] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean accuracies over tasks, float64 [arms], and their bootstrap, float64 [resamples, arms]."""
    first, tasks = next((name, list(by_task)) for name, by_task in arms.items())
    if not tasks:
        raise ValueError(f"{first} holds no task: give the answers of at least one")
    for name, by_task in arms.items():
        if set(by_task) != set(tasks):
            raise ValueError(f"arms must have answered the same tasks, got {first} {tasks} and {name} {list(by_task)}")
    stacks = [_stack({f"{name}[{task!r}]": by_task[task] for name, by_task in arms.items()}) for task in tasks]
    counted = [np.ones(stack.shape[1:]) if among is None else _counted(among, task, stack.shape[1:])
               for task, stack in zip(tasks, stacks, strict=True)]  # fmt: skip
    # Each task has its own draws, so that chance does not move two tasks together.
    means = [_bootstrap_means(stack * counts, counts, resamples, seed, index)
             for index, (stack, counts) in enumerate(zip(stacks, counted, strict=True))]  # fmt: skip
    values = [(stack * counts).sum(axis=(1, 2)) / counts.sum() for stack, counts in zip(stacks, counted, strict=True)]
    return np.mean(values, axis=0), np.mean(means, axis=0)


def _counted(among: Mapping[str, ArrayLike], task: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    counted = _outcomes(f"among[{task!r}]", among[task]) if task in among else np.zeros(shape)
    if counted.shape != shape or not counted.any():
        raise ValueError(f"among[{task!r}] must mark some of the questions, in shape {shape}")
    return counted


def _bootstrap_means(
    outcomes: NDArray[np.float64], counted: NDArray[np.float64], resamples: int, seed: int, task: int
) -> NDArray[np.float64]:
    """Return float64 [resamples, arms]: accuracies of `outcomes` [arms, seeds, n], questions and seeds resampled.

    Outcomes that are not `counted` [seeds, n] are 0; NaN in a resample without any that is.
    """
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}")
    arms, seeds, n = outcomes.shape
    draw = _draws if n <= MOST_CACHED_QUESTIONS else _draws.__wrapped__
    means = np.empty((resamples, arms))
    for chunk, start in enumerate(range(0, resamples, RESAMPLES_PER_CHUNK)):
        size = min(RESAMPLES_PER_CHUNK, resamples - start)
        question_counts, seed_counts = draw(size, seeds, n, (seed, task, chunk))
        right = (question_counts @ outcomes.reshape(arms * seeds, n).T).reshape(size, arms, seeds)
        # Sums of whole numbers are exact, so that equal arms differ by 0 and not by a rounding that looks like a win.
        asked = np.einsum("rs,rs->r", question_counts @ counted.T, seed_counts)[:, None]
        found = np.einsum("ras,rs->ra", right, seed_counts)
        means[start : start + size] = np.divide(found, asked, out=np.full_like(found, np.nan), where=asked > 0)
    return means


@functools.lru_cache(maxsize=256)
def _draws(size: int, seeds: int, n: int, entropy: tuple[int, ...]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return how often each question [size, n] and each seed [size, seeds] is drawn in each of `size` resamples."""
    generator = np.random.default_rng(entropy)
    return _counts(generator, size, n), _counts(generator, size, seeds)


def _counts(generator: np.random.Generator, size: int, n: int) -> NDArray[np.uint16]:
    cells = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(cells.ravel(), minlength=size * n).reshape(size, n).astype(np.uint16)


def _percentiles(samples: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95% interval."""
    # "nearest" takes order statistics that mirror each other, and never interpolates with an infinite one.
    low, high = np.quantile(samples[~np.isnan(samples)], [0.025, 0.975], method="nearest")
    return float(low), float(high)


def _outcomes(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return `values` as float64 [seeds, n] after checking that they are 0 and 1 only."""
    array = np.asarray(values)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"{name} must have shape [n] or [seeds, n] and not be empty, got {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must hold 0 (wrong) and 1 (right) only")
    return np.atleast_2d(array).astype(np.float64)


def _stack(arms: dict[str, ArrayLike]) -> NDArray[np.float64]:
    outcomes = {name: _outcomes(name, values) for name, values in arms.items()}
    if len({array.shape for array in outcomes.values()}) != 1:
        shapes = ", ".join(f"{name} {np.shape(values)}" for name, values in arms.items())
        raise ValueError(f"arms must have answered the same questions with the same seeds, got shapes {shapes}")
    return np.stack(list(outcomes.values()))
