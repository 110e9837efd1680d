"""Token-level boosting as pure functions on NumPy arrays: Phase 1 of EnsemW2S, with no model in sight.

The *unit* of boosting is an answer token, a window of consecutive answer tokens, or a whole answer. `N`
units carry float64 weights `D` (`unit_weights`), `[N]`, non-negative and summing to 1. One round reads::

    D    = initial_weights(N)                                     # round 1 only
    w    = loss_weights(D, sampling="draw", generator=generator)  # per-unit weights in the training loss
    ...                                                           # train the expert, measure its loss on each unit
    e, _ = clamp_error(weighted_error(D, losses), N)
    a    = expert_weight(e, e_0)                                  # e_0 = prior_error(...), measured once
    D    = update_weights(D, losses, a)                           # only if a > 0

A unit's *loss* is in [0, 1]: whether it is wrong (the paper's, bool), or `1 - p(gold)` (a soft error, float).

Sources: EnsemW2S (Agrawal et al., Findings of ACL 2026; arXiv 2410.04571) for the token weights, the
weighted draw and the prior term; SAMME (Zhu et al., "Multi-class AdaBoost", Statistics and Its Interface 2,
2009) for the multi-class expert weight; discrete AdaBoost (Freund and Schapire, 1997) for the two-class
case. Where the paper is silent, the docstring marks our choice with [choice].

Arrays may be memory-mapped (`np.memmap`), also those given as `out`: they are worked through in blocks, so that
beside the result little memory is used, however large N is. Only `weight_quantiles` holds all the weights at once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemw2s.runtime.values import require_numbers, shown

Unit = Literal["token", "window", "sequence"]
Sampling = Literal["draw", "without_replacement", "reweight", "bagging", "all"]
DrawMethod = Literal["independent", "systematic"]
Prior = Literal["pretrained", "uniform"] | float

SUM_TOLERANCE = 1e-9
# Elements of an array that are worked on at once.
BLOCK = 1 << 20
# Draws are made in chunks of 128 MB; each chunk is one pass over the prefix sum, which is nowhere held as a whole.
DRAWS_PER_CHUNK = 1 << 24
# Partial sums of about sqrt(1e8) terms keep the rounding error of a 1e8-term prefix sum near 1e-14. Divides BLOCK.
PREFIX_SUM_BLOCK = 1 << 14
# Keeps the systematic offset clear of the cell borders, where rounding in the prefix sum would decide.
SYSTEMATIC_MARGIN = 1e-6


def unit_index(answer_lengths: ArrayLike, unit: Unit = "token", window: int | None = None) -> NDArray[np.int64]:
    """Number the boosting unit of every answer token.

    Args:
        answer_lengths: answer tokens of each example, integers `[num_examples]`, all at least 1.
        unit: `"token"` (the paper's), `"window"` (`window` consecutive tokens of one answer share a
            unit; the last window of an answer may be shorter) or `"sequence"` (one unit per answer). The
            coarser units are a [choice]; the paper boosts tokens.
        window: tokens per window, at least 1; given exactly when `unit="window"`.

    Returns:
        int64 `[n_tokens]` in dataset order, rising from 0 to `N - 1` without gaps; a unit never spans two
        answers.

    Raises:
        ValueError: unknown `unit`, a missing or superfluous `window`, a length or window below 1.
        TypeError: lengths that are not integers.
    """
    _check_choice("unit", unit, Unit)
    lengths = _integer_vector("answer_lengths", answer_lengths)
    if lengths.min() < 1:
        example = int(lengths.argmin())
        raise ValueError(
            f"answer_lengths[{example}] is {lengths[example]}; every answer needs at least one token: "
            "drop the examples without an answer"
        )
    if unit == "window":
        if window is not None:
            require_numbers(whole=True, window=window)
        if window is None or window < 1:
            raise ValueError(f'unit="window" needs window >= 1 (tokens per window), got {window}')
        units_per_answer = -(-lengths // window)
    elif window is not None:
        raise ValueError(f'window={window} only applies to unit="window", but unit={unit!r}: leave it out')
    if unit == "token":
        return np.arange(lengths.sum(), dtype=np.int64)
    if unit == "sequence":
        return np.repeat(np.arange(lengths.size, dtype=np.int64), lengths)
    first_token = np.cumsum(lengths) - lengths
    first_unit = np.cumsum(units_per_answer) - units_per_answer
    position = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(first_token, lengths)
    index: NDArray[np.int64] = np.repeat(first_unit, lengths) + position // window
    return index


def unit_losses(token_losses: ArrayLike, units: ArrayLike) -> NDArray[Any]:
    """Return each unit's loss, the largest of its tokens': wrong if one of them is [choice].

    Args:
        token_losses: `[n_tokens]`; bool, True where the teacher-forced argmax is not the answer's token, or floats in
            [0, 1].
        units: int64 `[n_tokens]` from `unit_index`.

    Returns:
        `[N]`, of the dtype of `token_losses`.

    Raises:
        ValueError: different lengths, floats outside [0, 1], or unit numbers that do not rise from 0 without gaps.
        TypeError: `token_losses` are neither bool nor floats, or `units` not integers.
    """
    unit_numbers = _integer_vector("units", units)
    of_tokens = _losses("token_losses", token_losses, unit_numbers.size)
    last = -1
    for part in _blocks(unit_numbers.size):
        steps = np.diff(unit_numbers[part], prepend=last)
        # The first unit is number 0: a step of 1 from -1.
        if np.any((steps != 0) & (steps != 1)) or (last == -1 and steps[0] != 1):
            raise ValueError("units must rise from 0 in steps of 0 or 1, as unit_index returns them")
        last = unit_numbers[part][-1]
    losses = np.zeros(last + 1, dtype=of_tokens.dtype)
    for part in _blocks(unit_numbers.size):
        np.maximum.at(losses, unit_numbers[part], of_tokens[part])
    return losses


def initial_weights(num_units: int, out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """`D_1 = 1/N` for every unit: float64 `[num_units]`, in `out` if given. Raises ValueError if `num_units < 1`."""
    _check_num_units(num_units)
    result = _result(out, num_units)
    result[:] = 1.0 / num_units
    return result


def effective_sample_size(unit_weights: ArrayLike) -> float:
    """Kish's effective number of units, `1 / sum(D^2)`: N under uniform weights, 1 if one unit has it all.

    Raises ValueError if the weights (float64 `[N]`) are no distribution.
    """
    distribution = _distribution(unit_weights)
    return float(1.0 / np.dot(distribution, distribution))


def weight_quantiles(unit_weights: ArrayLike, probabilities: Sequence[float]) -> NDArray[np.float64]:
    """Quantiles of `N * D`, whose mean is 1: float64, one per entry of `probabilities` (numbers in [0, 1]).

    Interpolated linearly between neighbouring weights, as `np.quantile` does by default. One copy of the weights is
    held in memory. Raises ValueError if the weights (float64 `[N]`) are no distribution.
    """
    distribution = np.array(_distribution(unit_weights))
    quantiles: NDArray[np.float64] = np.quantile(distribution, probabilities, overwrite_input=True)
    return quantiles * distribution.size


def weighted_error(unit_weights: ArrayLike, losses: ArrayLike) -> float:
    """The expert's error under the current weights, `e_t = sum(D_t * loss)`, in [0, 1].

    The paper's weighted token error; also `e_0` when `losses` belong to the pre-trained model and the
    weights are uniform.

    Args:
        unit_weights: `D_t`, float64 `[N]`, summing to 1.
        losses: `[N]`; bool (wrong or not), or floats in [0, 1].

    Raises:
        ValueError: weights that are no distribution, losses of another length or outside [0, 1].
        TypeError: `losses` are neither bool nor floats.
    """
    distribution = _distribution(unit_weights)
    of_units = _losses("losses", losses, distribution.size)
    parts = [(distribution[part], of_units[part]) for part in _blocks(distribution.size)]
    # Indexing before summing keeps NumPy's pairwise summation, which sum(where=...) gives up.
    hard = of_units.dtype == np.bool_
    return min(1.0, math.fsum((own[losses] if hard else own * losses).sum() for own, losses in parts))


def clamp_error(error: float, num_units: int) -> tuple[float, bool]:
    """Move an error of 0 or 1 to the nearest value that gives a finite expert weight [choice].

    Args:
        error: weighted error in [0, 1].
        num_units: `N`; the limits are `1/2N` and `1 - 1/2N`, half a unit of uniform weight.

    Returns:
        The error within the limits, and whether it had to be moved.

    Raises:
        ValueError: `error` outside [0, 1] or NaN, or `num_units < 1`.
    """
    _check_num_units(num_units)
    require_numbers(error=error)
    if not 0.0 <= error <= 1.0:
        raise ValueError(f"error must be in [0, 1], got {error}")
    margin = 0.5 / num_units
    clamped = min(max(error, margin), 1.0 - margin)
    return clamped, clamped != error


def prior_error(
    prior: Prior,
    pretrained_error: float | None = None,
    num_classes: int | None = None,
    unit: Unit = "token",
) -> float:
    """The error `e_0` of the guess that an expert has to beat.

    Args:
        prior: `"pretrained"`: the error of the model before fine-tuning (the paper's prior term);
            `"uniform"`: a uniform guess among `num_classes`, `e_0 = 1 - 1/K`, which makes the expert
            weight SAMME's (one token only: a uniform guess of a window has no such simple error); or the
            error itself, a number in (0, 1) (0.5 gives discrete AdaBoost on two classes).
        pretrained_error: the pre-trained model's error in the chosen unit, already through
            `clamp_error`; read only for `"pretrained"`.
        num_classes: `K`, at least 2, usually the size of the vocabulary; read only for `"uniform"`.
        unit: the boosting unit.

    Returns:
        `e_0` in (0, 1).

    Raises:
        ValueError: an unknown name, a number outside (0, 1), `"uniform"` with a coarser unit or without
            `num_classes`, `"pretrained"` without a clamped `pretrained_error`.
    """
    _check_choice("unit", unit, Unit)
    if isinstance(prior, str) and prior == "pretrained":
        if pretrained_error is None or not 0.0 < pretrained_error < 1.0:
            raise ValueError(
                'prior="pretrained" needs pretrained_error in (0, 1), measured before fine-tuning and '
                f"clamped by clamp_error; got {pretrained_error}"
            )
        return float(pretrained_error)
    if isinstance(prior, str) and prior == "uniform":
        if unit != "token":
            raise ValueError(
                f'prior="uniform" needs unit="token", got unit={unit!r}: use prior="pretrained" or a number'
            )
        if num_classes is None or num_classes < 2:
            raise ValueError(
                f'prior="uniform" needs num_classes >= 2 (for instance the size of the vocabulary), got {num_classes}'
            )
        return 1.0 - 1.0 / num_classes
    if isinstance(prior, bool) or not isinstance(prior, numbers.Real) or not 0.0 < prior < 1.0:
        raise ValueError(f'prior must be "pretrained", "uniform" or a number in (0, 1), got {shown(prior)}')
    return float(prior)


def expert_weight(error: float, prior_error: float) -> float:
    """The expert's weight `a_t = log((1 - e_t)/e_t) + log(1/(1 - e_0) - 1)` in natural-log units (nats).

    This is the paper's prior-corrected weight: the second term takes the place of SAMME's `log(K - 1)` and
    equals it for `e_0 = 1 - 1/K`. It is positive exactly when `error < prior_error`; an expert whose
    weight is not positive is worse than no training and must not be added. For `e_0 = 0.5` it is twice the
    textbook's AdaBoost coefficient, as in scikit-learn.

    Raises:
        ValueError: either error outside (0, 1); see `clamp_error`.
    """
    require_numbers(error=error, prior_error=prior_error)
    for name, value in (("error", error), ("prior_error", prior_error)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be in (0, 1), got {value}: pass it through clamp_error first")
    # 1/(1 - e_0) - 1 = e_0/(1 - e_0); this form loses no digits for e_0 near 0.
    return math.log1p(-error) - math.log(error) + math.log(prior_error) - math.log1p(-prior_error)


def update_weights(
    unit_weights: ArrayLike,
    losses: ArrayLike,
    expert_weight: float,
    shrinkage: float = 1.0,
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Raise the weights of the units that the new expert gets wrong.

    The paper's `D_{t+1} = D_t exp(a_t 1[wrong]) / Z_t`, with `s a_t` in the place of `a_t`, and the unit's loss in
    the place of `1[wrong]` where it is soft. With hard errors, `s = 1` and an error that was not clamped, the expert's
    error under the new weights is exactly `e_0`; with shrinkage it is `exp(s a_t) e_t / (exp(s a_t) e_t + 1 - e_t)`.

    Args:
        unit_weights: `D_t`, float64 `[N]`, summing to 1.
        losses: `[N]`; bool (wrong or not, the paper's), or floats in [0, 1] [choice].
        expert_weight: `a_t` > 0, from `expert_weight`.
        shrinkage: `s` in (0, 1] [choice; the paper has 1]. It acts on the update alone, `a_t` stays what
            it is in the mixture.
        out: float64 `[N]`, where to put the result; None makes a new array.

    Returns:
        `D_{t+1}`, float64 `[N]`, summing to 1.

    Raises:
        ValueError: weights that are no distribution, losses or an `out` of another length, losses outside [0, 1],
            `expert_weight` not positive and finite, `shrinkage` outside (0, 1].
        TypeError: `losses` are neither bool nor floats.
    """
    distribution = _distribution(unit_weights)
    of_units = _losses("losses", losses, distribution.size)
    require_numbers(expert_weight=expert_weight, shrinkage=shrinkage)
    if not (math.isfinite(expert_weight) and expert_weight > 0.0):
        raise ValueError(
            f"expert_weight must be positive and finite, got {expert_weight}: an expert that is no better "
            "than the prior is not added"
        )
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}; 1 is the paper's full update")
    # Scaling the right units down is the same update as scaling the wrong ones up, and cannot overflow.
    step = -shrinkage * expert_weight
    updated = _result(out, distribution.size)
    for part in _blocks(distribution.size):
        if of_units.dtype == np.bool_:
            updated[part] = np.where(of_units[part], distribution[part], distribution[part] * math.exp(step))
        else:
            updated[part] = distribution[part] * np.exp(step * (1.0 - of_units[part].astype(np.float64)))
    total = updated.sum()
    if total == 0.0:
        raise ValueError(
            f"expert_weight={expert_weight} leaves no weight on any unit: the expert is wrong nowhere and "
            "its error was not clamped by clamp_error"
        )
    updated /= total
    return updated


