"""The answers that a student learns from: which are used, and whether a cache fits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemw2s.data.questions import check_questions, row_name
from ensemw2s.data.shapes import as_dataset, dataset_of, with_column
from ensemw2s.data.tokens import QuestionFormat
from ensemw2s.inference.label_files import TOP_COLUMNS
from ensemw2s.runtime.values import check_number, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


CACHE_COLUMNS = ("answer_ids", *TOP_COLUMNS, "top_temperature")


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token id means the same to both tokenizers, the end token included."""
    if teacher.get_vocab() != student.get_vocab() or teacher.eos_token_id != student.eos_token_id:
        raise ValueError(
            f"the teacher's tokenizer ({len(teacher.get_vocab())} tokens) and the student's "
            f'({len(student.get_vocab())} tokens) differ: variant="soft" compares distributions token by token and '
            'needs one tokenizer for both; use variant="sft"'
        )


def check_answer_ids(
    answers: Dataset,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    ends: Sequence[int],
    name: str = "this tokenizer",
) -> None:
    """Check that a model's tokenizer, which errors call `name`, reads `answer_ids` as the teacher did who chose them.

    Answers end with one of the ids `ends`, all of them where there is no column `finished`.

    Raises:
        ValueError: tokens that are another text than `answer`, or do not end as the model's answers do; names the row.
    """
    names = [name for name in ("id", "prompt", "answer", "answer_ids", "finished") if name in answers.column_names]
    for index, row in enumerate(answers.select_columns(names)):
        ids = [int(token) for token in row["answer_ids"]]
        ended = bool(ids) and ids[-1] in ends
        prompt = question_format.prompt(row["prompt"], processing_class)
        text = question_format.answer_text(ids[:-1] if ended else ids, prompt).strip()
        wanted = question_format.end_token and row.get("finished", True)
        if text != row["answer"].strip() or ended is not wanted:
            place = row_name(row, index) if "id" in row else f"row {index}"
            raise ValueError(
                f"the answers, {place}: {name} reads the teacher's tokens as {text!r}"
                f"{' and an end token' if ended else ''}, the teacher meant {row['answer']!r}"
                f"{' and an end token' if wanted else ''}: "
                'variant="soft" needs a student with the teacher\'s tokenizer (use variant="sft" with another one), '
                "and answers whose `answer` was not changed without their `answer_ids`"
            )


def check_cache(answers: Dataset, temperature: float, top_logprobs: int | None) -> None:
    """Check that a cache has a row for each token, the temperature asked for, and enough tokens.

    Raises:
        ValueError: names the column, and the row where it is one.
    """
    missing = [name for name in CACHE_COLUMNS if name not in answers.column_names]
    if missing:
        raise ValueError(
            f"train_dataset has no column {missing[0]!r}: a cache of a teacher has {', '.join(CACHE_COLUMNS)}; "
            "write it with TokenEnsemble.label(..., top_logprobs=k) or student.teacher.cache_teacher"
        )
    found = set(answers["top_temperature"])
    if found != {temperature}:
        raise ValueError(
            f"the cache in train_dataset was written at temperature {', '.join(map(str, sorted(found)))}, the student "
            f"is to learn at {temperature}: a mixture cannot be brought to another temperature later; write it again"
        )
    width = None
    rows = answers.select_columns(list(CACHE_COLUMNS)).with_format("numpy")
    for index, row in enumerate(rows):
        shapes = [row[name].shape for name in TOP_COLUMNS]
        width = width or shapes[0][-1]
        if shapes != [(len(row["answer_ids"]), width)] * 2:
            raise ValueError(
                f"train_dataset, row {index}: top_token_ids and top_log_probs have shapes {shapes[0]} and {shapes[1]}, "
                f"expected {(len(row['answer_ids']), width)}: one row per answer token, as many tokens in every row"
            )
        log_probs = np.asarray(row["top_log_probs"], dtype=np.float64)
        # NaN is at most 0 in no way; rounding may lift a logarithm or a sum a little.
        if not (bool((log_probs <= 1e-3).all()) and bool((np.exp(log_probs).sum(-1) <= 1 + 1e-3).all())):
            raise ValueError(
                f"train_dataset, row {index}: top_log_probs are no log-probabilities (each at most 0, and those of a "
                "token at most 1 together as probabilities): the cache is damaged; write it again"
            )
    if top_logprobs is not None and (width or 0) < top_logprobs:
        raise ValueError(
            f"top_logprobs={top_logprobs}, but the cache in train_dataset keeps {width} tokens: label with more, or "
            "ask for fewer"
        )


def gold_rows(answers: Dataset) -> np.ndarray:
    """Return bool [N]: which rows say in a column `gold` that their answer is ground truth; none without that column.

    Raises:
        ValueError: a value that is neither true nor false, nor missing; names the row.
    """
    values = answers["gold"] if "gold" in answers.column_names else [False] * len(answers)
    for index, value in enumerate(values):
        if value not in (None, False, True):
            raise ValueError(
                f"the answers, row {index}: gold is {shown(value)}, expected true (the answer is ground truth) or false"
            )
    return np.array([bool(value) for value in values], dtype=bool)


