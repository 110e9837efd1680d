"""Cross-fitted difficulty: every question is rated by a model that never saw its answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from ensemw2s.data.difficulty import assign_folds, random_rank
from ensemw2s.data.questions import check_questions
from ensemw2s.data.shapes import with_column
from ensemw2s.data.tokens import QuestionFormat, checked_format, tokenize_questions
from ensemw2s.inference.scoring import AnswerScores, score_examples
from ensemw2s.models.adapters import check_peft_config
from ensemw2s.models.identity import describe_model, digest_tokenizer
from ensemw2s.models.loading import load_model, tokenizer_for
from ensemw2s.runtime import processes
from ensemw2s.runtime.claims import Kind, claimed
from ensemw2s.runtime.files import read_json, write_json
from ensemw2s.runtime.fingerprint import digest_questions
from ensemw2s.training.arguments import AnswerTrainingArguments
from ensemw2s.training.checkpoints import discard_checkpoints
from ensemw2s.training.fine_tune import PRESENTATION, fine_tune
from ensemw2s.training.trainer import on_device

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

RATING = Kind("difficulty", "a rating of difficulty", ("fold-*.json",))


def rate_difficulty(
    model: str | PreTrainedModel,
    questions: Any,
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
        model: a source of `ensemw2s.load_model`, or a model (which is left as it is).
        questions: columns `prompt` and `answer`, in any shape that `ensemw2s.data.shapes.as_dataset` takes.
        args: how the raters are trained, their seed, and the folder.
        folds: k, at least 2 and at most the number of distinct questions.
        processing_class: the tokenizer; None loads the one of `model`.
        peft_config: train adapters with this configuration; None trains all weights.
        question_format: how a question becomes tokens.
        model_init_kwargs: passed on to `ensemw2s.load_model`.

    Returns:
        `questions` with `difficulty` (float64, see `answer_difficulty`) and `fold` (int64, from 0), in place of what
        they had under these names.

    Raises:
        TypeError: a `question_format` that is none.
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
    order = np.array(sorted(range(len(content)), key=lambda i: random_rank(args.seed, *content[i])))
    tokenizer = tokenizer_for(model, processing_class)
    raters = _Raters(model, args, tokenizer, peft_config, checked_format(question_format), model_init_kwargs or {})
    difficulty = np.empty(len(questions))
    difficulty[order] = raters.rate(questions.select(order), fold[order], folds)
    had = [name for name in ("difficulty", "fold") if name in questions.column_names]
    return with_column(with_column(questions.remove_columns(had), "difficulty", difficulty), "fold", fold)


def answer_difficulty(scores: AnswerScores) -> np.ndarray:
    """Return float64 [N] in [0, 1], the mean of `1 - p(token)` over each answer's tokens, the end token among them."""
    missed = -np.expm1(np.minimum(scores.token_log_probs.astype(np.float64), 0.0))
    return np.add.reduceat(missed, np.cumsum(scores.lengths) - scores.lengths) / scores.lengths


@dataclass(frozen=True)
class _Raters:
    """One rater per fold, trained and asked in turn; see `rate_difficulty`."""

    model: str | PreTrainedModel
    args: AnswerTrainingArguments
    processing_class: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    question_format: QuestionFormat
    model_init_kwargs: Mapping[str, Any]

    def rate(self, questions: Dataset, fold: np.ndarray, folds: int) -> np.ndarray:
        """Return float64 [N]: the difficulty of each question, by its fold (int64 [N])."""
        examples = tokenize_questions(questions, self.processing_class, self.question_format, "questions")
        folder = Path(str(self.args.output_dir))
        difficulty = np.empty(len(fold))
        with claimed(folder, RATING, {"folds": folds, **self._fingerprint(questions)}):
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
        pad, given = self.processing_class.eos_token_id, isinstance(self.model, PreTrainedModel)
        model = copy.deepcopy(self.model) if given else load_model(self.model, **self.model_init_kwargs)
        trained, cost = fine_tune(
            on_device(model, self.args), others, self.args, pad_token_id=pad, seed=self.args.seed,
            description=description, peft_config=self.peft_config,
        )  # fmt: skip
        scores = score_examples(
            trained, held_out, pad_token_id=pad, batch_size=self.args.per_device_eval_batch_size,
            description=None if self.args.disable_tqdm else description,
        )  # fmt: skip
        return {"difficulty": answer_difficulty(scores).tolist(), "cost": asdict(cost)}

    def _fingerprint(self, questions: Dataset) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.args.to_dict().items() if name not in PRESENTATION},
            "model": describe_model(self.model),
            "model_init_kwargs": dict(self.model_init_kwargs),
            "peft_config": None if self.peft_config is None else self.peft_config.to_dict(),
            "question_format": self.question_format.describe(),
            "questions": digest_questions(questions),
            "tokenizer": digest_tokenizer(self.processing_class),
        }