def tempered_shrinkage(
    unit_weights: ArrayLike, losses: ArrayLike, expert_weight: float, floor: float, shrinkage: float = 1.0
) -> float:
    """Return the largest shrinkage, up to `shrinkage`, that leaves an effective sample size of `floor` [choice].

    How far `exp(s a_t loss)` moves the weights depends on the prior error, on the model and on the task; this fixes the
    outcome instead of the factor, as annealed samplers choose their temperatures (Del Moral, Doucet and Jasra, "An
    adaptive sequential Monte Carlo method", 2012). Found by bisection, to 1e-6 of `shrinkage`.

    Args:
        unit_weights: `D_t`, float64 `[N]`, summing to 1.
        losses: `[N]`, as `update_weights` takes them.
        expert_weight: `a_t` > 0.
        floor: the smallest effective sample size of `D_{t+1}`, as a share of N, in (0, 1).
        shrinkage: the most that is wanted, in (0, 1].

    Returns:
        `s` in [0, shrinkage]: 0 where `D_t` itself is below the floor and no smaller step helps.

    Raises:
        ValueError: `floor` outside (0, 1), or whatever `update_weights` refuses.
    """
    require_numbers(floor=floor, shrinkage=shrinkage)
    if not 0.0 < floor < 1.0:
        raise ValueError(f"floor is a share of the units, in (0, 1), got {floor}")
    distribution = _distribution(unit_weights)
    updated = np.empty(distribution.size)

    def is_enough(step: float) -> bool:
        update_weights(distribution, losses, expert_weight, step, out=updated)
        return effective_sample_size(updated) >= floor * distribution.size

    if is_enough(shrinkage):
        return shrinkage
    low, high = 0.0, shrinkage
    while high - low > 1e-6 * shrinkage:
        middle = (low + high) / 2
        low, high = (middle, high) if is_enough(middle) else (low, middle)
    return low


