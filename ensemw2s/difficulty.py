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
from ensemw2s.checkpoints import discard_checkpoints
from ensemw2s.data import QuestionFormat, check_disjoint, check_questions, question_key, tokenize_questions
from ensemw2s.files import read_json, write_json
from ensemw2s.models import load_model, load_tokenizer, source_of
from ensemw2s.scoring import AnswerScores, score_answers
from ensemw2s.trainer import describe_model, digest_questions, plain
from ensemw2s.training import PRESENTATION, AnswerTrainingArguments, fine_tune, on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class DifficultyConfig:
    """How questions of one source are split by their difficulty.

    Attributes:
        easy: the share of the easiest questions that count as easy, above 0.
        hard: the share of the hardest ones that count as hard, above 0; what is between belongs to neither.
        folds: rate the questions by cross-fitting with so many folds, at least 2 (`rate_difficulty`); None takes the
            column `difficulty` that they have.
        tolerance: how far the shares may be from `easy` and `hard` for the cut to fall between two values, in [0, 1]
            [choice].
        resolution: difficulties are rounded to its multiples before they are compared, so that differences which mean
            nothing count as ties; 0 compares them as they are [choice].

    Raises:
        ValueError: a value outside its range; names it.
    """

    easy: float = 0.5
    hard: float = 0.5
    folds: int | None = None
    tolerance: float = 0.1
    resolution: float = 0.01

    def __post_init__(self) -> None:
        if not (self.easy > 0 and self.hard > 0 and self.easy + self.hard <= 1 + 1e-9):
            raise ValueError(
                f"easy and hard must be shares above 0 that make up at most 1 together, got easy={self.easy} and "
                f"hard={self.hard}"
            )
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"folds must be at least 2, or None for the column `difficulty`; got {self.folds}")
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance is a share in [0, 1], got {self.tolerance}")
        if not 0 <= self.resolution < math.inf:
            raise ValueError(f"resolution must be at least 0 and finite, got {self.resolution}")


# Rating


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

    `model` is fine-tuned once per fold, each time from its pre-trained state and with the same seed, on all answer
    tokens of the other folds, and scores the answers of that fold. The difficulty of a question is the mean of
    `1 - p(gold token)` over its answer tokens (the end token is one), teacher forced. Neither folds nor ratings depend
    on the order of the rows.

    Each finished fold is kept in `args.output_dir` (`fold-<i>.json`), and the same call goes on behind it. Several
    processes (`accelerate launch`, `torchrun`) share out training and scoring as in `BoostingTrainer`: each makes this
    call, and the main one writes.

    Args:
        model: a source of `models.load_model`, or a model (which is left as it is).
        questions: columns `prompt` and `answer`.
        args: how the raters are trained, and their seed; `output_dir` is where the folds are kept.
        folds: k, at least 2 and at most the number of distinct questions.
        processing_class: the tokenizer; None loads the one of `model`.
        peft_config: train adapters with this configuration; None trains all weights.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `models.load_model`.

    Returns:
        `questions` with columns `difficulty` (float64, in [0, 1]) and `fold` (int64, from 0), in place of what they
        had under these names.

    Raises:
        ValueError: bad questions, too few or too many folds, or an `output_dir` that belongs to another rating; names
            what differs.
        FloatingPointError: the training of a fold diverged, or its model gives NaN.
    """
    questions = check_questions(questions, "questions")
    fold = assign_folds(questions, folds, args.seed)
    # In an order of their own: the order of the rows decides the batches.
    order = sorted(range(len(questions)), key=lambda i: _rank(args.seed, questions[i]["prompt"], questions[i]["answer"]))
    rater = _Rater(model, args, processing_class, peft_config, question_format, model_init_kwargs)
    difficulty = np.empty(len(questions))
    difficulty[order] = rater.rate(questions.select(order), fold[order])
    had = [name for name in ("difficulty", "fold") if name in questions.column_names]
    return questions.remove_columns(had).add_column("difficulty", difficulty).add_column("fold", fold)


def assign_folds(questions: Dataset, folds: int, seed: int = 0) -> np.ndarray:
    """Return int64 [N], the fold of each question, by a hash of seed and prompt.

    Folds differ by at most one in their number of distinct questions; rows that repeat a question share its fold.

    Raises:
        ValueError: `folds` is below 2 or above the number of distinct questions.
    """
    keys = [question_key(prompt) for prompt in questions["prompt"]]
    ranked = sorted(set(keys), key=lambda key: _rank(seed, key))
    if not 2 <= folds <= len(ranked):
        raise ValueError(
            f"folds must be at least 2 and at most the number of distinct questions, {len(ranked)}; got {folds}"
        )
    fold = {key: rank % folds for rank, key in enumerate(ranked)}
    return np.array([fold[key] for key in keys], dtype=np.int64)


def answer_difficulty(scores: AnswerScores) -> np.ndarray:
    """Return float64 [N] in [0, 1], the mean over each answer's tokens of `1 - p(token)`."""
    missed = -np.expm1(np.minimum(scores.token_log_probs.astype(np.float64), 0.0))
    return np.add.reduceat(missed, np.cumsum(scores.lengths) - scores.lengths) / scores.lengths


