"""Token-level boosting as pure functions on NumPy arrays: Phase 1 of EnsemW2S, with no model in sight.

The *unit* of boosting is an answer token, a window of consecutive answer tokens, or a whole answer. `N`
units carry float64 weights `D` of shape `[N]`, non-negative and summing to 1. One round reads::

    D    = initial_weights(N)                                     # round 1 only
    w    = loss_weights(D, sampling="draw", generator=generator)  # per-unit weights in the training loss
    ...                                                           # train the expert, mark the wrong units
    e, _ = clamp_error(weighted_error(D, wrong), N)
    a    = expert_weight(e, e_0)                                  # e_0 = prior_error(...), measured once
    D    = update_weights(D, wrong, a)                            # only if a > 0

Sources: EnsemW2S (Agrawal et al., Findings of ACL 2026; arXiv 2410.04571) for the token weights, the
weighted draw and the prior term; SAMME (Zhu et al., "Multi-class AdaBoost", Statistics and Its Interface 2,
2009) for the multi-class expert weight; discrete AdaBoost (Freund and Schapire, 1997) for the two-class
case. Where the paper is silent, the docstring marks our choice with [choice].

Arrays may be memory-mapped (`np.memmap`), also those given as `out`: they are worked through in blocks, so that
beside the result little memory is used, however large N is. Only `weight_quantiles` holds all the weights at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "clamp_error",
    "draw_counts",
    "effective_sample_size",
    "expert_weight",
    "initial_weights",
    "loss_weights",
    "mix_uniform",
    "prior_error",
    "unit_index",
    "unit_wrong",
    "update_weights",
    "weight_quantiles",
    "weighted_error",
]

Unit = Literal["token", "window", "sequence"]
Sampling = Literal["draw", "reweight", "bagging"]
DrawMethod = Literal["independent", "systematic"]
# Gives the weights of the units in a slice.
_WeightsOf = Callable[[slice], NDArray[np.float64]]
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


# ------------------------------------------------------------------------------------------------------------
# Units


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


def unit_wrong(token_wrong: ArrayLike, units: ArrayLike) -> NDArray[np.bool_]:
    """Mark the units with at least one wrong token [choice; for single tokens it changes nothing].

    Args:
        token_wrong: bool `[n_tokens]`, True where the teacher-forced argmax is not the answer's token.
        units: int64 `[n_tokens]` from `unit_index`.

    Returns:
        bool `[N]`.

    Raises:
        ValueError: different lengths, or unit numbers that do not rise from 0 without gaps.
        TypeError: `token_wrong` is not boolean or `units` not integers.
    """
    unit_numbers = _integer_vector("units", units)
    wrong_tokens = _wrong_mask("token_wrong", token_wrong, unit_numbers.size)
    last = -1
    for part in _blocks(unit_numbers.size):
        steps = np.diff(unit_numbers[part], prepend=last)
        # The first unit is number 0: a step of 1 from -1.
        if np.any((steps != 0) & (steps != 1)) or (last == -1 and steps[0] != 1):
            raise ValueError("units must rise from 0 in steps of 0 or 1, as unit_index returns them")
        last = unit_numbers[part][-1]
    wrong = np.zeros(last + 1, dtype=np.bool_)
    for part in _blocks(unit_numbers.size):
        wrong[unit_numbers[part][wrong_tokens[part]]] = True
    return wrong


# ------------------------------------------------------------------------------------------------------------
# Weights


def initial_weights(num_units: int, out: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """`D_1 = 1/N` for every unit: float64 `[num_units]`, in `out` if given. Raises ValueError if `num_units < 1`."""
    _check_num_units(num_units)
    result = _result(out, num_units)
    result[:] = 1.0 / num_units
    return result


def mix_uniform(weights: ArrayLike, uniform_mix: float) -> NDArray[np.float64]:
    """Blend the weights with the uniform distribution: `(1 - m) D + m / N` [choice; the paper has m = 0].

    A unit's weight in the loss is then at least `m` times what it is under uniform weights, so that an
    expert keeps learning the easy tokens after a sharp update.

    Args:
        weights: float64 `[N]`, summing to 1.
        uniform_mix: `m` in [0, 1).

    Returns:
        float64 `[N]`, summing to 1; a new array.

    Raises:
        ValueError: weights that are no distribution, or `uniform_mix` outside [0, 1).
    """
    distribution = _distribution(weights)
    return _mixed(distribution, uniform_mix)(slice(None))


def _mixed(distribution: NDArray[np.float64], uniform_mix: float) -> _WeightsOf:
    if not 0.0 <= uniform_mix < 1.0:
        raise ValueError(f"uniform_mix must be in [0, 1), got {uniform_mix}; 0 turns the mixing off")

    def weights_of(part: slice) -> NDArray[np.float64]:
        mixed = distribution[part] * (1.0 - uniform_mix)
        mixed += uniform_mix / distribution.size
        return mixed

    return weights_of


def effective_sample_size(weights: ArrayLike) -> float:
    """Kish's effective number of units, `1 / sum(D^2)`: N under uniform weights, 1 if one unit has it all.

    Raises ValueError if the weights (float64 `[N]`) are no distribution.
    """
    distribution = _distribution(weights)
    return float(1.0 / np.dot(distribution, distribution))


def weight_quantiles(weights: ArrayLike, probabilities: Sequence[float]) -> NDArray[np.float64]:
    """Quantiles of `N * D`, whose mean is 1: float64, one per entry of `probabilities` (numbers in [0, 1]).

    Interpolated linearly between neighbouring weights, as `np.quantile` does by default. One copy of the weights is
    held in memory. Raises ValueError if the weights (float64 `[N]`) are no distribution.
    """
    distribution = np.array(_distribution(weights))
    quantiles: NDArray[np.float64] = np.quantile(distribution, probabilities, overwrite_input=True)
    return quantiles * distribution.size


def weighted_error(weights: ArrayLike, wrong: ArrayLike) -> float:
    """The expert's error under the current weights, `e_t = sum(D_t[wrong])`, in [0, 1].

    The paper's weighted token error; also `e_0` when `wrong` belongs to the pre-trained model and the
    weights are uniform.

    Args:
        weights: float64 `[N]`, summing to 1.
        wrong: bool `[N]`.

    Raises:
        ValueError: weights that are no distribution, or a mask of another length.
        TypeError: `wrong` is not boolean.
    """
    distribution = _distribution(weights)
    wrong_units = _wrong_mask("wrong", wrong, distribution.size)
    # Indexing before summing keeps NumPy's pairwise summation, which sum(where=...) gives up.
    sums = [float(distribution[part][wrong_units[part]].sum()) for part in _blocks(distribution.size)]
    return min(1.0, math.fsum(sums))


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
    if prior == "pretrained":
        if pretrained_error is None or not 0.0 < pretrained_error < 1.0:
            raise ValueError(
                'prior="pretrained" needs pretrained_error in (0, 1), measured before fine-tuning and '
                f"clamped by clamp_error; got {pretrained_error}"
            )
        return float(pretrained_error)
    if prior == "uniform":
        if unit != "token":
            raise ValueError(
                f'prior="uniform" needs unit="token", got unit={unit!r}: use prior="pretrained" or a number'
            )
        if num_classes is None or num_classes < 2:
            raise ValueError(
                f'prior="uniform" needs num_classes >= 2 (for instance the size of the vocabulary), got {num_classes}'
            )
        return 1.0 - 1.0 / num_classes
    if isinstance(prior, (str, bool)) or not 0.0 < prior < 1.0:
        raise ValueError(f'prior must be "pretrained", "uniform" or a number in (0, 1), got {prior!r}')
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
    for name, value in (("error", error), ("prior_error", prior_error)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must be in (0, 1), got {value}: pass it through clamp_error first")
    # 1/(1 - e_0) - 1 = e_0/(1 - e_0); this form loses no digits for e_0 near 0.
    return math.log1p(-error) - math.log(error) + math.log(prior_error) - math.log1p(-prior_error)


def update_weights(
    weights: ArrayLike,
    wrong: ArrayLike,
    expert_weight: float,
    shrinkage: float = 1.0,
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Raise the weights of the units that the new expert gets wrong.

    The paper's `D_{t+1} = D_t exp(a_t 1[wrong]) / Z_t`, with `s a_t` in the place of `a_t`.
    With `s = 1` and an error that was not clamped, the expert's error under the new weights is exactly
    `e_0`; with shrinkage it is `exp(s a_t) e_t / (exp(s a_t) e_t + 1 - e_t)`.

    Args:
        weights: `D_t`, float64 `[N]`, summing to 1.
        wrong: bool `[N]`.
        expert_weight: `a_t` > 0, from `expert_weight`.
        shrinkage: `s` in (0, 1] [choice; the paper has 1]. It acts on the update alone, `a_t` stays what
            it is in the mixture.
        out: float64 `[N]`, where to put the result; None makes a new array.

    Returns:
        `D_{t+1}`, float64 `[N]`, summing to 1.

    Raises:
        ValueError: weights that are no distribution, a mask or an `out` of another length, `expert_weight` not
            positive and finite, `shrinkage` outside (0, 1].
        TypeError: `wrong` is not boolean.
    """
    distribution = _distribution(weights)
    wrong_units = _wrong_mask("wrong", wrong, distribution.size)
    if not (math.isfinite(expert_weight) and expert_weight > 0.0):
        raise ValueError(
            f"expert_weight must be positive and finite, got {expert_weight}: an expert that is no better "
            "than the prior is not added"
        )
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}; 1 is the paper's full update")
    # Scaling the right units down is the same update as scaling the wrong ones up, and cannot overflow.
    factor = math.exp(-shrinkage * expert_weight)
    updated = _result(out, distribution.size)
    for part in _blocks(distribution.size):
        updated[part] = np.where(wrong_units[part], distribution[part], distribution[part] * factor)
    total = updated.sum()
    if total == 0.0:
        raise ValueError(
            f"expert_weight={expert_weight} leaves no weight on any unit: the expert is wrong nowhere and "
            "its error was not clamped by clamp_error"
        )
    updated /= total
    return updated


