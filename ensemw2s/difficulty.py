"""Difficulty of questions, rated by cross-fitting, and the cut between easy and hard (method, "Difficulty")."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from ensemw2s import processes
from ensemw2s.adapters import check_peft_config
from ensemw2s.checkpoints import discard_checkpoints
from ensemw2s.claims import Kind, claimed
from ensemw2s.data import QuestionFormat, check_disjoint, check_questions, question_key, tokenize_questions
from ensemw2s.files import read_json, write_json
from ensemw2s.identity import describe_model, digest_questions, digest_tokenizer
from ensemw2s.models import load_model, load_tokenizer, source_of
from ensemw2s.scoring import AnswerScores, score_answers
from ensemw2s.training import PRESENTATION, AnswerTrainingArguments, fine_tune, on_device
from ensemw2s.values import check_number, is_finite_number, shown, shown_names

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

RATING = Kind("difficulty", "a rating of difficulty", ("fold-*.json",))
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_REMEDY = (
    "Rate them by models that are trained longer (if all seem hard) or shorter (if all seem easy), use a finer scale "
    "of your own, or lower `resolution` if smaller differences mean something"
)


def rate_difficulty(
    model: str | PreTrainedModel,
    questions: Dataset,
    args: AnswerTrainingArguments,
    *,
    folds: int = 5,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    question_format: QuestionFormat | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Rate every question by a model that was fine-tuned on other questions (cross-fitting).

    Once per fold, `model` is fine-tuned from its pre-trained state on all answer tokens of the other folds, always
    with the same seed [choice], and scores the answers of that fold. Neither folds nor ratings depend on the order of
    the rows. A finished fold is kept in `args.output_dir` (`fold-<i>.json`), and the same call goes on behind it.

    Several processes (`accelerate launch`, `torchrun`) share out training and scoring as in `BoostingTrainer`: each
    makes this call, and the main one writes.

    Args:
        model: a source of `models.load_model`, or a model (which is left as it is).
        questions: columns `prompt` and `answer`.
        args: how the raters are trained, their seed, and the folder.
        folds: k, at least 2 and at most the number of distinct questions.
        processing_class: the tokenizer; None loads the one of `model`.
        peft_config: train adapters with this configuration; None trains all weights.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `models.load_model`.

    Returns:
        `questions` with `difficulty` (float64, see `answer_difficulty`) and `fold` (int64, from 0), in place of what
        they had under these names.

    Raises:
        ValueError: bad questions, too few or too many folds, adapters that cannot be trained here, or an `output_dir`
            that belongs to another rating; names what differs.
        FloatingPointError: the training of a fold diverged, or its model gives NaN.
    """
    if peft_config is not None:
        check_peft_config(peft_config, "peft_config")
    questions = check_questions(questions, "questions")
    fold = assign_folds(questions, folds, args.seed)
    content = list(zip(questions["prompt"], questions["answer"], strict=True))
    # The order of the examples decides the batches, so they get one of their own.
    order = np.array(sorted(range(len(content)), key=lambda i: _rank(args.seed, *content[i])))
    tokenizer = processing_class or load_tokenizer(source_of(model))
    raters = _Raters(model, args, tokenizer, peft_config, question_format or QuestionFormat(), model_init_kwargs or {})
    difficulty = np.empty(len(questions))
    difficulty[order] = raters.rate(questions.select(order), fold[order], folds)
    had = [name for name in ("difficulty", "fold") if name in questions.column_names]
    return questions.remove_columns(had).add_column("difficulty", difficulty).add_column("fold", fold)


def assign_folds(questions: Dataset, folds: int, seed: int = 0) -> np.ndarray:
    """Return int64 [N], the fold of each question, by a hash of seed and prompt.

    Folds differ by at most one in their number of distinct questions; rows that repeat a question share its fold.

    Raises:
        ValueError: `folds` is below 2 or above the number of distinct questions.
    """
    check_number("folds", folds, whole=True)
    keys = [question_key(prompt) for prompt in questions["prompt"]]
    ranked = sorted(set(keys), key=lambda key: _rank(seed, key))
    if folds > len(ranked):
        raise ValueError(f"folds must be between 2 and the number of distinct questions, {len(ranked)}; got {folds}")
    fold = {key: rank % folds for rank, key in enumerate(ranked)}
    return np.array([fold[key] for key in keys], dtype=np.int64)