def with_gold(answers: Dataset, questions: Any) -> Dataset:
    """Return a teacher's answers and, behind them, questions whose answers are known, marked in a column `gold`.

    A student is taught gold answers as they are: none is left out, and `relabel` never asks for them. One of
    `variant="soft"` learns distributions, which gold answers do not have, and refuses them.

    Args:
        answers: rows with `id`, `prompt` and `answer`, as `TokenEnsemble.label` returns them.
        questions: rows with `prompt` and `answer` (and `choices`, if `answers` have them), in any shape that
            `ensemw2s.data.shapes.as_dataset` takes. They get the id "gold " and theirs.

    Raises:
        TypeError, ValueError: questions that `check_questions` refuses.
    """
    known = check_questions(questions, "questions")
    names = [name for name in ("id", "prompt", "answer", "choices") if name in answers.column_names]
    rows = [{**row, "id": f"gold {row['id']}", "gold": True} for row in known.select_columns(names)]
    taught = answers.select_columns(
        [name for name in (*names, "finished", "confidence") if name in answers.column_names]
    )
    both = dataset_of([*({**row, "gold": False} for row in taught), *rows], "the answers")
    # In which format the answers were asked for.
    both.info.description = answers.info.description
    return both


def _with_gold_finished(answers: Dataset) -> Dataset:
    """Return the rows with `finished` true where the answer is ground truth, which no teacher's end could cut off."""
    gold = gold_rows(answers)
    if "finished" not in answers.column_names or not gold.any():
        return answers
    finished = [bool(value) or known for value, known in zip(answers["finished"], gold.tolist(), strict=True)]
    return with_column(answers.remove_columns("finished"), "finished", finished)


def usable_answers(
    answers: Any,
    *,
    min_confidence: float | None = None,
    keep_fraction: float | None = None,
    keep_unfinished: bool = False,
) -> Dataset:
    """Return the rows whose answer is not empty, not cut off, and, if asked for, confident enough.

    The settings are those of `StudentConfig`. Rows count as finished where there is no column `finished`. Of equally
    confident rows the earlier ones are kept, and fewer than `keep_fraction` says if fewer are usable. Rows whose answer
    is ground truth (`gold_rows`) count as finished, are never left out, and have no part in `keep_fraction`. More than
    half of the rows left out, as empty or cut off, or by `min_confidence`, come with a warning.

    Raises:
        ValueError: nothing is left, an answer is no text, or there is no `answer` column, or no `confidence` column to
            filter by; a value of `gold` that is neither true nor false.
    """
    answers = _with_gold_finished(as_dataset(answers, "train_dataset"))
    names = answers.column_names
    if "answer" not in names:
        raise ValueError(
            f"the dataset to train on has no column 'answer', only {', '.join(names) or 'none'}: "
            "label it with TokenEnsemble.label"
        )
    for name, value in (("min_confidence", min_confidence), ("keep_fraction", keep_fraction)):
        if value is not None:
            check_number(name, value)
            if "confidence" not in names:
                raise ValueError(
                    f"{name}={value} needs a column `confidence`; the dataset has {', '.join(names)}. "
                    "Label it with TokenEnsemble.label, or leave it out"
                )
    columns = answers.select_columns([name for name in ("answer", "finished", "confidence") if name in names])
    rows = dict(enumerate(columns))
    gold = gold_rows(answers)
    confidence = np.array(answers["confidence"] if "confidence" in names else [], dtype=float)
    kept = [i for i, row in rows.items() if str(row["answer"] or "").strip()]
    empty = len(rows) - len(kept)
    if not keep_unfinished:
        kept = [i for i in kept if rows[i].get("finished", True)]
    cut = len(rows) - empty - len(kept)
    unsure: list[int] = []
    if min_confidence is not None:
        unsure = [i for i in kept if not gold[i] and not confidence[i] >= min_confidence]
        kept = sorted(set(kept) - set(unsure))
    if keep_fraction is not None:
        # An unknown confidence, NaN, is never among the most confident.
        ranked = sorted((i for i in kept if confidence[i] <= 0 and not gold[i]), key=lambda i: -confidence[i])
        known = [i for i in kept if gold[i]]
        kept = sorted(known + ranked[: math.ceil(keep_fraction * int((~gold).sum()))])
    known_confidence = confidence[np.isfinite(confidence)]
    if not kept:
        highest = f" (the highest confidence is {known_confidence.max():.3g})" if known_confidence.size else ""
        left_out = {
            "empty": (empty, "train the teacher longer"),
            "cut off before their end": (cut, "let the teacher answer with more max_new_tokens, or train it longer"),
            "not confident enough": (len(rows) - empty - cut, f"lower min_confidence{highest}"),
        }
        reasons = [f"{count} are {why}" for why, (count, _) in left_out.items() if count]
        remedies = [remedy for count, remedy in left_out.values() if count]
        raise ValueError(
            f"none of the {len(rows)} answers is left to train on: {', '.join(reasons)}. To do: {'; '.join(remedies)}"
        )
    if 2 * (empty + cut) > len(rows):
        warnings.warn(
            f"{empty + cut} of the {len(rows)} answers are left out of the training: {empty} are empty, {cut} were cut "
            "off before their end. Let the teacher answer with more max_new_tokens if its answers are long; a teacher "
            "that never ends has not learned to. keep_unfinished=True trains on what was cut off",
            stacklevel=3,
        )
    if 2 * len(unsure) > len(rows):
        median = f"; the median confidence is {np.median(known_confidence):.2g}" if known_confidence.size else ""
        warnings.warn(
            f"{len(unsure)} of the {len(rows)} answers are left out of the training: min_confidence={min_confidence:g} "
            f"is above their confidence, a mean log-probability per token{median}. Lower min_confidence, or keep a "
            "share of the answers with keep_fraction",
            stacklevel=3,
        )
    return check_questions(answers.select(kept), "train_dataset")