# ------------------------------------------------------------------------------------------------------------
# From weights to the training loss


def draw_counts(
    weights: ArrayLike, size: int, generator: np.random.Generator, method: DrawMethod = "independent"
) -> NDArray[np.int64]:
    """Draw units with replacement and count how often each came up.

    Both methods invert the cumulative distribution on a float64 prefix sum, for any number of units
    (`torch.multinomial` refuses more than 2^24). A unit of weight zero is never drawn.

    Args:
        weights: float64 `[N]`, summing to 1.
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
    distribution = _distribution(weights)
    _check_choice("method", method, DrawMethod)
    if size < 0:
        raise ValueError(f"size (the number of draws) must be at least 0, got {size}")
    counts = np.zeros(distribution.size, dtype=np.int64)
    _count_draws(lambda part: distribution[part], size, generator, method, counts)
    return counts


def loss_weights(
    weights: ArrayLike,
    *,
    sampling: Sampling,
    uniform_mix: float = 0.0,
    deduplicate: bool = False,
    method: DrawMethod = "independent",
    generator: np.random.Generator | None = None,
    out: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """The weight of every unit in one round's training loss; all ways sum to N (without `deduplicate`).

    Args:
        weights: `D_t`, float64 `[N]`, summing to 1.
        sampling: `"draw"`: how often each unit came up in N draws from the mixed weights, 0 for a masked
            one (the paper's weighted sampling with label masking); `"reweight"`: `N` times the mixed
            weights, no randomness [choice]; `"bagging"`: counts of N uniform draws whatever `weights`
            says (the baseline).
        uniform_mix: `m` of `mix_uniform`; without effect on `"bagging"`.
        deduplicate: count a unit that was drawn several times once [choice: False].
        method: how to draw, see `draw_counts`.
        generator: source of the draws; not needed for `"reweight"`.
        out: float64 `[N]`, where to put the result; None makes a new array.

    Returns:
        float64 `[N]`; index it with `unit_index` for the weights of the tokens.

    Raises:
        ValueError: weights that are no distribution, unknown names, `uniform_mix` outside [0, 1), a missing
            `generator`, `deduplicate` with `"reweight"`, an `out` of another length.
    """
    _check_choice("sampling", sampling, Sampling)
    _check_choice("method", method, DrawMethod)
    distribution = _distribution(weights)
    mixed = _mixed(distribution, uniform_mix)
    size = distribution.size
    if sampling == "reweight":
        if deduplicate:
            raise ValueError('deduplicate only applies to draws: use sampling="draw" or "bagging", or leave it off')
        result = _result(out, size)
        for part in _blocks(size):
            result[part] = mixed(part) * size
        return result
    if generator is None:
        raise ValueError(f"sampling={sampling!r} needs a generator (numpy.random.Generator)")
    source = mixed if sampling == "draw" else lambda part: np.full(part.stop - part.start, 1.0 / size)
    result = _result(out, size)
    result[:] = 0.0
    _count_draws(source, size, generator, method, result)
    if deduplicate:
        np.minimum(result, 1.0, out=result)
    return result


def _prefix_sums(weights_of: _WeightsOf, size: int) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Cumulative sums, a block at a time: non-decreasing, and constant across units of weight zero."""
    carry = 0.0
    for part in _blocks(size):
        weights = weights_of(part)
        cumulative = np.empty_like(weights)
        for start in range(0, weights.size, PREFIX_SUM_BLOCK):
            row = cumulative[start : start + PREFIX_SUM_BLOCK]
            np.cumsum(weights[start : start + PREFIX_SUM_BLOCK], out=row)
            row += carry
            carry = row[-1]
        yield part, cumulative


def _count_draws(
    weights_of: _WeightsOf,
    draws: int,
    generator: np.random.Generator,
    method: DrawMethod,
    counts: NDArray[np.int64] | NDArray[np.float64],
) -> None:
    """Add to `counts` [N] how often each unit comes up."""
    total = 0.0
    for _, cumulative in _prefix_sums(weights_of, counts.size):
        total = cumulative[-1]
    count = _count_systematic if method == "systematic" else _count_independent
    count(weights_of, draws, generator, total, counts)


def _count_independent(  # type: ignore[no-untyped-def]
    weights_of: _WeightsOf, draws: int, generator: np.random.Generator, total: float, counts
) -> None:
    for start in range(0, draws, DRAWS_PER_CHUNK):
        points = generator.random(min(DRAWS_PER_CHUNK, draws - start))
        # Sorted, the points that fall into one block of units stand together.
        points.sort()
        # With u <= 1 - 2^-53, u * total stays below total in floating point too: no draw lies beyond the last unit.
        points *= total
        done = 0
        for part, cumulative in _prefix_sums(weights_of, counts.size):
            end = done + int(np.searchsorted(points[done:], cumulative[-1], side="left"))
            units = np.searchsorted(cumulative, points[done:end], side="right")
            counts[part] += np.bincount(units, minlength=cumulative.size)
            done = end


def _count_systematic(  # type: ignore[no-untyped-def]
    weights_of: _WeightsOf, draws: int, generator: np.random.Generator, total: float, counts
) -> None:
    offset = generator.uniform(SYSTEMATIC_MARGIN, 1.0 - SYSTEMATIC_MARGIN)
    before = 0
    for part, cumulative in _prefix_sums(weights_of, counts.size):
        # How many of the points offset, offset + 1, ... lie below a unit's upper border (scale: 1 per draw).
        points_below = np.ceil(cumulative * (draws / total) - offset).astype(np.int64)
        # The last border is the number of draws up to rounding, and rounding must not lose or add a draw.
        np.clip(points_below, 0, draws, out=points_below)
        counts[part] += np.diff(points_below, prepend=before)
        before = points_below[-1]


# ------------------------------------------------------------------------------------------------------------
# Blocks


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def _result(out: NDArray[np.float64] | None, size: int) -> NDArray[np.float64]:
    if out is None:
        return np.empty(size)
    if out.shape != (size,) or out.dtype != np.float64:
        raise ValueError(f"out must be float64 of shape ({size},), one entry per unit; got {out.dtype} {out.shape}")
    return out


# ------------------------------------------------------------------------------------------------------------
# Checks


def _check_choice(name: str, value: object, allowed: object) -> None:
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(repr, choices))}")


def _check_num_units(num_units: int) -> None:
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1, got {num_units}: there is nothing to boost")


def _integer_vector(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    return array.astype(np.int64, copy=False)


def _wrong_mask(name: str, mask: ArrayLike, length: int) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"{name} must be boolean (True where wrong), got dtype {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), one entry per weight or unit number, got {array.shape}")
    return array


def _distribution(weights: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"weights must be a non-empty vector, got shape {array.shape}")
    # min and sum both propagate NaN and need no temporary array of N elements.
    smallest, total = float(array.min()), float(array.sum())
    if not smallest >= 0.0:
        raise ValueError(f"weights must be non-negative and not NaN, smallest is {smallest}")
    if not abs(total - 1.0) <= SUM_TOLERANCE:
        raise ValueError(f"weights must sum to 1 within {SUM_TOLERANCE}, but the sum is {total}")
    return array