def answer_difficulty(scores: AnswerScores) -> np.ndarray:
    """Return float64 [N] in [0, 1], the mean of `1 - p(token)` over each answer's tokens, the end token among them."""
    missed = -np.expm1(np.minimum(scores.token_log_probs.astype(np.float64), 0.0))
    return np.add.reduceat(missed, np.cumsum(scores.lengths) - scores.lengths) / scores.lengths


def _rank(seed: int, *text: str) -> str:
    return hashlib.blake2b(json.dumps(["difficulty", seed, *text]).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Raters:
    """One rater per fold, trained and asked in turn; see `rate_difficulty`."""

    model: str | PreTrainedModel
    args: AnswerTrainingArguments
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    question_format: QuestionFormat
    model_init_kwargs: Mapping[str, Any]

    def rate(self, questions: Dataset, fold: np.ndarray, folds: int) -> np.ndarray:
        """Return float64 [N]: the difficulty of each question, by its fold (int64 [N])."""
        examples = tokenize_questions(questions, self.tokenizer, self.question_format, "questions")
        folder = Path(str(self.args.output_dir))
        with claimed(folder, RATING, {"folds": folds, **self._fingerprint(questions)}):
            return self._rate_all(examples, folder, fold, folds)

    def _rate_all(self, examples: Dataset, folder: Path, fold: np.ndarray, folds: int) -> np.ndarray:
        difficulty = np.empty(len(fold))
        for number in range(folds):
            file, held_out = folder / f"fold-{number}.json", fold == number
            if not processes.on_main(file.exists):
                others, asked = (examples.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
                found = self._rate_fold(others, asked, f"rating difficulty, fold {number + 1} of {folds}")
                processes.on_main(write_json, file, found)
                processes.on_main(discard_checkpoints, folder)
            difficulty[held_out] = read_json(file)["difficulty"]
        return difficulty

    def _rate_fold(self, others: Dataset, held_out: Dataset, description: str) -> dict[str, Any]:
        pad = self.tokenizer.eos_token_id
        trained, cost = fine_tune(
            self._fresh_model(), others, self.args, pad_token_id=pad, seed=self.args.seed, description=description,
            peft_config=self.peft_config,
        )  # fmt: skip
        scores = score_answers(
            trained, held_out, pad_token_id=pad, batch_size=self.args.per_device_eval_batch_size,
            description=None if self.args.disable_tqdm else description,
        )  # fmt: skip
        return {"difficulty": answer_difficulty(scores).tolist(), "cost": asdict(cost)}

    def _fresh_model(self) -> Any:
        given = isinstance(self.model, PreTrainedModel)
        return on_device(
            copy.deepcopy(self.model) if given else load_model(self.model, **self.model_init_kwargs), self.args
        )

    def _fingerprint(self, questions: Dataset) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.args.to_dict().items() if name not in PRESENTATION},
            "model": describe_model(self.model),
            "model_init_kwargs": dict(self.model_init_kwargs),
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "question_format": asdict(self.question_format),
            "questions": digest_questions(questions),
            "tokenizer": digest_tokenizer(self.tokenizer),
        }


@dataclass(frozen=True)
class DifficultySplit:
    """Easy and hard questions of one dataset, in its order, and where they were cut.

    Attributes:
        easy: the easiest questions.
        hard: the hardest ones, each harder than every easy one.
        record: plain JSON: `easy_share` and `hard_share` of all `num_questions`, the highest difficulty `easy_up_to` in
            the one and the lowest `hard_from` in the other, and `quantiles` of all ("0.5" is the median).
    """

    easy: Dataset
    hard: Dataset
    record: dict[str, Any]


