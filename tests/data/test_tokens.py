"""Texts as tokens and back, with tokenizers of every make: what is kept, what is warned of, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers
from transformers import PreTrainedTokenizerBase

from ensemw2s import BoostingConfig, BoostingTrainer, StudentConfig, StudentTrainer
from ensemw2s.data.tokens import (
    PromptTokens,
    QuestionFormat,
    decode,
    encode,
    require_readable,
    tokenize_prompts,
    tokenize_questions,
)
from ensemw2s.inference.choices import tokenize_choices
from ensemw2s.models.characters import _make_tokenizer
from tests import tiny
from tests.tokenizers import BOS, EOS, FAITHFUL, PlainLetters, byte_level, legacy_llama, letters, metaspace, words

FORMATS = [
    QuestionFormat(),
    QuestionFormat("{prompt}", ""),
    QuestionFormat("Q: {prompt} ", ""),
    QuestionFormat("{prompt} = ", " "),
    QuestionFormat("{prompt}:\n", "    "),
]
TEXTS = st.text(alphabet="abcdeth12  \n\té漢:", min_size=1, max_size=10).filter(str.strip)


def of(*rows: dict[str, Any]) -> Dataset:
    return Dataset.from_list(
        [{"id": f"q{i}", "prompt": "What is 2", "answer": "4", **row} for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize("name", FAITHFUL)
@given(prompt=TEXTS, answer=TEXTS, form=st.sampled_from(FORMATS))
@settings(max_examples=15, deadline=None)
def test_an_answer_is_what_its_tokens_add_to_the_prompt(
    name: str, prompt: str, answer: str, form: QuestionFormat
) -> None:
    tokenizer = FAITHFUL[name]()
    (row,) = tokenize_questions(of({"prompt": prompt, "answer": answer}), tokenizer, form)
    start, ids = row["prompt_length"], row["input_ids"]
    # What the model is given when it answers, and one end token, at the end.
    assert ids[:start] == tokenize_prompts(of({"prompt": prompt}), tokenizer, form)[0]["input_ids"]
    assert ids.count(EOS) == 1 and ids[-1] == EOS
    assert BOS not in ids[1:]
    tokens = form.prompt(prompt, tokenizer)
    assert form.answer_text(ids[start:-1], tokens) == answer
    text = form.prompt_template.replace("{prompt}", prompt)
    assert decode(ids, tokenizer).endswith(text.lstrip(" ") + form.answer_prefix + answer)
    # As one text, wherever that text's tokens have the boundary at all.
    whole = encode(text + form.answer_prefix + answer, tokenizer)
    if whole[: len(tokens.alone)] == tokens.alone:
        assert ids[:-1] == tokens.front + whole


@pytest.mark.parametrize("name", FAITHFUL)
def test_choices_have_the_tokens_of_answers(name: str) -> None:
    tokenizer = FAITHFUL[name]()
    for form in FORMATS:
        choices = ["yes", "  yes", "no\n", "yes "]
        rows = of(*({"answer": choice} for choice in choices))
        (question,) = tokenize_choices(of({"choices": ["yes", "no\n"], "answer": "yes"}), tokenizer, form)
        examples = tokenize_questions(rows, tokenizer, form)
        answers = [row["input_ids"][row["prompt_length"] :] for row in examples]
        assert question.choices == [answers[0], answers[2]]
        assert question.prompt == examples[0]["input_ids"][: examples[0]["prompt_length"]]
        # White space tells answers apart.
        assert len({tuple(ids) for ids in answers}) == 4


@pytest.mark.parametrize("make", [metaspace, legacy_llama])
def test_no_answer_gets_a_space_that_nobody_wrote(make: Any) -> None:
    tokenizer = make(front=True, behind=True)
    (row,) = tokenize_questions(of({"prompt": "Say", "answer": "token"}), tokenizer, QuestionFormat("{prompt}:", " "))
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[-2:] == ["▁token", "</s>"]
    assert row["input_ids"] == [BOS, *encode("Say: token", tokenizer), EOS]


@pytest.mark.parametrize(
    "tokenizer", [tiny.tokenizer(), _make_tokenizer(), byte_level()], ids=["tiny", "scratch", "bytes"]
)
def test_what_is_tokenised_alike_apart_stays_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    """Records that were made with such tokenizers stay comparable."""
    rows = tiny.questions(20)
    for form in (tiny.FORMAT, replace(tiny.FORMAT, prompt_template=": {prompt} =")):
        for row, made in zip(rows, tokenize_questions(rows, tokenizer, form), strict=True):
            prompt = tokenizer(form.prompt_template.replace("{prompt}", row["prompt"]))["input_ids"]
            answer = tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
            assert made["input_ids"] == [*prompt, *answer, tokenizer.eos_token_id]
            assert made["prompt_length"] == len(prompt)


# What stands in front


@pytest.mark.parametrize("name", ["metaspace first", "legacy llama", "llama class", "python"])
def test_the_first_token_stands_in_front_once(name: str) -> None:
    tokenizer = FAITHFUL[name]()
    form = QuestionFormat("{prompt}:", " ")
    plain = form.prompt("abc", tokenizer).ids
    assert plain[0] == BOS and EOS not in plain
    if name != "python":
        # It is written in the template already.
        assert replace(form, prompt_template="<s>{prompt}:").prompt("abc", tokenizer).ids[:2].count(BOS) == 1


def test_a_chat_template_brings_its_own_first_token() -> None:
    tokenizer = legacy_llama()
    tokenizer.chat_template = "<s>{% for m in messages %}user: {{ m.content }}\n{% endfor %}answer:"
    form = QuestionFormat("{prompt}", " ", use_chat_template=True)
    (row,) = tokenize_questions(of({"prompt": "two"}), tokenizer, form)
    assert row["input_ids"].count(BOS) == 1 and row["input_ids"][0] == BOS
    assert decode(row["input_ids"], tokenizer) == "user: two\nanswer: 4"


def test_a_prompt_that_is_cut_keeps_what_stands_in_front() -> None:
    form = QuestionFormat("{prompt}:", " ", max_length=8, truncate_prompt=True)
    long = {"prompt": "a b c d e f g h i j k l"}
    tokenizer = legacy_llama()
    (row,) = tokenize_questions(of(long), tokenizer, form)
    (prompt,) = tokenize_prompts(of(long), tokenizer, form, answer_length=3)
    assert len(row["input_ids"]) == 8
    for ids in (row["input_ids"], prompt["input_ids"]):
        assert ids[0] == BOS and BOS not in ids[1:]
    assert form.answer_text(row["input_ids"][row["prompt_length"] : -1], form.prompt(long["prompt"], tokenizer)) == "4"


# What is lost


class Inside(PlainLetters):
    """Puts its end token behind the first letter."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [*token_ids_0[:1], EOS, *token_ids_0[1:]]


