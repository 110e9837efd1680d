"""Rows of published question sets turned into our columns, and multiple choice turned into yes or no."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ensemw2s.runtime.values import shown, shown_names

if TYPE_CHECKING:
    from datasets import Dataset


BINARY_CHOICES = ["no", "yes"]
_FINAL_ANSWER = "####"


class Schema(NamedTuple):
    """What a question set calls its columns on the hub.

    Attributes:
        columns: those that are read.
        passage: the one that holds a text to answer from, or None.
        context: whether the passage goes into the prompt unless the user says otherwise.
    """

    columns: tuple[str, ...]
    passage: str | None = None
    context: bool = False


# SciQ is asked without its passage, which would give the answer away, as in weak-to-strong experiments since Burns et
# al. (2023); a question of QuaRTz cannot be answered without one [choice].
SCHEMAS = {
    "arc": Schema(("question", "choices", "answerKey")),
    "gsm8k": Schema(("question", "answer")),
    "quartz": Schema(("question", "choices", "answerKey", "para"), passage="para", context=True),
    "sciq": Schema(
        ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"), passage="support"
    ),
}


def from_schema(dataset: Dataset, schema: str, context: bool | None, name: str) -> Dataset:
    """Return the rows of a published question set as `prompt`, `answer` and, but for GSM8K, `choices`.

    The answer of GSM8K is what follows `####`, without the commas that group thousands. Choices that a row names
    twice are kept once; those of SciQ are sorted, so that their order does not tell the right one.

    Args:
        dataset: rows with the columns that the set has on the hub.
        schema: a key of `SCHEMAS`; "arc" is ARC-Easy and ARC-Challenge alike.
        context: put the passage in front of the question; None is the schema's own default.
        name: begins every error.

    Returns:
        `prompt`, `answer`, `choices`, and `id` where the rows have one.

    Raises:
        ValueError: an unknown schema, a missing column, `context` for a set without a passage, or a row whose answer
            cannot be found; names the row.
    """
    from datasets import Dataset

    if not isinstance(schema, str) or schema not in SCHEMAS:
        raise ValueError(f"{name}: unknown schema {shown(schema)}, expected one of {', '.join(SCHEMAS)}")
    known = SCHEMAS[schema]
    missing = [column for column in known.columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {missing[0]!r}, which {schema} has (its columns are "
            f"{shown_names(dataset.column_names)}): name another schema, or map the columns with `columns`"
        )
    if not isinstance(context, bool | None) or (context and known.passage is None):
        raise ValueError(
            f"{name}: context must be true or false, and {schema} needs a passage for it; got {shown(context)}"
        )
    with_passage = known.context if context is None else context
    rows = []
    for index, row in enumerate(dataset):
        passage = str(row[known.passage] or "").strip() if with_passage and known.passage else ""
        question = str(row["question"] or "").strip()
        mapped = {"prompt": f"{passage}\n{question}" if passage and question else question}
        mapped |= {"id": str(row["id"])} if "id" in row else {}
        rows.append(mapped | _answer(row, schema, f"{name}, row {index}"))
    return Dataset.from_list(rows)


def _answer(row: Mapping[str, Any], schema: str, place: str) -> dict[str, Any]:
    if schema == "gsm8k":
        _, found, final = str(row["answer"]).rpartition(_FINAL_ANSWER)
        if not found or not final.strip():
            raise ValueError(f"{place}: the answer {shown(row['answer'])} has nothing behind {_FINAL_ANSWER}")
        return {"answer": final.strip().replace(",", "")}
    if schema == "sciq":
        texts = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
        answer, *others = [str(text or "").strip() for text in texts]
        return {"answer": answer, "choices": sorted({answer, *filter(None, others)})}
    choices, key = row["choices"], row["answerKey"]
    if not _are_labelled(choices):
        raise ValueError(
            f"{place}: choices is {shown(choices)}, expected an object with text and label, lists of as many texts"
        )
    by_label = {label: text.strip() for label, text in zip(choices["label"], choices["text"], strict=True)}
    if not isinstance(key, str) or key not in by_label:
        raise ValueError(f"{place}: answerKey is {shown(key)}, expected one of the labels {shown_names(by_label)}")
    return {"answer": by_label[key], "choices": list(dict.fromkeys(by_label.values()))}


def _are_labelled(choices: Any) -> bool:
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        return False
    texts, labels = choices["text"], choices["label"]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        return False
    return all(isinstance(item, str) for item in [*texts, *labels])


def binary_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn one question with choices into one that asks whether a proposed answer is right, as Burns et al. do.

    The right answer is proposed for about half of the questions, else one of the wrong ones; which, is decided by a
    hash of prompt and choices, so that it is the same wherever the question stands.

    Args:
        row: `prompt`, `answer` and `choices`; other columns are kept.

    Returns:
        The row with `prompt` ("... Proposed answer: ..."), `answer` ("yes" or "no") and `choices`.
    """
    text = "\n".join([row["prompt"], *row["choices"]])
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    wrong = [choice for choice in row["choices"] if choice != row["answer"]]
    proposed = row["answer"] if number % 2 else wrong[number // 2 % len(wrong)]
    return {
        **row,
        "prompt": f"{row['prompt']}\nProposed answer: {proposed}",
        "answer": BINARY_CHOICES[number % 2],
        "choices": BINARY_CHOICES,
    }