def split_by_difficulty(
    questions: Dataset,
    easy: float = 0.5,
    hard: float = 0.5,
    *,
    tolerance: float = 0.1,
    resolution: float = 0.01,
    min_values: int = 2,
) -> DifficultySplit:
    """Cut questions into an easy part, the lower quantile of their difficulty, and a hard one, the upper.

    A cut falls between two values, never among questions of the same difficulty: of all such places the nearest to the
    wanted share is taken [choice]. So a scale of few values (grades, hops, numbers of digits) gives other shares than
    the wanted ones, and is refused if they are too far off.

    Args:
        questions: columns `prompt`, `answer` and `difficulty` (numbers, also as text, as CSV files have them).
        easy: the share of the easiest questions that count as easy, above 0.
        hard: the share of the hardest ones that count as hard, above 0; what is between belongs to neither.
        tolerance: how far off a share may be, in [0, 1], besides half a question [choice].
        resolution: difficulties are rounded to its multiples before they are compared, so that differences which mean
            nothing count as ties; 0 compares them as they are [choice].
        min_values: the fewest distinct values that make a scale, at least 2. A rating from k folds with fewer
            than k values can at best tell the folds apart.

    Raises:
        ValueError: no column `difficulty`, a difficulty that is no finite number (names the row), fewer than
            `min_values` values, no cut between two values within the tolerance (says how many questions are tied
            there), a question in both parts, or a setting outside its range.
    """
    check_cut(easy, hard, tolerance, resolution)
    check_number("min_values", min_values, whole=True)
    questions = check_questions(questions, "questions")
    values = _difficulties(questions)
    levels = np.round(values / resolution) if resolution else values
    distinct = len(np.unique(levels))
    if distinct < min_values:
        raise ValueError(
            f"the difficulties of {len(values)} questions have {distinct} distinct values (to within {resolution:g}), "
            f"expected at least {min_values}. {_REMEDY}"
        )
    # One cut where nothing is left between: two roundings could choose two.
    shares = {"easy": easy, "hard": easy if math.isclose(easy + hard, 1) else 1 - hard}
    sizes = {part: _cut(values, levels, part, share, tolerance, resolution) for part, share in shares.items()}
    ranks = np.argsort(np.argsort(levels, kind="stable"), kind="stable")
    rows = [np.flatnonzero(ranks < sizes["easy"]), np.flatnonzero(ranks >= sizes["hard"])]
    parts = {name: questions.select(chosen) for name, chosen in zip(("easy", "hard"), rows, strict=True)}
    check_disjoint(parts)
    return DifficultySplit(**parts, record={
        "kind": "difficulty", "easy_share": len(rows[0]) / len(values), "hard_share": len(rows[1]) / len(values),
        "easy_up_to": float(values[rows[0]].max()), "hard_from": float(values[rows[1]].min()),
        "quantiles": {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)},
        "num_questions": len(values),
    })  # fmt: skip


def _cut(values: np.ndarray, levels: np.ndarray, part: str, below: float, tolerance: float, resolution: float) -> int:
    """Return how many questions are below the cut that `part` borders on, the share `below` being wanted."""
    ordered, count = np.sort(levels), len(levels)
    places = np.flatnonzero(np.diff(ordered)) + 1
    # Each part gets a question at least.
    wanted = min(max(below * count, 1), count - 1)
    size = int(places[np.abs(places - wanted).argmin()])
    if abs(size - wanted) <= tolerance * count + 0.5:
        return size
    tied = levels == ordered[int(wanted)]
    share = size / count if part == "easy" else 1 - size / count
    raise ValueError(
        f"the difficulty is degenerate: {tied.mean():.0%} of {count} questions have a difficulty of "
        f"{np.median(values[tied]):.4g} (to within {resolution:g}), and the {part} part would have to end among them. "
        f"The nearest cut between two values makes it {share:.0%}, not within {tolerance:.0%} of the wanted share. "
        f"{_REMEDY}; or set {part}={share:.2f}"
    )


def check_cut(easy: float, hard: float, tolerance: float, resolution: float) -> None:
    """Raise ValueError or TypeError, naming it, if a setting of `split_by_difficulty` is outside its range."""
    for name, value in (("easy", easy), ("hard", hard)):
        check_number(name, value, "share")
    if not easy + hard <= 1 + 1e-9:
        raise ValueError(f"easy and hard must be shares above 0, at most 1 together; got easy={easy} and hard={hard}")
    check_number("tolerance", tolerance)
    check_number("resolution", resolution)


def _difficulties(questions: Dataset) -> np.ndarray:
    """Return float64 [N], the column `difficulty`."""
    if "difficulty" not in questions.column_names:
        raise ValueError(
            f"the questions have no column 'difficulty', only {shown_names(questions.column_names)}: rate them with "
            "rate_difficulty (in an experiment: data.difficulty.folds=5), or name the column that holds it (`columns`)"
        )
    for row in questions.select_columns(["id", "difficulty"]):
        if not is_finite_number(row["difficulty"]):
            raise ValueError(
                f"questions, id {row['id']:.60}: difficulty is {shown(row['difficulty'])}, expected a finite number. "
                "Fill it in, or leave the row out"
            )
    return np.array(questions["difficulty"], dtype=np.float64)
