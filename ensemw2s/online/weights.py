"""Expert weights that are updated after every answer, with a bound on what they lose against any expert.

N answers come one after another. For each, every expert has a loss, and so has the mixture. The *regret* against an
expert is the sum of the mixture's losses minus the sum of the expert's. All rules here multiply weights by
`exp(-learning_rate * loss)` and normalise them, so that the logarithm of an expert's weight has grown by the regret
against it, times the learning rate, and cannot grow beyond 0: that is where the bounds come from.

Sources: Hedge (Freund and Schapire, 1997); Bayes' rule as its case for log-losses (Vovk, 1990); fixed share (Herbster
and Warmuth, 1998); sleeping experts (Freund, Schapire, Singer and Warmuth, 1997); answers of which only the one given
is judged: EXP4 (Auer, Cesa-Bianchi, Freund and Schapire, 2002). The paper names ensembles that form while they are in
use as future work.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemw2s.runtime.files import append_json_lines, read_complete_lines
from ensemw2s.runtime.values import require_numbers, shown

_BEGIN, _JOIN, _LEAVE = "begin", "join", "leave"
_ANSWER, _LOSSES, _WRONG = "answer", "losses", "wrong"


class OnlineWeights:
    """T expert weights that learn from one answer at a time.

    Three kinds of feedback may be mixed. `learn_answer` takes the right answer of a question, by the log-probability
    that each expert gives it. `learn_losses` takes a loss between 0 and 1 for every expert. `learn_verdict` takes the
    word "right" or "wrong" on the answer that was given, and nothing on others.

    Any number of threads may use one object. All numbers are float64.

    Args:
        expert_weights: T non-negative numbers, not all 0, such as those of boosting; normalised here. They are the
            weights before the first answer.
        learning_rate: how far one loss between 0 and 1 moves the weights. `learn_losses` and `learn_verdict` need it.
            For N losses `sqrt(8 ln(T) / N)` has the smallest bound. `learn_answer` follows Bayes' rule, whose rate is
            1, whatever stands here.
        share: which part of the weight is shared out evenly after each answer, so that an expert that has become
            better is heard again soon. 0 never forgets; `1 / N` suits streams of N answers with few changes.
        log_file: JSON lines to which every step is appended as it comes; None keeps none. A file that exists already is
            continued by `resume` alone.

    Raises:
        FileExistsError: `log_file` is there already.
        TypeError: a number that is none.
        ValueError: a number outside its range, or no usable weight.
    """

    def __init__(
        self,
        expert_weights: Sequence[float],
        *,
        learning_rate: float | None = None,
        share: float = 0.0,
        log_file: str | os.PathLike[str] | None = None,
    ) -> None:
        start = _numbers("expert_weights", expert_weights)
        if not np.isfinite(start).all():
            raise ValueError(f"expert_weights must be finite numbers, got {shown(start.tolist())}")
        if (start < 0).any() or not start.any():
            raise ValueError(f"expert_weights must be at least 0 and not all 0, got {shown(list(expert_weights))}")
        _check_rates(learning_rate, share)
        if log_file is not None and Path(log_file).exists():
            raise FileExistsError(
                f"{log_file} is there already: go on with it by OnlineWeights.resume, or name another file"
            )
        with np.errstate(divide="ignore"):
            self._log_weights = np.log(start / start.max())
        self._log_weights -= _log_sum(self._log_weights)
        self._rate, self._share = learning_rate, float(share)
        self._log_file = log_file
        self._lock = threading.RLock()
        self._write({"step": _BEGIN, "learning_rate": learning_rate, "share": self._share})

    def __repr__(self) -> str:
        return f"OnlineWeights({', '.join(f'{weight:.3g}' for weight in self.expert_weights)})"

    def __len__(self) -> int:
        return len(self._log_weights)

    @property
    def expert_weights(self) -> list[float]:
        """Return the T weights, which sum to 1: what `TokenEnsemble.reweighted` takes, if none of them is 0."""
        return [float(weight) for weight in np.exp(self._log_weights)]

    def learn_answer(self, log_probs: ArrayLike, *, awake: ArrayLike | None = None) -> float:
        """Learn from a right answer, by Bayes' rule: an expert's weight is multiplied by the probability it gives.

        Args:
            log_probs: [T] log-probabilities (nats) of the whole answer, at most 0; -inf where an expert rules it out.
                What stands at an expert that is not awake is not read.
            awake: bool [T], which experts had a part in it; None stands for all. The others keep their weights.

        Returns:
            The mixture's loss: the negative log-probability (nats) that it gave the answer.

        Raises:
            ValueError: not T numbers, one above 0 or NaN, nobody awake, or no awake expert of positive weight that
                gives the answer a probability.
        """
        taking = self._awake(awake)
        return self._learn(_ANSWER, -self._log_probs(log_probs, taking), 1.0, taking)

    def learn_losses(self, losses: ArrayLike, *, awake: ArrayLike | None = None) -> float:
        """Learn from a loss of every expert, by Hedge.

        Args:
            losses: [T], between 0 and 1, such as 1 where an expert's answer was wrong.
            awake: as in `learn_answer`.

        Returns:
            The mixture's loss: the mean of the experts' by the weights before this step.

        Raises:
            ValueError: not T numbers between 0 and 1, nobody awake, or no `learning_rate`.
        """
        rate, taking = self._needed_rate(), self._awake(awake)
        given = _numbers("losses", losses, len(self))
        if not ((given[taking] >= 0) & (given[taking] <= 1)).all():
            raise ValueError(f"losses must lie between 0 and 1, got {shown(given.tolist())}")
        with self._lock:
            weights = np.exp(self._log_weights[taking])
            self._learn(_LOSSES, given, rate, taking)
            return float((weights * given[taking]).sum() / weights.sum())

    def learn_verdict(self, right: bool, log_probs: ArrayLike, *, awake: ArrayLike | None = None) -> None:
        """Learn from a verdict on the answer that was given, as EXP4 does.

        A wrong answer costs each expert the probability with which it would have given that answer, divided by the
        mixture's. Over answers that are drawn from the mixture of whole answers, `sum_t w_t p_t(answer)`, this is on
        average the share of an expert's answers that are wrong. A right answer tells nothing about what other answers
        would have been, and changes nothing but what is shared out. Greedy answers are no draws: for those no bound
        holds.

        Args:
            right: the verdict.
            log_probs: [T] log-probabilities (nats) of the answer that was given, as in `learn_answer`.
            awake: as in `learn_answer`.

        Raises:
            TypeError: `right` is no bool.
            ValueError: as `learn_answer`, or no `learning_rate`.
        """
        if not isinstance(right, bool | np.bool_):
            raise TypeError(f"right must be True or False, got {shown(right)}")
        rate, taking = self._needed_rate(), self._awake(awake)
        given = self._log_probs(log_probs, taking)
        with self._lock:
            known = np.where(taking, given + self._log_weights, -np.inf)
            mixture = _log_sum(known) - _log_sum(np.where(taking, self._log_weights, -np.inf))
            if mixture == -np.inf:
                raise ValueError("log_probs: no expert of positive weight could have given this answer")
            costs = np.zeros(len(self)) if right else np.where(taking, np.exp(given - mixture), 0.0)
            self._learn(_WRONG, costs, rate, taking)

    def join(self, weight: float) -> None:
        """Append an expert with a share of the whole weight; the others keep theirs relative to one another.

        Raises:
            ValueError: `weight` is not above 0 and below 1.
        """
        require_numbers(weight=weight)
        if not 0 < weight < 1:
            raise ValueError(f"weight must be above 0 and below 1, got {shown(weight)}")
        with self._lock:
            others = self._log_weights + math.log1p(-weight)
            self._log_weights = np.append(others, math.log(weight))
            self._write({"step": _JOIN, "weight": float(weight)})

    def leave(self, index: int) -> None:
        """Remove expert `index` (from 0); those behind it move up, and the rest keep their weights to one another.

        Raises:
            IndexError: no such expert.
            ValueError: nobody with a positive weight would be left.
        """
        require_numbers(whole=True, index=index)
        with self._lock:
            if not 0 <= index < len(self):
                raise IndexError(f"there is no expert {index}: {len(self)} experts are numbered from 0")
            rest = np.delete(self._log_weights, index)
            if not len(rest) or rest.max() == -np.inf:
                raise ValueError(f"expert {index} has all the weight: let another join first")
            self._log_weights = rest - _log_sum(rest)
            self._write({"step": _LEAVE, "index": int(index)})

    @classmethod
    def resume(cls, log_file: str | os.PathLike[str]) -> OnlineWeights:
        """Go on with the weights whose steps `log_file` holds, from the same bits.

        Every step is done again and compared with what the file says came of it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged line, or weights that do not follow from the steps before them; names the line.
        """
        path = Path(log_file)
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: begin with OnlineWeights(..., log_file=...)")
        rows = read_complete_lines(path)
        if not rows:
            raise ValueError(f"{path} holds no step: delete it, and begin anew")
        weights: OnlineWeights | None = None
        for number, row in enumerate(rows, start=1):
            try:
                weights = _begun(row) if weights is None else weights._again(row)
                said = _from_json(row["log_weights"])
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number} is damaged: {error}") from error
            if not np.array_equal(said, weights._log_weights):
                raise ValueError(f"{path}, line {number}: these weights do not follow from the lines before")
        assert weights is not None
        weights._log_file = path
        return weights

    def _again(self, row: dict[str, Any]) -> OnlineWeights:
        """Do the step of a row of the log file once more."""
        step = row["step"]
        if step == _JOIN:
            self.join(row["weight"])
        elif step == _LEAVE:
            self.leave(row["index"])
        elif step in (_ANSWER, _LOSSES, _WRONG):
            rate = 1.0 if step == _ANSWER else self._needed_rate()
            awake = np.ones(len(self), dtype=bool) if row["awake"] is None else self._awake(row["awake"])
            self._learn(step, _from_json(row["losses"], np.inf), rate, awake)
        else:
            raise ValueError(f"there is no step {shown(step)}")
        return self

    def _learn(self, step: str, losses: NDArray[np.float64], rate: float, awake: NDArray[np.bool_]) -> float:
        """Multiply the weights of those awake by `exp(-rate * losses)`, keep their sum, share some of it out.

        Returns:
            The mixture's loss where it is a log-loss: minus the logarithm of what was left of the weights, by `rate`.
        """
        with self._lock:
            before = np.where(awake, self._log_weights, -np.inf)
            whole = _log_sum(before)
            after = before - rate * np.where(awake, losses, 0.0)
            left = _log_sum(after)
            if whole == -np.inf or left == -np.inf:
                raise ValueError(
                    "no expert that is awake and has a positive weight gives this answer a probability: leave the "
                    "answer out, or give such an expert a weight by `join` or by `share`"
                )
            after += whole - left
            if self._share:
                even = whole + math.log(self._share) - math.log(awake.sum())
                after = np.where(awake, np.logaddexp(after + math.log1p(-self._share), even), -np.inf)
            moved = np.where(awake, after, self._log_weights)
            # Rounding must not add up over many answers.
            self._log_weights = moved - _log_sum(moved)
            said = None if awake.all() else awake.tolist()
            self._write({"step": step, "losses": _to_json(np.where(awake, losses, 0.0)), "awake": said})
            return float((whole - left) / rate)

    def _log_probs(self, log_probs: ArrayLike, awake: NDArray[np.bool_]) -> NDArray[np.float64]:
        given = _numbers("log_probs", log_probs, len(self))
        if not (given[awake] <= 0).all():
            raise ValueError(f"log_probs must be at most 0, and numbers: got {shown(given.tolist())}")
        return given

    def _awake(self, awake: ArrayLike | None) -> NDArray[np.bool_]:
        if awake is None:
            return np.ones(len(self), dtype=bool)
        taking = np.asarray(awake)
        if taking.dtype != np.bool_ or taking.shape != (len(self),) or not taking.any():
            raise ValueError(f"awake must be {len(self)} times true or false, not all false: got {shown(awake)}")
        return taking

    def _needed_rate(self) -> float:
        if self._rate is None:
            raise ValueError(
                "losses between 0 and 1 need a learning_rate: give OnlineWeights one, for N answers and T experts "
                "sqrt(8 ln(T) / N)"
            )
        return self._rate

    def _write(self, row: dict[str, Any]) -> None:
        if self._log_file is not None:
            append_json_lines(self._log_file, [{**row, "log_weights": _to_json(self._log_weights)}])


def regret_bound(
    expert_weight: float,
    answers: int,
    *,
    learning_rate: float | None = None,
    share: float = 0.0,
    num_experts: int = 1,
    switches: int = 0,
    verdicts: bool = False,
) -> float:
    """Return how much more than an expert the mixture may lose over `answers` answers, whatever they are.

    With `share`, the comparison may be with a sequence of experts that changes `switches` times. Without it, an expert
    may be asleep at any of the answers, and the regret is over those at which it was awake.

    Args:
        expert_weight: the (first) expert's weight before the first answer, of 1 in all.
        answers: N.
        learning_rate: that of `learn_losses`; None gives the bound of `learn_answer`, in nats.
        share: that of the weights.
        num_experts: T, which counts with `share` and with `verdicts`.
        switches: how often the expert compared with changes.
        verdicts: whether the losses are known by verdicts alone. Then this bounds the mean regret over draws.

    Raises:
        TypeError: a number that is none.
        ValueError: a number outside its range, or switches without a share.
    """
    require_numbers(expert_weight=expert_weight)
    require_numbers(whole=True, answers=answers, num_experts=num_experts, switches=switches)
    _check_rates(learning_rate, share)
    if not 0 < expert_weight <= 1:
        raise ValueError(f"expert_weight must be above 0 and at most 1, got {shown(expert_weight)}")
    if num_experts < 1 or answers < 1 or not 0 <= switches < answers:
        raise ValueError("num_experts and answers must be at least 1, and switches at least 0 and below answers")
    if verdicts and learning_rate is None:
        raise ValueError("verdicts need the learning_rate of the weights")
    bound = -math.log(expert_weight)
    if share:
        # Of what an expert keeps or gets in sharing. The last answer is followed by nobody.
        bound -= (answers - 1 - switches) * math.log(1 - share + share / num_experts)
        bound -= switches * math.log(share / num_experts)
    elif switches:
        raise ValueError("without a share no bound holds against experts that change: give `share`")
    if learning_rate is None:
        return bound
    spread = learning_rate * num_experts / 2 if verdicts else learning_rate / 8
    return bound / learning_rate + spread * answers


def _check_rates(learning_rate: float | None, share: float) -> None:
    require_numbers(share=share)
    if learning_rate is not None:
        require_numbers(learning_rate=learning_rate)
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {shown(learning_rate)}")
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, got {shown(share)}")


def _numbers(name: str, values: ArrayLike, count: int | None = None) -> NDArray[np.float64]:
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, one for each expert: got {shown(values)}") from error
    if numbers.ndim != 1 or not len(numbers) or (count is not None and len(numbers) != count):
        wanted = "one number for each expert" if count is None else f"{count} numbers, one for each expert"
        raise ValueError(f"{name} must be {wanted}: got {shown(numbers.tolist())}")
    return numbers


def _log_sum(logs: NDArray[np.float64]) -> float:
    most = logs.max()
    return float(most) if most == -np.inf else float(most + np.log(np.exp(logs - most).sum()))


def _to_json(values: NDArray[np.float64]) -> list[float | None]:
    """Return numbers as JSON has them, with every bit; None stands for what is infinite, which JSON has not."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _from_json(values: Sequence[float | None], infinite: float = -np.inf) -> NDArray[np.float64]:
    return np.array([infinite if value is None else value for value in values], dtype=np.float64)


def _begun(row: dict[str, Any]) -> OnlineWeights:
    """Return the weights that the first row of a log file describes."""
    if row["step"] != _BEGIN:
        raise ValueError(f'the first step must be "{_BEGIN}", got {shown(row["step"])}')
    start = _from_json(row["log_weights"])
    weights = OnlineWeights(np.exp(start).tolist(), learning_rate=row["learning_rate"], share=row["share"])
    # The very bits, which the way through the exponential may change.
    weights._log_weights = start
    return weights
