"""What a page says in sentences: what was found, what ensembles are made of, what moves in opposite directions.

Every sentence follows from figures by a rule that its function states. No arm is called better or worse where the 95%
interval of the difference includes 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ensemw2s.report.arms import ARM_NAMES, BASELINE, CEILING, arm_name, lower_first
from ensemw2s.report.pool import Pair, Pool, Subset
from ensemw2s.report.statistics import Interval
from ensemw2s.report.tables import comparison_name, difference_points, number, why_outside
from ensemw2s.runtime.records import TEST_SPLITS, MixtureRecord, Record, RoundRecord, of_kind

QUESTIONS = {"id": "easy questions", "ood": "hard questions"}
# An expert whose share of the mixture is smaller is called useless [choice]: it moves no probability by more than that.
LEAST_SHARE = 1e-3
# Token weights whose effective sample size is a larger share of the tokens have hardly moved [choice].
UNMOVED_SHARE = 0.95
# A difference of as many points, as a share, is large enough to be set beside an opposite one [choice].
LARGE_MOVE = 0.1
# Names that no article stands before.
_WITHOUT_ARTICLE = ("bagging", "sequence")


def headline(pool: Pool | None) -> str:
    """Return what the first comparison says about the primary split, or why nothing can be said.

    One arm is ahead where the interval of the difference leaves out 0. Else no difference was found. Where no arm has a
    right answer, there is nothing to compare.
    """
    if pool is None:
        return "Nothing was measured on test questions yet: run `evaluate` first."
    if pool.answers and not any(right.any() for by_task in pool.answers.values() for right in by_task.values()):
        return (
            "No arm answers a single test question right, so nothing can be compared: train for longer or with a "
            "higher learning rate, or take easier questions."
        )
    pairs = [pair for pair in pool.comparisons if pool.difference(pair, pool.primary_split)]
    if not pairs:
        return (
            f"No comparison can be made on {QUESTIONS[pool.primary_split]}: there is none of which both arms were "
            "measured."
        )
    return _found(pool, pairs[0])


def _found(pool: Pool, pair: Pair) -> str:
    split = pool.primary_split
    difference, (first, second) = pool.difference(pair, split), map(_with_article, pair)
    assert difference is not None
    if difference.low > 0:
        verdict = f"{first} is ahead of {second}"
    elif difference.high < 0:
        verdict = f"{first} is behind {second}"
    else:
        verdict = f"no difference was found between {first} and {second}"
    reached = [pool.accuracy(arm, split) for arm in pair]
    if all(accuracy and accuracy.value == 0 for accuracy in reached):
        return (
            f"Neither {first} nor {second} answers one of the {QUESTIONS[split]} right "
            f"({_measured_on(pool, pair)}), so nothing can be compared there."
        )
    shares = " against ".join(f"{100 * accuracy.value:.1f}%" for accuracy in reached if accuracy)
    shown = f"{shares} right, " if all(reached) else ""
    value, low, high = map(difference_points, difference)
    return (
        f"On {QUESTIONS[split]}, {verdict}: {shown}a difference of {value} points (95% interval {low} to {high}; "
        f"{_measured_on(pool, pair)})."
    )


def other_comparisons(pool: Pool) -> str:
    """Return how many of the other comparisons are decided on the primary split, and which; "" without others."""
    found = {pair: pool.difference(pair, pool.primary_split) for pair in pool.comparisons}
    others = [(pair, difference) for pair, difference in found.items() if difference][1:]
    if not others:
        return ""
    ahead = [comparison_name(pair) for pair, difference in others if difference.low > 0]
    behind = [comparison_name(pair) for pair, difference in others if difference.high < 0]
    undecided = len(others) - len(ahead) - len(behind)
    many = f"the other {len(others)} comparisons" if len(others) > 1 else "the other comparison"
    return (
        f"In {many} on {QUESTIONS[pool.primary_split]}, the arm named first is ahead in {_listed(ahead)}, behind in "
        f"{_listed(behind)}, and no difference was found in {undecided}."
    )


def levels_outside(pool: Pool) -> str:
    """Return what share of the hard questions is of levels outside the band of `tables.levels`, and of which.

    "" if all levels are within, or where it is not known.
    """
    known = [(task, level) for task in pool.seeds for level in pool.levels_of(task, "ood")]
    found: dict[str, dict[str, list[str]]] = {}
    share = 0.0
    for task, level in known:
        subset = Subset("ood", level)
        reason = why_outside(pool, subset, task)
        if reason.startswith("no: "):
            found.setdefault(reason.removeprefix("no: "), {}).setdefault(task, []).append(level)
            share += pool.share(subset, task)
    if not found:
        return ""
    listed = [
        f"{_and([f'{task} {_and(levels)}' for task, levels in tasks.items()])} ({reason})"
        for reason, tasks in found.items()
    ]
    return (
        f"{share / len({task for task, _ in known}):.0%} of the hard questions are of levels outside the band in which "
        f"arms can differ: {'; '.join(listed)}. Figures over all hard questions contain these."
    )


def opposite_moves(pool: Pool) -> list[str]:
    """Return a sentence for each comparison that is won on one split and lost on the other.

    Students are compared with the single expert as well. A move counts if its interval leaves out 0, or, where the
    other one's does not either, if both are of at least `LARGE_MOVE`.
    """
    students = [(arm, BASELINE) for arm in pool.arms if arm in pool.students]
    said = []
    for pair in dict.fromkeys((*pool.measured_comparisons(), *students)):
        easy, hard = (pool.difference(pair, split) for split in TEST_SPLITS)
        if easy is None or hard is None or easy.value * hard.value >= 0 or not _both_count(easy, hard):
            continue
        first, second = pair
        points = [f"{difference_points(move.value)} points on {QUESTIONS[split]}"
                  for split, move in zip(TEST_SPLITS, (easy, hard), strict=True)]  # fmt: skip
        text = f"{comparison_name(pair)} moves in opposite directions: {' and '.join(points)}."
        if _is_student(first) and not _is_student(second) and hard.value > 0:
            text += (
                " Students learn from hard questions alone, and can lose on easy ones what they gain on hard ones: "
                "they are better at other questions, not at all of them."
            )
        else:
            text += " A mean over both kinds of questions would hide it."
        said.append(text)
    return said


def _both_count(*moves: Interval) -> bool:
    decided = all(move.low > 0 or move.high < 0 for move in moves)
    return decided or all(abs(move.value) >= LARGE_MOVE for move in moves)


def shares_of(weights: Sequence[float]) -> list[float]:
    """Return weights as shares of the mixture, which may be as large or small as a float can be."""
    largest = max(weights)
    scaled = [weight / largest for weight in weights]
    return [weight / sum(scaled) for weight in scaled]


def mixture_sentences(mixture: MixtureRecord, rounds: Sequence[RoundRecord]) -> list[str]:
    """Return of what shares an ensemble is made, what of it is of no use, and whether boosting did anything.

    An expert is useless below `LEAST_SHARE`. Boosting did nothing if after each round but the last, which no expert
    follows, the effective sample size of the token weights is above `UNMOVED_SHARE` of the tokens.
    """
    weights, alphas = mixture.expert_weights, boosting_weights(mixture, rounds)
    shares, count = shares_of(weights), len(mixture.expert_weights)
    name = _with_article(mixture.arm or "ensemble")
    listed = _and([share_text(share) for share in shares])
    even = max(shares) - min(shares) < 1e-6
    said = [f"{name[:1].upper()}{name[1:]} mixes {count} experts, with "
            f"{'the same weight each' if even else f'{listed} of the weight'}."]  # fmt: skip
    idle = [place for place, share in enumerate(shares) if share < LEAST_SHARE]
    if idle:
        said.append(_useless(idle, shares))
    if alphas and any(abs(a - b) > 1e-6 for a, b in zip(shares_of(alphas), shares, strict=True)):
        said.append("The boosting weights α are not used in the mixture: its weights were set in another way "
                    "(`boosting.mixture_weights`).")  # fmt: skip
    spreads = [record.effective_sample_size / record.num_units for record in _rounds_of(mixture, rounds)[:-1]]
    if spreads and min(spreads) > UNMOVED_SHARE:
        said.append(
            f"Boosting had nothing to work on: the effective sample size of the token weights stayed above "
            f"{UNMOVED_SHARE:.0%} of the tokens, so that every expert was trained on nearly the same. The experts "
            "hardly err on their own training questions, and the ensemble is in effect a deep ensemble, whose experts "
            "differ by their seeds: give more or harder questions, or train for fewer epochs, to have errors that "
            "weights can follow."
        )
    return said


def _rounds_of(mixture: MixtureRecord, rounds: Iterable[RoundRecord]) -> list[RoundRecord]:
    """Return the accepted rounds of a mixture's experts, in their order; [] if not all are known."""
    own = [record for record in rounds if record.accepted and record.arm == mixture.arm]
    # Those of earlier generations have served.
    latest = max((record.generation for record in own), default=0)
    own = [record for record in own if record.generation == latest]
    # Of a chain the last.
    ends = list({record.chain or -record.round: record for record in own}.values())
    count = len(mixture.expert_weights)
    return ends[:count] if len(ends) >= count else []


