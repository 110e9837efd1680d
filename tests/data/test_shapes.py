"""The door: data as people have it becomes questions, and what is no question gets a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from ensemw2s import check_questions, to_prompt_completion
from ensemw2s.data.questions import check_disjoint, exclude_questions, load_questions, split_questions
from ensemw2s.data.shapes import with_column
from ensemw2s.data.tokens import QuestionFormat, check_examples, tokenize_prompts, tokenize_questions
from tests.tiny import FORMAT, tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": f"what is {i}", "answer": f"a{i}", "choices": ["a0", f"a{i + 1}", f"a{i}"][i == 0 :]} for i in range(4)
]
TEMPLATE = (
    "{% if thinks is defined %}{{ thinks }} {% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }} {% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = QuestionFormat(prompt_template="{prompt}", answer_prefix="", use_chat_template=True)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [said("system", "short"), said("user", "hi"), said("assistant", "yes"), said("user", "one")]
ANSWERED = [*ASKED, said("assistant", "two")]


def chatty() -> Any:
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def stream() -> Iterator[dict[str, Any]]:
    yield from ROWS


def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**rows, "prompt": [prompt.removeprefix("so ") for prompt in rows["prompt"]]}


SHAPES: dict[str, Callable[[], Any]] = {
    "torch": lambda: Dataset.from_list(ROWS).with_format("torch"),
    "numpy": lambda: Dataset.from_list(ROWS).with_format("numpy"),
    "pandas": lambda: Dataset.from_list(ROWS).with_format("pandas"),
    "one column shown": lambda: Dataset.from_list(ROWS).with_format("torch", columns=["answer"]),
    "transform": lambda: Dataset.from_list([{**row, "prompt": f"so {row['prompt']}"} for row in ROWS]).with_transform(
        transformed
    ),
    "list": lambda: list(ROWS),
    "DataFrame": lambda: pandas.DataFrame(ROWS, index=[3, 1, 2, 0]),
    "categories": lambda: pandas.DataFrame(ROWS).astype({"answer": "category"}),
    "IterableDataset": lambda: IterableDataset.from_generator(stream),
    "arrays": lambda: [{**row, "choices": np.array(row["choices"])} for row in ROWS],
    "DataFrame of arrays": lambda: pandas.DataFrame([{**row, "choices": np.array(row["choices"])} for row in ROWS]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_are_the_same_questions_with_the_same_ids(shape: str) -> None:
    expected = check_questions(Dataset.from_list(ROWS)).to_list()
    assert [{name: row[name] for name in ROWS[0]} for row in expected] == ROWS
    found = check_questions(SHAPES[shape](), "mine")
    assert list(found) == expected
    assert list(check_questions(found)) == expected
    examples = tokenize_questions(SHAPES[shape](), tokenizer(), FORMAT)
    assert examples.to_list() == tokenize_questions(Dataset.from_list(ROWS), tokenizer(), FORMAT).to_list()
    split = split_questions(SHAPES[shape](), {"a": 2, "b": 2})
    assert split["a"].to_list() == split_questions(Dataset.from_list(ROWS), {"a": 2, "b": 2})["a"].to_list()
    assert exclude_questions(SHAPES[shape](), [ROWS[:3]])["prompt"] == ["what is 3"]
    assert exclude_questions(ROWS, [SHAPES[shape]().select([0])] if shape == "torch" else [ROWS[:1]])["id"]


def test_examples_come_in_any_format_too() -> None:
    examples = tokenize_questions(ROWS, tokenizer(), FORMAT)
    assert check_examples(examples.with_format("torch"), "mine").to_list() == examples.to_list()
    assert check_examples(examples.to_list(), "mine").to_list() == examples.to_list()


def test_questions_without_answers_get_ids_of_their_content() -> None:
    bare = [{"prompt": row["prompt"]} for row in ROWS]
    prompts = tokenize_prompts(bare, tokenizer(), FORMAT)
    assert prompts["id"] == tokenize_prompts(pandas.DataFrame(bare[::-1]), tokenizer(), FORMAT)["id"][::-1]
    assert len(set(prompts["id"])) == 4
    twice = check_questions([bare[0], bare[0]], answered=False)["id"]
    assert twice == [prompts["id"][0], f"{prompts['id'][0]}-2"]
    assert {*split_questions(bare, {"a": 3})["a"]["id"]} < {*prompts["id"]}
    assert exclude_questions(bare, [ROWS[1:]])["prompt"] == ["what is 0"]


def test_what_misses_in_a_dataframe_is_named_by_its_row() -> None:
    with pytest.raises(ValueError, match="mine, row 1: answer is None, expected text that is not empty"):
        check_questions(pandas.DataFrame({"prompt": ["a", "b"], "answer": ["c", None]}), "mine")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (DatasetDict(train=Dataset.from_list(ROWS)), "mine is a DatasetDict, expected a datasets.Dataset"),
        (
            {"prompt": ["a"]},
            "mine is a dict, expected .*of a DatasetDict, one split.* a list of dicts.*: a single question is ",
        ),
        (7, "mine is a int, expected a datasets.Dataset .*, a pandas DataFrame or a list"),
        (None, "mine is a NoneType, expected"),
        (["what is 1"], "mine, row 0 is 'what is 1', expected a dict"),
        ([], "mine is empty"),
        (
            [{"prompt": "a", "answer": "b"}, {"prompt": 1, "answer": "b"}],
            "the values of column 'prompt' must be of one",
        ),
        (
            [{"question": "a"}],
            r"no column 'prompt'; .* columns=\{\"prompt\": \"yours\"\} of load_questions .* or check_questions",
        ),
        ([{"prompt": [], "answer": "b"}], r"mine, row 0: prompt has \[\], expected messages of role and content"),
        ([{"prompt": [said("user", " ")], "answer": "b"}], "mine, row 0: prompt is .*expected text that is not empty"),
        ([{"messages": ASKED}], "mine, row 0: answer is .*expected one message, the assistant's, behind its prompt"),
        ([{"messages": ASKED[2:3]}], r"mine, row 0: prompt has \[\], expected messages"),
        ([{"messages": [{"role": "user", "content": None}]}], "row 0: messages has .*expected messages of role"),
        ([{"messages": [{**ASKED[0], "tool_calls": ["f"]}]}], "tools, images and the like are not supported"),
        ("easy.jsonl", "mine is 'easy.jsonl', expected .*: a file is read by load_questions, and a single question"),
        ([{"prompt": "a"}], "mine has no column 'answer'.*answers questions without any by its method label"),
        ([{"prompt": ASKED, "completion": ANSWERED}], "mine, row 0: answer is .*expected one message"),
    ],
)
def test_what_is_no_question_gets_a_sentence(data: Any, complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=complaint):
        check_questions(data, "mine")


def test_columns_are_mapped_where_the_message_says_so() -> None:
    rows = [{"question": "a", "chosen": [said("assistant", "b")], "answer": "left out"}]
    (row,) = check_questions(rows, columns={"prompt": "question", "answer": "chosen"})
    assert (row["prompt"], row["answer"]) == ("a", "b")
    with pytest.raises(ValueError, match="mine has no column 'query'"):
        check_questions(rows, "mine", columns={"prompt": "query"})


# TRL's shapes


def test_the_shapes_of_trl_are_questions() -> None:
    assert check_questions([{"prompt": "a", "completion": "b"}])[0]["answer"] == "b"
    (row,) = check_questions([{"messages": ANSWERED}])
    assert (row["prompt"], row["answer"]) == (ASKED, "two")
    (same,) = check_questions([{"prompt": ASKED, "completion": ANSWERED[-1:]}])
    assert same == {**row, "id": same["id"]} and same["id"] == row["id"]
    frame = pandas.DataFrame({"messages": [np.array(ANSWERED)]})
    assert check_questions(frame).to_list() == [row]
    # Rows that differ in the keys of their messages are filled up with None.
    mixed = Dataset.from_list([{"messages": ANSWERED}, {"messages": [{**m, "name": None} for m in ANSWERED[:3]]}])
    assert check_questions(mixed)[1]["prompt"] == ASKED[:2]


def test_a_conversation_is_the_same_question_as_its_text() -> None:
    text = check_questions([{"prompt": "Hi  you", "answer": "x"}])
    chat = check_questions([{"messages": [said("user", "hi you"), said("assistant", "y")]}])
    with pytest.raises(ValueError, match="in both a and b"):
        check_disjoint({"a": text, "b": chat})


def test_a_conversation_is_rendered_by_the_chat_template() -> None:
    (row,) = tokenize_questions([{"messages": ANSWERED}], chatty(), CHAT)
    ids, start = row["input_ids"], row["prompt_length"]
    assert tokenizer().decode(ids[:start]) == "s:short u:hi a:yes u:one a:"
    assert tokenizer().decode(ids[start:-1]) == "two"
    (prompt,) = tokenize_prompts([{"prompt": ASKED}], chatty(), CHAT)
    assert prompt["input_ids"] == ids[:start]
    form = QuestionFormat("q {prompt}", "", use_chat_template=True, system_message="be kind",
                          chat_template_kwargs={"thinks": "no"})  # fmt: skip
    text = "no s:be kind u:q one a:"
    for asked in ("one", [said("user", "one")]):
        assert tokenizer().decode(form.prompt(asked, chatty()).ids) == text


@pytest.mark.parametrize(
    ("settings", "prompt", "complaint"),
    [
        ({"use_chat_template": False}, ASKED, "is a conversation, .*: pass question_format=QuestionFormat"),
        ({"system_message": "be kind"}, ASKED, r"the message .*short.* already: leave system_message out"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "a", "does not read enable_thinking"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": False}},
            "a",
            "multiple values .* 'add_generation_prompt'",
        ),
        ({}, [said("tool", "x")], "chat template refuses .*no tools here"),
    ],
)
def test_what_a_chat_template_cannot_do_is_refused(settings: dict[str, Any], prompt: Any, complaint: str) -> None:
    form = QuestionFormat(**{"prompt_template": "{prompt}", "use_chat_template": True, **settings})
    with pytest.raises((TypeError, ValueError), match=complaint):
        form.prompt(prompt, chatty())


@pytest.mark.parametrize("form", [QuestionFormat(), CHAT], ids=["plain", "chat"])
def test_a_conversation_without_a_chat_template_is_refused_once(form: QuestionFormat) -> None:
    with pytest.raises(ValueError, match=r"is a conversation, and this tokenizer has no chat template .*: load the"):
        form.prompt(ASKED, tokenizer())


@pytest.mark.parametrize("name", ["system_message", "chat_template_kwargs"])
def test_settings_of_chats_do_nothing_without_a_chat_template(name: str) -> None:
    value: Any = {"system_message": "be kind", "chat_template_kwargs": {"thinks": "no"}}[name]
    with pytest.raises(ValueError, match=f"{name} .*do nothing without use_chat_template=True"):
        QuestionFormat(**{name: value})


def test_answers_go_back_out_as_trl_reads_them() -> None:
    form = QuestionFormat("{prompt}", "", use_chat_template=True, chat_template_kwargs={"thinks": "no"})
    (row,) = to_prompt_completion([{"prompt": ASKED, "answer": "two", "confidence": -1.0}], form)
    assert row == {"prompt": ASKED, "completion": ANSWERED[-1:], "chat_template_kwargs": {"thinks": "no"}}
    assert check_questions([row])[0]["answer"] == "two"
    rendered = chatty().apply_chat_template(row["prompt"] + row["completion"], tokenize=False, thinks="no")
    (example,) = tokenize_questions([{"messages": ANSWERED}], chatty(), form)
    prompt = tokenizer().decode(example["input_ids"][: example["prompt_length"]])
    assert rendered.startswith(prompt + "two")
    (text,) = to_prompt_completion([{"prompt": "one", "answer": "two"}], FORMAT)
    assert text == {"prompt": "one:", "completion": " two"}


def test_conversations_in_a_file(tmp_path: Any) -> None:
    Dataset.from_list([{"messages": ANSWERED}]).to_json(tmp_path / "chats.jsonl")
    assert load_questions(tmp_path / "chats.jsonl")[0]["prompt"] == ASKED
    with pytest.raises(ValueError, match="prompt_regex and binary are for texts"):
        load_questions({"file": tmp_path / "chats.jsonl", "prompt_regex": "(.)"})
    Dataset.from_list([{"messages": ANSWERED, "choices": ["two", "six"]}]).to_json(tmp_path / "choices.jsonl")
    with pytest.raises(ValueError, match="prompt_regex and binary are for texts"):
        load_questions({"file": tmp_path / "choices.jsonl", "binary": True})


def test_settings_of_chats_are_described_where_they_are_set() -> None:
    plain = QuestionFormat(use_chat_template=True)
    asked = QuestionFormat(use_chat_template=True, system_message="Be brief.")
    assert asked.describe() == {**plain.describe(), "system_message": "Be brief."}
    assert not {"system_message", "chat_template_kwargs"} & plain.describe().keys()
    # Settings that were always there are described also where they are None.
    assert plain.describe()["max_length"] is None


def test_a_number_as_answer_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"mine, row 0: answer is 3, expected text .*: make numbers text, with str\(\)"
    ):
        check_questions([{"prompt": "1+2", "answer": 3}], "mine")


@pytest.mark.parametrize("shown", [True, False])
def test_a_column_more_shows_no_bar_and_leaves_them_as_they_were(
    capfd: pytest.CaptureFixture[str], shown: bool
) -> None:
    def show(bars: bool) -> None:
        (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()

    before = datasets.is_progress_bar_enabled()
    try:
        show(shown)
        selected = Dataset.from_dict({"a": list(range(5000))}).select(range(0, 5000, 2))
        assert with_column(selected, "b", list(range(2500)))["b"][:3] == [0, 1, 2]
        assert "Flattening" not in capfd.readouterr().err
        assert datasets.is_progress_bar_enabled() == shown
    finally:
        show(before)