class _Rater:
    """Trains and scores fold by fold, and keeps what is finished; see `rate_difficulty`."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: AnswerTrainingArguments,
        processing_class: PreTrainedTokenizerBase | None,
        peft_config: PeftConfig | None,
        question_format: QuestionFormat | None,
        model_init_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.model = model
        self.args = args
        self.folder = Path(str(args.output_dir))
        self.processing_class = processing_class or load_tokenizer(source_of(model))
        self.peft_config = peft_config
        self.question_format = question_format or QuestionFormat()
        self.model_init_kwargs = dict(model_init_kwargs or {})

    def rate(self, questions: Dataset, fold: np.ndarray) -> np.ndarray:
        """Return float64 [N]: the difficulty of each question, whose folds are `fold` (int64 [N])."""
        examples = tokenize_questions(questions, self.processing_class, self.question_format, "questions")
        count = int(fold.max()) + 1
        processes.on_main(self._claim_folder, questions, count)
        difficulty = np.empty(len(questions))
        for number in range(count):
            file = self.folder / f"fold-{number}.json"
            if not processes.on_main(file.exists):
                name = f"rating difficulty, fold {number + 1} of {count}"
                self._rate_fold(file, examples.select(np.flatnonzero(fold != number)),
                                examples.select(np.flatnonzero(fold == number)), name)  # fmt: skip
            difficulty[fold == number] = read_json(file)["difficulty"]
        return difficulty

    def _rate_fold(self, file: Path, others: Dataset, held_out: Dataset, name: str) -> None:
        pad = self.processing_class.eos_token_id
        trained, cost = fine_tune(
            self._fresh_model(), others, self.args, pad_token_id=pad, seed=self.args.seed, description=name,
            peft_config=self.peft_config,
        )  # fmt: skip
        scores = score_answers(
            trained, held_out, pad_token_id=pad, batch_size=self.args.per_device_eval_batch_size,
            description=None if self.args.disable_tqdm else name,
        )  # fmt: skip
        processes.on_main(self._keep, file, {"difficulty": answer_difficulty(scores).tolist(), "cost": asdict(cost)})

    def _keep(self, file: Path, found: Mapping[str, Any]) -> None:
        write_json(file, found)
        discard_checkpoints(self.folder)

    def _fresh_model(self) -> Any:
        if isinstance(self.model, PreTrainedModel):
            return on_device(copy.deepcopy(self.model), self.args)
        return on_device(load_model(self.model, **self.model_init_kwargs), self.args)

    def _claim_folder(self, questions: Dataset, folds: int) -> None:
        """Refuse a folder that holds another rating, naming what differs."""
        file = self.folder / "difficulty.json"
        settings = {name: value for name, value in self.args.to_dict().items() if name not in PRESENTATION}
        mine = {
            **settings,
            "folds": folds,
            "model": describe_model(self.model),
            "model_init_kwargs": self.model_init_kwargs,
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "question_format": asdict(self.question_format),
            "questions": digest_questions(questions),
        }
        mine = json.loads(json.dumps(mine, default=plain))
        theirs = read_json(file) if file.exists() else mine
        differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if differing:
            raise ValueError(
                f"{self.folder} holds another rating of difficulty; differing: {', '.join(differing)}. "
                "Choose another output_dir, or delete that folder"
            )
        write_json(file, mine)


def _rank(seed: int, *text: str) -> str:
    return hashlib.blake2b(json.dumps(["difficulty", seed, *text]).encode(), digest_size=16).hexdigest()


# Splitting


@dataclass(frozen=True)
class DifficultySplit:
    """Easy and hard questions of one dataset, in its order, and where they were cut.

    Attributes:
        easy: the easiest questions.
        hard: the hardest ones; each is harder than every easy one.
        easy_up_to: the highest difficulty in `easy`.
        hard_from: the lowest difficulty in `hard`.
        num_questions: how many there were.
        quantiles: of all their difficulties, by their level ("0.5" is the median).
    """

    easy: Dataset
    hard: Dataset
    easy_up_to: float
    hard_from: float
    num_questions: int
    quantiles: dict[str, float]

    @property
    def easy_share(self) -> float:
        """Return the share of all questions that are easy."""
        return len(self.easy) / self.num_questions

    @property
    def hard_share(self) -> float:
        """Return the share of all questions that are hard."""
        return len(self.hard) / self.num_questions

    def record(self) -> dict[str, Any]:
        """Return what the split came to, as plain JSON."""
        names = ("easy_share", "hard_share", "easy_up_to", "hard_from", "num_questions", "quantiles")
        return {"kind": "difficulty", **{name: getattr(self, name) for name in names}}


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
    wanted share is taken [choice]. So a scale of few values (grades, hops, numbers of digits) gives shares that differ
    from the wanted ones, by `tolerance` at most (and by half a question).

    Args:
        questions: columns `prompt`, `answer` and `difficulty` (numbers, also as text, as CSV files have them).
        easy: see `DifficultyConfig`.
        hard: see `DifficultyConfig`.
        tolerance: see `DifficultyConfig`.
        resolution: see `DifficultyConfig`.
        min_values: refuse a difficulty with fewer distinct values, `resolution` considered; at least 2. A rating from k
            folds that has fewer than k tells folds apart at best.

    Raises:
        ValueError: no column `difficulty`, a difficulty that is no finite number (names the row), fewer than
            `min_values` values, no cut between two values within the tolerance (says how many questions are tied
            there), a question in both parts, or settings that `DifficultyConfig` refuses.
    """
    DifficultyConfig(easy, hard, tolerance=tolerance, resolution=resolution)
    questions = check_questions(questions, "questions")
    values = _difficulties(questions)
    levels = np.round(values / resolution) if resolution else values
    ordered = np.sort(levels)
    # The sizes of a lower part that ends between two levels.
    places = np.flatnonzero(np.diff(ordered)) + 1
    if len(places) + 1 < max(2, min_values):
        raise ValueError(
            f"the difficulties of {len(values)} questions have {len(places) + 1} distinct values{_to_within(resolution)}, "
            f"expected at least {max(2, min_values)}. {_REMEDY}"
        )
    lower = _nearest(places, easy * len(values))
    # One cut where nothing is left between: two roundings could choose two.
    upper = lower if math.isclose(easy + hard, 1) else _nearest(places, (1 - hard) * len(values))
    for name, wanted, place in (("easy", easy, lower), ("hard", hard, len(values) - upper)):
        if abs(place - wanted * len(values)) > tolerance * len(values) + 0.5:
            at = ordered[min(int(wanted * len(values) if name == "easy" else (1 - wanted) * len(values)), len(values) - 1)]
            tied = levels == at
            raise ValueError(
                f"the difficulty is degenerate: {tied.mean():.0%} of {len(values)} questions have a difficulty of "
                f"{np.median(values[tied]):.4g}{_to_within(resolution)}, and the {name} part of {wanted:.0%} would end "
                f"among them. The nearest cut between two values makes it {place / len(values):.0%}, which is not "
                f"within the tolerance of {tolerance:.0%}: set {name}={place / len(values):.2f}, or else: {_REMEDY}"
            )
    is_easy, is_hard = levels < ordered[lower], levels >= ordered[upper]
    parts = {"easy": questions.select(np.flatnonzero(is_easy)), "hard": questions.select(np.flatnonzero(is_hard))}
    check_disjoint(parts)
    return DifficultySplit(
        parts["easy"], parts["hard"], float(values[is_easy].max()), float(values[is_hard].min()), len(values),
        {str(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)},
    )  # fmt: skip


_REMEDY = (
    "Rate the questions by models that are trained longer (if all seem hard) or shorter (if all seem easy), use a "
    "finer scale of your own, or lower `resolution` if smaller differences mean something"
)


def _to_within(resolution: float) -> str:
    return f" (to within {resolution:g})" if resolution else ""


def _nearest(places: np.ndarray, wanted: float) -> int:
    return int(places[np.abs(places - wanted).argmin()])


def _difficulties(questions: Dataset) -> np.ndarray:
    """Return float64 [N], the column `difficulty`."""
    if "difficulty" not in questions.column_names:
        raise ValueError(
            f"the questions have no column 'difficulty', only {', '.join(questions.column_names)}: rate them (with "
            "rate_difficulty, in an experiment data.difficulty.folds=5), or name the column that holds it"
        )
    values = np.empty(len(questions))
    for index, row in enumerate(questions.select_columns(["id", "difficulty"])):
        try:
            values[index] = row["difficulty"]
        except (TypeError, ValueError):
            values[index] = np.nan
        if not np.isfinite(values[index]):
            raise ValueError(
                f"questions, id {row['id']}: difficulty is {row['difficulty']!r}, expected a finite number. Fill it in, "
                "or leave the row out"
            )
    return values