def _useless(idle: Sequence[int], shares: Sequence[float]) -> str:
    count, left = len(shares), len(shares) - len(idle)
    who = f"Expert{'s' * (len(idle) > 1)} {_and([str(place + 1) for place in idle])}"
    have, cost = ("have", "cost") if len(idle) > 1 else ("has", "costs")
    largest = max(shares[place] for place in idle)
    dropped = "".join(f".without({place})" for place in reversed(idle))
    alone = f" What is left is expert {shares.index(max(shares)) + 1} alone." if left == 1 else ""
    return (
        f"{who} {have} next to no weight (at most {share_text(largest)}) and {cost} compute for nothing: every answer "
        f"runs all {count} experts, whatever their weights. `ensemble{dropped}` runs {left}, which saves "
        f"{len(idle)} of {count} runs of an expert for each token ({len(idle) / count:.0%}).{alone}"
    )


def boosting_weights(mixture: MixtureRecord, rounds: Iterable[RoundRecord]) -> list[float]:
    """Return α of each expert of a mixture, which are those of the first accepted rounds; [] if it is not known."""
    return [record.expert_weight for record in _rounds_of(mixture, rounds)]


def mixtures_of_runs(records: Iterable[Record]) -> str:
    """Return in how many runs the arm `ensemble` has an expert below `LEAST_SHARE`; "" if in none."""
    mixed = [record.expert_weights for record in of_kind(records, MixtureRecord, arm="ensemble")]
    idle = sum(min(shares_of(weights)) < LEAST_SHARE for weights in mixed)
    if not idle:
        return ""
    return (
        f"In {idle} of {len(mixed)} runs, the ensemble has an expert with less than {share_text(LEAST_SHARE)} of the "
        "weight, which costs compute in every answer for nothing."
    )