LOSSY = {
    "case": (letters(normalizers.Lowercase(), decoders.Fuse()), "Ab", "does not keep ' Ab': .* tokens read ' ab'"),
    "ends": (letters(normalizers.Strip(), decoders.Fuse()), "ab  ", r"does not keep ' ab  ': .* tokens read ' ab'"),
    "white space": (words("What is 2 Answer: a b"), "a  b", "does not keep ' a  b': .* tokens read ' a b'"),
    "special token": (byte_level(), "a</s>b", "does not keep ' a</s>b': .* tokens read ' ab'"),
    "compatibility": (
        letters(normalizers.NFKC(), decoders.Fuse(), known="ab :12"), "a²", "does not keep ' a²': .* tokens read ' a2'"
    ),
    "order": (Inside(), "ab", "adds its special tokens .* in front of a text or behind it: use another one"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSY)
def test_an_answer_that_the_tokenizer_changes_is_named(name: str) -> None:
    tokenizer, answer, message = LOSSY[name]
    form = QuestionFormat("{prompt} Answer:", " ")
    place = "" if name == "order" else "easy, id q1: this tokenizer "
    rows = of({}, {"answer": answer})
    with pytest.raises(ValueError, match=place + message):
        tokenize_questions(rows, tokenizer, form, "easy")
    with pytest.raises(ValueError, match=message):
        tokenize_choices(of({"choices": [answer, "b"], "answer": answer}), tokenizer, form)
    # Trainers find it out when they are made.
    with pytest.raises(ValueError, match=message):
        BoostingTrainer(tiny.llama(), BoostingConfig(output_dir="nowhere"), rows, None, tokenizer, question_format=form)
    with pytest.raises(ValueError, match=message):
        StudentTrainer(tiny.llama(), StudentConfig(output_dir="nowhere"), rows, tokenizer, question_format=form)


def test_an_answer_of_a_thousand_letters_is_shown_where_it_differs() -> None:
    tokenizer = letters(normalizers.Lowercase(), decoders.Fuse())
    with pytest.raises(ValueError) as error:
        tokenize_questions(of({"answer": "a" * 5000 + "B" + "c" * 5000}), tokenizer, QuestionFormat("{prompt}:", " "))
    assert "aaaBccc" in str(error.value) and "aaabccc" in str(error.value)
    assert len(str(error.value)) < 600


def test_one_letter_written_in_two_ways_is_the_same() -> None:
    tokenizer = letters(normalizers.NFC(), decoders.Fuse(), known="ab: é")
    (row,) = tokenize_questions(of({"prompt": "a", "answer": "e\u0301"}), tokenizer, QuestionFormat("{prompt}:", " "))
    assert decode(row["input_ids"], tokenizer) == "a: é"


def test_letters_that_a_tokenizer_does_not_know_are_warned_of_once() -> None:
    tokenizer, form = _make_tokenizer(), QuestionFormat("{prompt}:", " ")
    rows = of({"answer": "cafe"}, {"answer": "café"}, {"answer": "漢"})
    message = "easy: 2 answers have letters that this tokenizer does not know, the first of them that of id q1"
    with pytest.warns(UserWarning, match=message) as warned:
        made = tokenize_questions(rows, tokenizer, form, "easy")
    assert len(warned) == 1
    answer = made[1]["input_ids"][made[1]["prompt_length"] :]
    assert answer == [*encode(" caf", tokenizer), tokenizer.unk_token_id, tokenizer.eos_token_id]
    with pytest.warns(UserWarning, match="1 answers have letters .* id q0"):
        tokenize_choices(of({"choices": ["é", "b"], "answer": "b"}), tokenizer, form, "easy")


def test_tokens_that_have_no_white_space_may_lose_a_prefix_of_it() -> None:
    tokenizer = letters(normalizers.Replace(" ", ""), decoders.Fuse(), known="ab:")
    (row,) = tokenize_questions(of({"prompt": "a", "answer": "ab"}), tokenizer, QuestionFormat("{prompt}:", " "))
    assert decode(row["input_ids"], tokenizer) == "a:ab"
    with pytest.raises(ValueError, match="does not keep ' a b'"):
        tokenize_questions(of({"prompt": "a", "answer": "a b"}), tokenizer, QuestionFormat("{prompt}:", " "))


def test_a_decoder_that_adds_spaces_spoils_texts_and_not_tokens() -> None:
    spaced = letters()
    form = QuestionFormat("{prompt}:", " ")
    # Training and scoring read no text.
    (row,) = tokenize_questions(of({"prompt": "ab", "answer": "ba"}), spaced, form)
    assert row["input_ids"] == [*encode("ab: ba", spaced), EOS]
    with pytest.raises(ValueError, match=r"cannot turn tokens into text: it reads those of 'ab:' as 'a b :', .*Fuse"):
        require_readable(form.prompt("ab", spaced))
    for name, make in FAITHFUL.items():
        for text in ("a b", " two  spaces\n", "x", "é漢"):
            require_readable(PromptTokens.of(text, make())), name
    require_readable(form.prompt("WHAT é", letters(normalizers.Lowercase(), decoders.Fuse())))
    require_readable(form.prompt("a b", words("a b :")))


def test_messages_name_no_place_twice() -> None:
    with pytest.raises(ValueError) as error:
        tokenize_questions(of({"answer": "Ab"}), LOSSY["case"][0], QuestionFormat("{prompt}:", " "), "easy")
    assert len(re.findall("easy, id q0", str(error.value))) == 1
