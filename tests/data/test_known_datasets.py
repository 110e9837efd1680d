"""Published question sets, in the exact columns that they have on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from ensemw2s.data.questions import check_questions, load_questions

ARC = [
    {"id": "Mercury_1", "question": "Which is a gas?", "answerKey": "B",
     "choices": {"text": ["rock", "air", "ice", "sand"], "label": ["A", "B", "C", "D"]}},
    {"id": "NYSEDREGENTS_2", "question": "Which is hot?", "answerKey": "1",
     "choices": {"text": ["the sun", "the moon", "the moon"], "label": ["1", "2", "3"]}},
]  # fmt: skip
QUARTZ = [
    {"id": "QRQA-1", "question": "If it is hotter, the ice melts", "answerKey": "A",
     "choices": {"text": ["faster", "slower"], "label": ["A", "B"]}, "para": "Heat melts ice.", "para_id": "QRSent-1",
     "para_anno": {"effect_prop": "melting"}, "question_anno": {"more_effect_dir": "faster"}},
]  # fmt: skip
SCIQ = [
    {"question": "What do bees make?", "distractor3": "wax", "distractor1": "silk", "distractor2": "wax",
     "correct_answer": "honey", "support": "Bees make honey."},
    {"question": "What is at the core?", "distractor3": "ice", "distractor1": "air", "distractor2": "gold",
     "correct_answer": "iron", "support": ""},
]  # fmt: skip
GSM8K = [
    {"question": "Two and two?", "answer": "Add 2 and 2: <<2+2=4>>4\n#### 4"},
    {"question": "A big one?", "answer": "It is\n#### 1,234"},
]


def saved(folder: Path, rows: list[dict[str, Any]], ending: str) -> str:
    file = str(folder / f"rows.{ending}")
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(file) if ending == "parquet" else dataset.to_json(file)
    return file


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("schema", "rows", "expected"),
    [
        ("arc", ARC, [("Which is a gas?", "air", ["rock", "air", "ice", "sand"]),
                      ("Which is hot?", "the sun", ["the sun", "the moon"])]),
        ("quartz", QUARTZ, [("Heat melts ice.\nIf it is hotter, the ice melts", "faster", ["faster", "slower"])]),
        ("sciq", SCIQ, [("What do bees make?", "honey", ["honey", "silk", "wax"]),
                        ("What is at the core?", "iron", ["air", "gold", "ice", "iron"])]),
        ("gsm8k", GSM8K, [("Two and two?", "4", None), ("A big one?", "1234", None)]),
    ],
)  # fmt: skip
def test_rows_become_our_columns(schema: str, rows: list, expected: list, ending: str, tmp_path: Path) -> None:
    loaded = load_questions({"file": saved(tmp_path, rows, ending), "schema": schema})
    assert [(row["prompt"], row["answer"], row.get("choices")) for row in loaded] == expected
    assert set(loaded.column_names) <= {"id", "prompt", "answer", "choices"}
    if "id" in rows[0]:
        assert loaded["id"] == [row["id"] for row in rows]


def test_a_hub_dataset_is_mapped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: Dataset.from_list(ARC))
    loaded = load_questions({"hub": "allenai/ai2_arc", "name": "ARC-Easy", "split": "train", "schema": "arc"})
    assert loaded["answer"] == ["air", "the sun"]


def test_the_passage_is_put_in_front_if_asked_for(tmp_path: Path) -> None:
    file = saved(tmp_path, SCIQ, "jsonl")
    with_passage = load_questions({"file": file, "schema": "sciq", "context": True})
    assert with_passage["prompt"] == ["Bees make honey.\nWhat do bees make?", "What is at the core?"]
    file = saved(tmp_path, QUARTZ, "jsonl")
    bare = load_questions({"file": file, "schema": "quartz", "context": False})
    assert bare["prompt"] == ["If it is hotter, the ice melts"]


def test_binary_questions_propose_right_and_wrong_answers_alike(tmp_path: Path) -> None:
    rows = [{**SCIQ[1], "question": f"What is at place {i}?"} for i in range(200)]
    source = {"file": saved(tmp_path, rows, "jsonl"), "schema": "sciq"}
    plain, binary = load_questions(source), load_questions({**source, "binary": True})
    for before, after in zip(plain, binary, strict=True):
        question, proposed = after["prompt"].split("\nProposed answer: ")
        assert question == before["prompt"]
        assert proposed in before["choices"]
        assert after["answer"] == ("yes" if proposed == before["answer"] else "no")
        assert after["choices"] == ["no", "yes"]
    assert 70 < binary["answer"].count("yes") < 130
    wrong = {row["prompt"].split()[-1] for row in binary if row["answer"] == "no"}
    assert wrong == {"air", "gold", "ice"}
    assert load_questions({**source, "binary": True}).to_list() == binary.to_list()


def test_one_list_of_choices_serves_all_questions() -> None:
    source = {"reasoning_gym": "syllogism", "size": 8, "seed": 3, "choices": ["Yes", "No"]}
    loaded = load_questions(source)
    assert loaded["choices"] == [["Yes", "No"]] * 8
    assert check_questions(loaded, "again").to_list() == loaded.to_list()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ARC, {"schema": "ark"}, "unknown schema 'ark', expected one of arc, gsm8k, quartz, sciq"),
        (ARC, {"schema": "sciq"}, r"has no column 'distractor1', which sciq has \(its columns are .*answerKey"),
        (ARC, {"schema": "arc", "context": True}, "arc needs a passage for it; got True"),
        (QUARTZ, {"schema": "quartz", "context": "no"}, "context must be true or false, .* got 'no'"),
        (ARC, {"schema": "arc", "columns": {"prompt": "question"}}, "the schema 'arc' names all columns, leave `col"),
        (ARC, {"context": True}, "`context` belongs to a `schema`"),
        ([{**ARC[0], "answerKey": "E"}], {"schema": "arc"}, "row 0: answerKey is 'E', expected one of the labels A, B"),
        (
            [{**ARC[0], "choices": ["a", "b"]}],
            {"schema": "arc"},
            "row 0: choices is .* text and label, lists of as",
        ),
        ([{**GSM8K[0], "answer": "4"}], {"schema": "gsm8k"}, "row 0: the answer '4' has nothing behind ####"),
        ([{**SCIQ[0], "correct_answer": "wax", "distractor1": None}], {"schema": "sciq"}, "expected at least 2"),
        (SCIQ, {"schema": "sciq", "choices": ["a", "b"]}, "has a column `choices` already: leave the option"),
        (SCIQ, {"schema": "sciq", "binary": "yes"}, "binary must be true or false, got 'yes'"),
        (GSM8K, {"schema": "gsm8k", "choices": [True, False]}, "choices must be a list of texts .*quote yes and no"),
        (GSM8K, {"schema": "gsm8k", "choices": ["3", "4"]}, "the answer '1234' is not among the choices"),
        (GSM8K, {"schema": "gsm8k", "binary": True}, "binary questions are made of questions with choices"),
    ],
)
def test_what_does_not_fit_is_said(rows: list, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions({"file": saved(tmp_path, rows, "jsonl"), **options})


def test_a_generated_source_needs_no_schema() -> None:
    with pytest.raises(ValueError, match="its questions have our columns already, leave `schema` out"):
        load_questions({"characters": "reverse", "size": 3, "schema": "arc"})