def share_text(share: float) -> str:
    """Return a share in percent, also one that is next to nothing: "38%", "0.04%", "6e-298%"."""
    percent = 100 * share
    return f"{percent:.0f}%" if percent >= 9.95 or percent == 0 else f"{number(percent, '.2g')}%"


def _measured_on(pool: Pool, pair: Pair) -> str:
    tasks = pool.shared_tasks(pool.primary_split, *pair)
    sizes = sorted({pool.questions[task, pool.primary_split] for task in tasks})
    seeds = sorted({len(pool.seeds[task]) for task in tasks})
    asked = f"{_range(sizes)} questions{' each' if len(tasks) > 1 else ''}"
    trained = "one training seed" if seeds == [1] else f"{_range(seeds)} training seeds"
    return ", ".join([*([f"{len(tasks)} tasks"] if len(tasks) > 1 else []), asked, trained])


def _range(counts: Sequence[int]) -> str:
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(map(lower_first, names))})" if names else "none"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _with_article(arm: str) -> str:
    name = lower_first(arm_name(arm))
    known = arm.partition(".")[0] in ARM_NAMES and arm not in _WITHOUT_ARTICLE
    return f"the {name}" if known else name


def _is_student(arm: str) -> bool:
    return arm.startswith("student") or arm == CEILING
