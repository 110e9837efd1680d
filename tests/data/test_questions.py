"""Questions: loading, checking, splitting, tokens and padding, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ensemw2s.data.batches import AnswerCollator, pad_prompts
from ensemw2s.data.difficulty import split_by_difficulty
from ensemw2s.data.questions import check_disjoint, check_questions, exclude_questions, load_questions, split_questions
from ensemw2s.data.tokens import IGNORED, QuestionFormat, tokenize_prompts, tokenize_questions
from tests.tiny import END, FORMAT, questions, tokenizer

ROWS = [{"prompt": f"what is {i}", "answer": f"00{i}"} for i in range(5)]
WORDS = {"reasoning_gym": "word_sequence_reversal", "min_words": 2, "max_words": 3, "prompt_regex": ": (.*)$"}


def of(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows)


# Loading


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_keeps_its_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"questions.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        getattr(of(ROWS), {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[kind])(path)
    loaded = load_questions(str(path))
    # A reader that guesses types would turn 001 into 1.
    assert [(r["prompt"], r["answer"]) for r in loaded] == [(r["prompt"], r["answer"]) for r in ROWS]
    assert len(set(loaded["id"])) == 5
    assert load_questions({"file": str(path)})["id"] == loaded["id"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_files_may_carry_a_byte_order_mark_and_any_character_in_a_string(mark: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(mark + '{"prompt": "a\u2028b", "answer": "x"}\r\n \n', encoding="utf-8")
    (tmp_path / "a.csv").write_text(mark + 'prompt,answer\n"a,\nb",x\n', encoding="utf-8")
    assert load_questions(tmp_path / "a.jsonl")["prompt"] == ["a\u2028b"]
    assert load_questions(tmp_path / "a.csv")["prompt"] == ["a,\nb"]


def test_a_column_that_only_later_rows_have_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0], ROWS[1] | {"difficulty": 2}]))
    assert load_questions(tmp_path / "a.json")["difficulty"] == [None, 2]


def test_columns_are_mapped_and_may_change_places(tmp_path: Path) -> None:
    of([{"question": "q", "answer": "text", "target": "gold"}]).to_json(tmp_path / "a.jsonl")
    loaded = load_questions({"file": str(tmp_path / "a.jsonl"), "columns": {"prompt": "question", "answer": "target"}})
    assert (loaded[0]["prompt"], loaded[0]["answer"]) == ("q", "gold")
    of([{"prompt": "a", "answer": "q"}]).to_json(tmp_path / "b.jsonl")
    swapped = load_questions({"file": str(tmp_path / "b.jsonl"), "columns": {"prompt": "answer", "answer": "prompt"}})
    assert (swapped[0]["prompt"], swapped[0]["answer"]) == ("q", "a")


def test_repeated_prompts_are_used_once(tmp_path: Path) -> None:
    of([*ROWS, {"prompt": "What  is 3", "answer": "other"}, ROWS[0]]).to_json(tmp_path / "a.jsonl")
    repeated = r"a\.jsonl: 2 of 7 rows repeat the prompt of an earlier one, 1 of them with another answer and are left"
    with pytest.warns(UserWarning, match=repeated):
        assert len(load_questions(str(tmp_path / "a.jsonl"))) == 5


def test_columns_may_be_named_beside_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "solution": "s"}\n')
    columns = {"prompt": "question", "answer": "solution"}
    assert load_questions(tmp_path / "a.jsonl", columns=columns)["answer"] == ["s"]
    with pytest.raises(ValueError, match=r"has no column 'prompt'.*of load_questions .*--columns prompt=yours"):
        load_questions(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="columns is given twice"):
        load_questions({"file": str(tmp_path / "a.jsonl"), "columns": columns}, columns=columns)


@pytest.mark.parametrize("data", [ROWS, of(ROWS), of(ROWS).to_pandas()], ids=["list", "dataset", "frame"])
def test_questions_in_memory_are_not_a_source(data: Any) -> None:
    with pytest.raises(TypeError, match="questions in memory need no loading, pass them as they are"):
        load_questions(data)


def test_the_hub_is_asked_for_what_was_named_and_trusts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        asked.append((args, kwargs))
        return of(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_questions({"hub": "someone/questions", "name": "easy", "split": "test"})
    assert asked == [(("someone/questions", "easy"), {"split": "test"})]


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Dataset:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"cannot load someone/q .*no route.*name a local file"):
        load_questions({"hub": "someone/q"})


def test_reasoning_gym_questions_are_reproducible_and_distinct() -> None:
    first, again = (load_questions({**WORDS, "size": 60, "seed": 1}) for _ in range(2))
    assert first.to_list() == again.to_list()
    assert len({prompt.casefold() for prompt in first["prompt"]}) == 60
    assert all(row["answer"].split(", ")[::-1] == row["prompt"].split(", ") for row in first)


def test_neighbouring_seeds_and_easy_and_hard_share_no_stream() -> None:
    # The generator uses seed + i for question i; taken as they are, seeds 1 and 2 would share 59 of 60 questions,
    # and each hard question would begin with an easy one.
    one, two = (set(load_questions({**WORDS, "size": 60, "seed": seed})["prompt"]) for seed in (1, 2))
    assert len(one & two) <= 3
    hard = load_questions({**WORDS, "size": 60, "seed": 1, "min_words": 3, "max_words": 4})["prompt"]
    assert sum(any(long.startswith(short) for short in one) for long in hard) <= 6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"size": 3}, "exactly one of file, hub, bigbench, reasoning_gym, characters"),
        ({"file": "a.txt"}, r"a\.txt: expected a file that ends in \.jsonl"),
        ({"hub": "a", "splt": "x"}, "unknown setting splt of a hub source"),
        ({"reasoning_gym": "word_sequence_reversl", "size": 3}, "no task .*nearest are word_sequence_reversal"),
        ({**WORDS, "size": 3, "min_wordz": 2}, "refuses the settings .*min_wordz"),
        ({**WORDS, "size": 0}, "size must be a whole number of questions, at least 1; got 0"),
        ({**WORDS, "size": 3, "prompt_regex": "nothing (like) this"}, "finds no group in the prompt"),
        ({**WORDS, "size": 3, "prompt_regex": "("}, r"prompt_regex '\(' is no regular expression: missing \)"),
        ({**WORDS, "size": 3, "prompt_regex": "(never)?of"}, "finds no group in the prompt"),
        ({**WORDS, "size": 3, "columns": {"prompt": "question"}}, "have our columns already, leave `columns` out"),
        ({"reasoning_gym": "rubiks_cube", "size": 1}, "rubiks_cube has questions without one right answer"),
        ({"characters": "reverse", "size": 3, "min_len": 2}, "characters reverse refuses the settings .*min_len"),
        ({"hub": None}, "hub of a source of questions must be text, got None"),
        ({"characters": "reverse", "size": 5000, "min_length": 1, "max_length": 2}, "distinct questions"),
    ],
)
def test_a_bad_source_is_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(source)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist"):
        load_questions(str(tmp_path / "gone.jsonl"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty\.csv is empty"):
        load_questions(str(tmp_path / "empty.csv"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1 is not valid JSON"):
        load_questions(str(tmp_path / "broken.jsonl"))
    of([{"question": "q", "answer": "a"}]).to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"has no column 'query' .*its columns are question, answer"):
        load_questions({"file": str(tmp_path / "a.jsonl"), "columns": {"prompt": "query"}})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", b"[]", r"a\.json is empty: expected questions"),
        ("a.csv", b"prompt,answer\n", r"a\.csv is empty: expected questions"),
        ("a.csv", b"prompt,answer\na,b\na,b,c\n", r"a\.csv, row 1 has more fields than the header"),
        ("a.csv", b"prompt,answer\na\n", r"a\.csv, row 0: answer is None"),
        ("a.csv", "prompt,answer\n\u00e9,b\n".encode("latin-1"), r"a\.csv is not UTF-8 text .*save it as UTF-8"),
        ("a.json", b'{"prompt": "a"}', r"a\.json: expected a list of objects"),
        (
            "a.jsonl",
            b'{"prompt":"a","answer":"x"}\n{"prompt":"b","answer":7}',
            "column 'answer' must be of one type",
        ),
        ("a.jsonl", b'{"prompt":"a"}\n{"prompt":"b","answer":"y"}', r"a\.jsonl, row 0: answer is None"),
        ("a.parquet", b"prompt", r"a\.parquet is not a Parquet file"),
    ],
)
def test_what_a_file_gets_wrong_is_said(name: str, text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / name)


def test_columns_must_be_a_mapping(tmp_path: Path) -> None:
    of(ROWS).to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"columns must map our names .*got 'prompt'"):
        load_questions({"file": tmp_path / "a.jsonl", "columns": "prompt"})


def test_reasoning_gym_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="need that package: pip install reasoning-gym"):
        load_questions({**WORDS, "size": 3})


# Checking and splitting


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "answer": "a"}], "easy has no column 'prompt'; its columns are question, answer"),
        ([{"prompt": "q", "answer": "a"}, {"prompt": "r", "answer": " "}], "easy, row 1: answer is ' '"),
        ([{"prompt": "q", "answer": 7}], "easy, row 0: answer is 7, expected text"),
        ([{"prompt": "q", "answer": "a", "id": 1}, {"prompt": "r", "answer": "a", "id": 1}], "id '1' more than once"),
    ],
)
def test_what_is_no_question_is_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_questions(of(rows), "easy")


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="easy is empty"):
        check_questions(of(ROWS).select([]), "easy")


def test_a_question_in_two_splits_is_named_with_both() -> None:
    with pytest.raises(ValueError, match=r"'What is  3' is in both train and test_id"):
        check_disjoint({"train": of(ROWS), "test_id": of([{"prompt": "What is  3", "answer": "x"}])})
    check_disjoint({"train": of(ROWS), "test_id": exclude_questions(questions(3), [of(ROWS)])})


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="all 5 questions are among those to be excluded"):
        exclude_questions(of(ROWS), [of(ROWS)])
    left = exclude_questions(of([*ROWS, {"prompt": "new", "answer": "x"}]), [of(ROWS)])
    assert left["prompt"] == ["new"]


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(20)), seed=st.integers(0, 5))
def test_splits_depend_on_seed_and_content_and_not_on_order(order: list[int], seed: int) -> None:
    rows = [{"prompt": f"p{i % 15}", "answer": f"a{i}"} for i in range(20)]
    straight = split_questions(of(rows), {"a": 6, "b": 5}, seed)
    shuffled = split_questions(of([rows[i] for i in order]), {"a": 6, "b": 5}, seed)
    for name in ("a", "b"):
        assert straight[name].to_list() == shuffled[name].to_list()
    check_disjoint(dict(straight))


def test_another_seed_gives_another_split_and_too_many_are_refused() -> None:
    splits = [split_questions(questions(40), {"a": 20}, seed)["a"]["id"] for seed in (0, 1)]
    assert set(splits[0]) != set(splits[1])
    with pytest.raises(ValueError, match=r"need 41 distinct questions, the dataset has 40"):
        split_questions(questions(40), {"a": 20, "b": 21})
    with pytest.raises(ValueError, match=r"split b must be a number of questions, at least 1 \(no share\), got 0"):
        split_questions(questions(4), {"a": 2, "b": 0})


# Tokens


def test_tokens_are_prompt_answer_and_end_with_the_boundary_by_position() -> None:
    (row,) = tokenize_questions(of([{"prompt": "ab", "answer": "ba", "id": "x"}]), tokenizer(), FORMAT)
    tokens = tokenizer()
    assert row["input_ids"] == [*tokens("ab:")["input_ids"], *tokens(" ba")["input_ids"], END]
    assert row["prompt_length"] == 3
    (prompt,) = tokenize_prompts(of([{"prompt": "ab", "id": "x"}]), tokenizer(), FORMAT)
    assert prompt["input_ids"] == row["input_ids"][:3]


def test_a_chat_template_wraps_the_prompt() -> None:
    chatty = tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}u:{{ m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    wrapped = QuestionFormat(prompt_template="{prompt}", answer_prefix="", use_chat_template=True)
    (row,) = tokenize_prompts(of([{"prompt": "hi", "id": "x"}]), chatty, wrapped)
    assert row["input_ids"] == chatty("u:hia:")["input_ids"]


def test_answers_without_tokens_and_too_long_ones_are_named_by_id() -> None:
    # This one drops what it does not know.
    deaf = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({letter: i for i, letter in enumerate("<q:")}, [])), eos_token="<"
    )
    with pytest.raises(ValueError, match=r"easy, id x: the answer 'é' has no tokens"):
        tokenize_questions(
            of([{"prompt": "q", "answer": "é", "id": "x"}]), deaf, QuestionFormat("{prompt}:", ""), "easy"
        )
    short = QuestionFormat(prompt_template="{prompt}:", max_length=8)
    with pytest.raises(ValueError, match=r"easy, id x: prompt and answer have 9 tokens \(5 of them .* the 8 allowed"):
        tokenize_questions(of([{"prompt": "abc", "answer": "xyz", "id": "x"}]), tokenizer(), short, "easy")
    limited = tokenizer()
    limited.model_max_length = 8
    with pytest.raises(ValueError, match="more than the 8 allowed"):
        tokenize_questions(of([{"prompt": "abc", "answer": "xyz", "id": "x"}]), limited, FORMAT)


def test_a_prompt_that_leaves_no_room_is_named_by_id() -> None:
    short = QuestionFormat(prompt_template="{prompt}:", max_length=4)
    with pytest.raises(ValueError, match=r"easy, id x: the prompt has 4 tokens and leaves no room .* the 4 allowed"):
        tokenize_prompts(of([{"prompt": "abc", "id": "x"}]), tokenizer(), short, "easy")


def test_a_tokenizer_without_an_end_and_a_template_without_a_prompt_are_refused() -> None:
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        tokenize_questions(of(ROWS), endless, FORMAT)
    with pytest.raises(ValueError, match=r"must contain \{prompt\}, got 'Q:'"):
        QuestionFormat(prompt_template="Q:")


ANSWERED = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(rows=ANSWERED, pad=st.integers(0, 9), data=st.data())
def test_labels_follow_positions_even_where_pad_and_end_are_ordinary_tokens(
    rows: list[tuple[list[int], list[int]]], pad: int, data: st.DataObject
) -> None:
    weights = [data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=len(a), max_size=len(a))) for _, a in rows]
    features = [
        {"input_ids": p + a, "prompt_length": len(p), "token_weights": w}
        for (p, a), w in zip(rows, weights, strict=True)
    ]
    batch = AnswerCollator(pad)(features)
    for i, ((prompt, answer), weight) in enumerate(zip(rows, weights, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        assert batch["input_ids"][i, :end].tolist() == prompt + answer
        assert batch["input_ids"][i, end:].tolist() == [pad] * (batch["input_ids"].shape[1] - end)
        assert batch["attention_mask"][i].sum() == end
        assert batch["labels"][i, start:end].tolist() == [
            t if w else IGNORED for t, w in zip(answer, weight, strict=True)
        ]
        assert batch["token_weights"][i, start:end].tolist() == weight
        outside = torch.ones(batch["labels"].shape[1], dtype=torch.bool)
        outside[start:end] = False
        assert (batch["labels"][i][outside] == IGNORED).all()
        assert (batch["token_weights"][i][outside] == 0).all()


def test_without_weights_each_answer_token_weighs_one_and_a_wrong_number_is_refused() -> None:
    batch = AnswerCollator(0)([{"input_ids": [1, 2, 3], "prompt_length": 1}])
    assert batch["token_weights"].tolist() == [[0.0, 1.0, 1.0]]
    with pytest.raises(ValueError, match="token_weights has 1 values for an answer of 2 tokens"):
        AnswerCollator(0)([{"input_ids": [1, 2, 3], "prompt_length": 1, "token_weights": [1.0]}])


def test_prompts_are_padded_on_the_left() -> None:
    input_ids, attention_mask = pad_prompts([[1, 2, 3], [4]], 9)
    assert input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# What errors call a row


def test_a_row_is_called_by_its_place_and_prompt_where_it_has_no_id_of_its_own() -> None:
    rows = [{"prompt": f"which {i} " + "x" * 90, "answer": "a", "choices": ["a", "b"]} for i in range(3)]
    rows[2]["answer"] = "c"
    place = r"easy, row 2 \('which 2 x{32}'\): "
    with pytest.raises(ValueError, match=rf"^{place}the answer 'c' is not among"):
        check_questions(rows, "easy")
    talk = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    with pytest.raises(ValueError, match=rf"^{place}the answer 'c' is not among"):
        check_questions(talk, "easy")
    with pytest.raises(ValueError, match=r"^easy, id n2: the answer 'c' is not among"):
        check_questions([{**row, "id": f"n{i}"} for i, row in enumerate(rows)], "easy")
    # Also once the made-up ids are there, and where a question stands twice.
    checked = check_questions([{"prompt": "ab", "answer": "a"}] * 2 + [{"prompt": "abcdefgh", "answer": "a"}], "easy")
    for data in (checked, checked.select([1, 1, 2]).select([1, 2])):
        with pytest.raises(ValueError, match=rf"^easy, row {len(data) - 1} \('abcdefgh'\): "):
            tokenize_questions(data, tokenizer(), replace(FORMAT, max_length=6), "easy")
    graded = [{"prompt": f"what {i}", "answer": "a", "difficulty": None if i == 1 else 1.0} for i in range(3)]
    with pytest.raises(ValueError, match=r"^questions, row 1 \('what 1'\): difficulty is None, expected a finite"):
        split_by_difficulty(graded)


@pytest.mark.parametrize("answer", ["A", "b", "0", "(C)", "12.", 0, 1])
def test_a_letter_or_an_index_is_no_choice(answer: Any) -> None:
    rows = [{"prompt": "which", "answer": answer, "choices": ["red", "blue"]}]
    with pytest.raises(ValueError, match=r"; a letter or an index has to|: a letter or an index has to") as error:
        check_questions(rows)
    assert str(error.value).endswith("become the text of the choice itself")


def test_another_word_is_told_to_be_written_as_there() -> None:
    with pytest.raises(ValueError, match=r"write it exactly as there$"):
        check_questions([{"prompt": "which", "answer": "green", "choices": ["red", "blue"]}])
    with pytest.raises(ValueError, match=r"make numbers text, with str\(\)$"):
        check_questions([{"prompt": "which", "answer": 3}])


@pytest.mark.parametrize(("mark", "name"), [(";", "';'"), ("\t", r"'\\t'"), ("|", r"'\|'")])
def test_a_csv_without_commas_is_told_from_one_with_them(mark: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'prompt{mark}answer\n"a, b"{mark}c\n')
    with pytest.raises(
        ValueError, match=rf"a\.csv: its first line .* has {name} where commas are expected: .*sep={name}"
    ):
        load_questions(tmp_path / "a.csv")


def test_columns_the_wrong_way_round_are_turned(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,answer\na,b\n")
    with pytest.raises(ValueError, match=r'our names come first, \{"prompt": "frage"\} \(prompt=frage in --columns\)'):
        load_questions(tmp_path / "a.csv", columns={"frage": "prompt"})
    with pytest.raises(ValueError, match=r"'frage' is none of our columns prompt, answer, choices, difficulty, id$"):
        load_questions(tmp_path / "a.csv", columns={"frage": "text"})