def cap_weights(unit_weights: ArrayLike, cap: float, out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Limit every weight to `cap / N` and give what is cut off to the others, in proportion to theirs [choice].

    That is the distribution within the limit which is closest to `unit_weights` in `KL(. || unit_weights)`.

    Args:
        unit_weights: float64 `[N]`, summing to 1.
        cap: largest weight as a multiple of the uniform one, at least 1 (which leaves uniform weights).
        out: float64 `[N]`, where to put the result (`unit_weights` itself is allowed); None makes a new array.

    Raises:
        ValueError: weights that are no distribution, an `out` of another length, a `cap` below 1, or so many weights
            of zero that the others cannot take it all.
    """
    distribution = _distribution(unit_weights)
    require_numbers(cap=cap)
    if not cap >= 1.0:
        raise ValueError(f"cap must be at least 1 (the uniform weight), got {cap}")
    limit, scale = cap / distribution.size, 1.0
    # Raising the others may lift more of them to the limit; each pass caps at least one more, in practice a few do.
    while True:
        at_limit, sums = 0, []
        for part in _blocks(distribution.size):
            scaled = distribution[part] * scale
            below = scaled < limit
            at_limit += scaled.size - int(below.sum())
            sums.append(scaled[below].sum())
        rest = math.fsum(sums)
        if rest == 0.0 and at_limit * limit < 1.0 - SUM_TOLERANCE:
            raise ValueError(
                f"cap={cap} is too low: only {at_limit} of {distribution.size} units have a weight above 0"
            )
        grown = scale if rest == 0.0 else scale * (1.0 - at_limit * limit) / rest
        if grown <= scale * (1.0 + 1e-12):
            break
        scale = grown
    capped = _result(out, distribution.size)
    for part in _blocks(distribution.size):
        np.minimum(distribution[part] * scale, limit, out=capped[part])
    capped /= capped.sum()
    return capped


def fit_mixture_weights(
    log_probs: ArrayLike, *, step_size: float = 1.0, tolerance: float = 1e-9, max_steps: int = 10_000
) -> NDArray[np.float64]:
    """Fit the weights of a mixture to held-out answers by exponentiated gradient [choice].

    Maximises the mixture's mean log-likelihood `L(w) = mean_j log sum_t w_t p_t(y_j)`, which is concave, over the
    simplex: `w_t <- w_t exp(step_size * dL/dw_t) / Z` (Kivinen and Warmuth, "Exponentiated gradient versus gradient
    descent for linear predictors", 1997), from uniform weights. A step that lowers L is halved.

    Args:
        log_probs: log-probabilities (nats) of the n gold tokens under each of T experts, floats `[T, n]`, at most 0.
        step_size: of the first step; the gradient's entries sum to T under uniform weights.
        tolerance: stop when no weight can gain more than this: `max_t dL/dw_t - 1`, the duality gap in nats.
        max_steps: at most.

    Returns:
        float64 `[T]`, non-negative and summing to 1.

    Raises:
        ValueError: a setting out of range, another shape, a value above 0 or NaN, or a token to which no expert gives
            any probability.
    """
    require_numbers(step_size=step_size, tolerance=tolerance)
    require_numbers(whole=True, max_steps=max_steps)
    if not (0.0 < step_size < math.inf and tolerance >= 0.0 and max_steps >= 1):
        raise ValueError(
            "step_size must be above 0 and finite, tolerance at least 0 and max_steps at least 1, got "
            f"{step_size}, {tolerance} and {max_steps}"
        )
    table = _floats("log_probs", log_probs)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"log_probs must have shape [experts, tokens] and not be empty, got {table.shape}")
    # Rounding in float32 can leave a log-probability a little above 0.
    if not (table <= 1e-6).all():
        raise ValueError("log_probs must be log-probabilities, at most 0 and not NaN")
    highest = table.max(axis=0)
    if np.isneginf(highest).any():
        token = int(np.isneginf(highest).argmax())
        raise ValueError(f"no expert gives token {token} any probability: the likelihood is 0 whatever the weights")
    # Dividing a token's probabilities by their largest changes L by a constant.
    ratios = np.exp(table - highest)
    expert_weights = np.full(table.shape[0], 1.0 / table.shape[0])
    likelihood = np.log(expert_weights @ ratios).mean()
    for _ in range(max_steps):
        gradient = (ratios / (expert_weights @ ratios)).mean(axis=1)
        if gradient.max() - 1.0 <= tolerance:
            break
        proposed = expert_weights * np.exp(step_size * (gradient - gradient.max()))
        proposed /= proposed.sum()
        reached = np.log(proposed @ ratios).mean()
        if reached < likelihood:
            step_size /= 2
            continue
        expert_weights, likelihood = proposed, reached
    return expert_weights


def draw_counts(
    unit_weights: ArrayLike, size: int, generator: np.random.Generator, method: DrawMethod = "independent"
) -> NDArray[np.int64]:
    """Draw units with replacement and count how often each came up.

    Both methods invert the cumulative distribution on a float64 prefix sum, for any number of units
    (`torch.multinomial` refuses more than 2^24). A unit of weight zero is never drawn.

    Args:
        unit_weights: float64 `[N]`, summing to 1.
        size: number of draws, at least 0.
        generator: source of randomness; the counts depend on nothing but its state and the other arguments.
        method: `"independent"` (the paper's weighted sampling: `size` independent uniforms) or
            `"systematic"` (one uniform offset and equal steps: each count is `size * D` rounded up or
            down, and uniform weights give exactly one of each).

    Returns:
        int64 `[N]`, summing to `size`.

    Raises:
        ValueError: weights that are no distribution, a negative `size`, an unknown `method`.
    """
    distribution = _distribution(unit_weights)
    _check_choice("method", method, DrawMethod)
    require_numbers(whole=True, size=size)
    if size < 0:
        raise ValueError(f"size (the number of draws) must be at least 0, got {size}")
    counts = np.zeros(distribution.size, dtype=np.int64)
    _count_draws(method, distribution, 0.0, size, generator, counts)
    return counts


def loss_weights(
    unit_weights: ArrayLike,
    *,
    sampling: Sampling,
    uniform_mix: float = 0.0,
    draw_fraction: float = 0.5,
    deduplicate: bool = False,
    method: DrawMethod = "independent",
    generator: np.random.Generator | None = None,
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """The weight of every unit in one round's training loss.

    All ways sum to N, but for `"without_replacement"` and with `deduplicate`; the loss divides by the sum.

    Args:
        unit_weights: `D_t`, float64 `[N]`, summing to 1.
        sampling: `"draw"`: how often each unit came up in N draws from the mixed weights, 0 for a masked
            one (the paper's weighted sampling with label masking); `"without_replacement"`: 1 for each of
            `draw_fraction * N` different units, drawn by the mixed weights (`draw_without_replacement`) [choice];
            `"reweight"`: `N` times the mixed weights, no randomness [choice]; and two baselines that ignore
            `unit_weights`: `"bagging"`, counts of N uniform draws, and `"all"`, 1 everywhere (a deep ensemble).
        uniform_mix: `m` in [0, 1), which blends the weights with the uniform distribution, `(1 - m) D + m / N` [choice;
            the paper has m = 0]: a unit's weight is then at least `m` times what it is under uniform weights, so that
            an expert keeps learning the easy tokens after a sharp update. Without effect on the baselines.
        draw_fraction: the share of the units that `"without_replacement"` draws, in (0, 1].
        deduplicate: count a unit that was drawn several times once [choice: False].
        method: how to draw, see `draw_counts`.
        generator: source of the draws; not needed for `"reweight"` and `"all"`.
        out: float64 `[N]`, where to put the result; None makes a new array.

    Returns:
        float64 `[N]`; index it with `unit_index` for the weights of the tokens.

    Raises:
        ValueError: weights that are no distribution, unknown names, `uniform_mix` outside [0, 1), `draw_fraction`
            outside (0, 1], a missing `generator`, `deduplicate` where nothing is drawn several times, an `out` of
            another length.
    """
    _check_choice("sampling", sampling, Sampling)
    _check_choice("method", method, DrawMethod)
    distribution = _distribution(unit_weights)
    require_numbers(uniform_mix=uniform_mix)
    if not 0.0 <= uniform_mix < 1.0:
        raise ValueError(f"uniform_mix must be in [0, 1), got {uniform_mix}; 0 turns the mixing off")
    size = distribution.size
    if deduplicate and sampling not in ("draw", "bagging"):
        raise ValueError('deduplicate only applies to draws: use sampling="draw" or "bagging", or leave it off')
    require_numbers(draw_fraction=draw_fraction)
    if not 0.0 < draw_fraction <= 1.0:
        raise ValueError(f"draw_fraction must be in (0, 1], got {draw_fraction}")
    result = _result(out, size)
    if sampling == "all":
        result[:] = 1.0
        return result
    if sampling == "reweight":
        for part in _blocks(size):
            result[part] = _mixed(distribution, uniform_mix, part) * size
        return result
    if generator is None:
        raise ValueError(f"sampling={sampling!r} needs a generator (numpy.random.Generator)")
    if sampling == "without_replacement":
        for part in _blocks(size):
            result[part] = _mixed(distribution, uniform_mix, part)
        drawn = draw_without_replacement(result, max(1, round(draw_fraction * size)), generator)
        result[:] = 0.0
        result[drawn] = 1.0
        return result
    result[:] = 0.0
    _count_draws(method, distribution, uniform_mix if sampling == "draw" else 1.0, size, generator, result)
    if deduplicate:
        np.minimum(result, 1.0, out=result)
    return result


def draw_without_replacement(unit_weights: ArrayLike, size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw `size` different units, one after the other, each with a chance in proportion to its weight.

    By exponential keys (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006): the units with
    the smallest `e_i / D_i`, `e_i` standard exponential. A unit of weight zero is never drawn.

    Args:
        unit_weights: float64 `[N]`, summing to 1.
        size: number of units, at least 0.
        generator: source of randomness.

    Returns:
        int64 `[size]`, rising.

    Raises:
        ValueError: weights that are no distribution, a negative `size`, or one above the number of units with weight.
    """
    distribution = _distribution(unit_weights)
    require_numbers(whole=True, size=size)
    keys = np.empty(distribution.size)
    for part in _blocks(distribution.size):
        with np.errstate(divide="ignore"):
            keys[part] = generator.exponential(size=part.stop - part.start) / distribution[part]
    possible = int(np.isfinite(keys).sum())
    if not 0 <= size <= possible:
        raise ValueError(f"size must be from 0 to {possible}, the units with a weight above 0, got {size}")
    return np.sort(np.argpartition(keys, size - 1)[:size]) if size else np.empty(0, dtype=np.int64)


def _mixed(distribution: NDArray[np.float64], uniform_mix: float, part: slice) -> NDArray[np.float64]:
    """Return a part of `(1 - uniform_mix) D + uniform_mix / N`."""
    mixed = distribution[part] * (1.0 - uniform_mix)
    mixed += uniform_mix / distribution.size
    return mixed


def _prefix_sums(distribution: NDArray[np.float64], uniform_mix: float) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Cumulative sums, a block at a time: non-decreasing, and constant across units of weight zero."""
    carry = 0.0
    for part in _blocks(distribution.size):
        cumulative = _mixed(distribution, uniform_mix, part)
        for start in range(0, cumulative.size, PREFIX_SUM_BLOCK):
            row = cumulative[start : start + PREFIX_SUM_BLOCK]
            np.cumsum(row, out=row)
            row += carry
            carry = row[-1]
        yield part, cumulative


def _count_draws(
    method: DrawMethod,
    distribution: NDArray[np.float64],
    uniform_mix: float,
    draws: int,
    generator: np.random.Generator,
    counts: NDArray[Any],
) -> None:
    """Add to `counts` [N] how often each unit comes up in draws from the mixed weights."""
    total = 0.0
    for _, cumulative in _prefix_sums(distribution, uniform_mix):
        total = cumulative[-1]
    if method == "systematic":
        offset, before = generator.uniform(SYSTEMATIC_MARGIN, 1.0 - SYSTEMATIC_MARGIN), 0
        for part, cumulative in _prefix_sums(distribution, uniform_mix):
            # How many of the points offset, offset + 1, ... lie below a unit's upper border (scale: 1 per draw). The
            # last border is the number of draws up to rounding, which must not lose or add one.
            below = np.clip(np.ceil(cumulative * (draws / total) - offset).astype(np.int64), 0, draws)
            counts[part] += np.diff(below, prepend=before)
            before = below[-1]
        return
    for start in range(0, draws, DRAWS_PER_CHUNK):
        points = generator.random(min(DRAWS_PER_CHUNK, draws - start))
        # Sorted, the points that fall into one block of units stand together.
        points.sort()
        # With u <= 1 - 2^-53, u * total stays below total in floating point too: no draw lies beyond the last unit.
        points *= total
        done = 0
        for part, cumulative in _prefix_sums(distribution, uniform_mix):
            end = done + int(np.searchsorted(points[done:], cumulative[-1], side="left"))
            units = np.searchsorted(cumulative, points[done:end], side="right")
            counts[part] += np.bincount(units, minlength=cumulative.size)
            done = end


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def _result(out: NDArray[np.float64] | None, size: int) -> NDArray[np.float64]:
    if out is None:
        return np.empty(size)
    if out.shape != (size,) or out.dtype != np.float64:
        raise ValueError(f"out must be float64 of shape ({size},), one entry per unit; got {out.dtype} {out.shape}")
    return out


def _check_choice(name: str, value: object, allowed: object) -> None:
    choices = get_args(allowed)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {name} {shown(value)}; choose one of {', '.join(map(repr, choices))}")


def _check_num_units(num_units: int) -> None:
    require_numbers(whole=True, num_units=num_units)
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1, got {num_units}: there is nothing to boost")


def _integer_vector(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    return array.astype(np.int64, copy=False)


def _losses(name: str, losses: ArrayLike, length: int) -> NDArray[Any]:
    array = np.asarray(losses)
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{name} must be boolean (True where wrong) or floats in [0, 1], got dtype {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), one entry per weight or unit number, got {array.shape}")
    # Comparisons with NaN are false.
    if array.dtype != np.bool_ and not (array.min() >= 0.0 and array.max() <= 1.0):
        raise ValueError(f"{name} must be in [0, 1] and not NaN, they run from {array.min()} to {array.max()}")
    return array


def _floats(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    return array.astype(np.float64, copy=False)


def _distribution(unit_weights: ArrayLike) -> NDArray[np.float64]:
    array = _floats("unit_weights", unit_weights)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"unit_weights must be a non-empty vector, got shape {array.shape}")
    # min and sum both propagate NaN and need no temporary array of N elements.
    smallest, total = float(array.min()), float(array.sum())
    if not smallest >= 0.0:
        raise ValueError(f"unit_weights must be non-negative and not NaN, smallest is {smallest}")
    if not abs(total - 1.0) <= SUM_TOLERANCE:
        raise ValueError(f"unit_weights must sum to 1 within {SUM_TOLERANCE}, but the sum is {total}")
    return array
