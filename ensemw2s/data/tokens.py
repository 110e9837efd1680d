"""Questions as tokens, with the answer marked."""

from __future__ import annotations

import functools
import json
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from ensemw2s.data.questions import check_questions, row_name, warn_of_unknown
from ensemw2s.data.shapes import Prompt, as_dataset, dataset_of
from ensemw2s.runtime.values import check_fields, shown, shown_names

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedTokenizerBase


IGNORED = -100
# The key of a format in the description of pseudo-answers.
_FORMAT_OF_ANSWERS = "question_format"

# Texts behind which what follows is tokenised where the prompt will not do. Nothing in front is right for byte-level
# tokenizers; SentencePiece's need something, which must not become one token with what follows.
_ANCHORS = ("", "\n", ":")
# Letters around the first difference of two texts that an error shows.
_SHOWN = 30


def encode(text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text alone, without those that the tokenizer would add."""
    return list(processing_class(text, add_special_tokens=False)["input_ids"])


def decode(ids: list[int], processing_class: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens, without special tokens and without tidying its spaces."""
    return str(processing_class.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a tokenizer cuts it.

    Attributes:
        text: the prompt.
        alone: the tokens of the text alone.
        front: the special tokens in front of the prompt (BOS), which are there once.
        body: the tokens of the prompt behind them.
        processing_class: whose tokens they are.
    """

    text: str
    alone: list[int]
    front: list[int]
    body: list[int]
    processing_class: PreTrainedTokenizerBase = field(repr=False)

    @classmethod
    def of(
        cls, text: str, processing_class: PreTrainedTokenizerBase, *, add_special_tokens: bool = True
    ) -> PromptTokens:
        """Tokenise a prompt, behind what the tokenizer puts in front unless `add_special_tokens` is False.

        Raises:
            ValueError: the tokenizer puts special tokens into the midst of a text.
        """
        alone = body = encode(text, processing_class)
        front = _front(text, alone, processing_class) if add_special_tokens else []
        written = front or [processing_class.bos_token_id]
        if alone[: len(written)] == written:
            # The text has it already, as that of a chat template does.
            front, body = written, alone[len(written) :]
        return cls(text, alone, front, body, processing_class)

    @property
    def ids(self) -> list[int]:
        """Return all tokens of the prompt."""
        return [*self.front, *self.body]

    def followed_by(self, prefix: str, answer: str) -> list[int]:
        """Return the tokens of `prefix + answer` behind the prompt.

        A prefix of white space may be lost, and letters that the tokenizer does not know become its unknown token.

        Raises:
            ValueError: the tokens do not say what the texts say: the tokenizer leaves letters out or changes the text
                (its case, its white space); says what they read.
        """
        text = prefix + answer
        tried: list[tuple[list[int], str]] = []
        for ids in self._ways(text):
            if not ids:
                return ids
            found = self.read(ids)
            if _same(found, text) or (not prefix.strip() and _same(found, answer)):
                return ids
            tried.append((ids, found))
        for ids, found in tried:
            if self._lacks_letters(found, text, ids) or self._is_only_spaced(found, text, ids):
                return ids
        found = tried[0][1] if tried else ""
        raise ValueError(
            f"this tokenizer does not keep {_around(text, found)}: behind the prompt its tokens read "
            f"{_around(found, text)}. It drops letters, or changes case, white space or special tokens: write the "
            "text as the tokenizer gives it back, or use another tokenizer"
        )

    def read(self, ids: list[int]) -> str:
        """Return the text that `ids` add to the prompt: some tokenizers drop a space from the first token of a text."""
        whole = decode([*self.ids, *ids], self.processing_class)
        return whole[len(self._read) :] if whole.startswith(self._read) else decode(ids, self.processing_class)

    @functools.cached_property
    def _read(self) -> str:
        """Return the text of the prompt's own tokens."""
        return decode(self.ids, self.processing_class)

    def _ways(self, text: str) -> Iterator[list[int]]:
        """Yield tokens for `text`, the best first, leaving out those of which one reaches across the boundary."""
        for front in (self.text, *_ANCHORS):
            before = self.alone if front == self.text else encode(front, self.processing_class)
            whole = encode(front + text, self.processing_class)
            if whole[: len(before)] == before:
                yield whole[len(before) :]

    def _lacks_letters(self, found: str, text: str, ids: list[int]) -> bool:
        """Say whether nothing is wrong but that unknown tokens stand for letters of `text`."""
        letters = iter(text)
        return self.processing_class.unk_token_id in ids and all(letter in letters for letter in found)

    def _is_only_spaced(self, found: str, text: str, ids: list[int]) -> bool:
        """Say whether the tokens are right, and it is the decoder that puts white space between them."""
        alike = _same("".join(found.split()), "".join(text.split()))
        return alike and _spaces(found) > _spaces(text) and not _come_back([*self.body, *ids], self.processing_class)


def end_tokens(processing_class: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Return the ids that end an answer, rising: the tokenizer's, and all of the generation config's."""
    ends = getattr(generation_config, "eos_token_id", None)
    return sorted({processing_class.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])} - {None})


def require_readable(prompt: PromptTokens) -> None:
    """Raise ValueError for a tokenizer whose tokens cannot be turned into text, since its decoder adds white space."""
    found = decode(prompt.body, prompt.processing_class)
    if _spaces(found) <= _spaces(prompt.text) or _come_back(prompt.body, prompt.processing_class):
        return
    raise ValueError(
        f"this tokenizer cannot turn tokens into text: it reads those of {_around(prompt.text, found)} as "
        f"{_around(found, prompt.text)}, which are other tokens, so no answer could be written down. Give it a decoder "
        "(tokenizer.backend_tokenizer.decoder, e.g. tokenizers.decoders.Fuse()), or use another tokenizer"
    )


def _front(text: str, body: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts in front of a text; what it appends would stand between prompt and answer."""
    if not tokenizer.num_special_tokens_to_add():
        return []
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start] if body else []
    raise ValueError(
        f"this tokenizer has the tokens {body[:8]} ... for {_around(text, '')}, but not one behind the other where it "
        f"adds its special tokens ({whole[:8]} ...), which may stand in front of a text or behind it: use another one"
    )


def _come_back(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether what tokens read has the same tokens; unknown ones, which read nothing, are left out."""
    known = [token for token in ids if token != tokenizer.unk_token_id]
    return encode(decode(known, tokenizer), tokenizer) == known


def _spaces(text: str) -> int:
    return sum(map(str.isspace, text))


def _same(one: str, other: str) -> bool:
    """Say whether two texts are the same letters: Unicode may compose them in several ways."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _around(text: str, other: str) -> str:
    """Return `text`, quoted, or what there is of it around the first letter in which it differs from `other`."""
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start, end = max(0, place - _SHOWN), place + _SHOWN
    return f"{'... ' if start else ''}{text[start:end]!r}{' ...' if end < len(text) else ''}"


@dataclass(frozen=True)
class QuestionFormat:
    """How a question becomes tokens; the same object serves training, labelling and measuring.

    Attributes:
        prompt_template: text in which `{prompt}` is replaced by the question.
        answer_prefix: what stands between prompt and answer, counted as part of the answer (most tokenizers attach a
            space to the word behind it). White space beyond it belongs to the answer's text.
        end_token: the end token follows the answer and is one of its tokens [choice]. Without it, answers cannot be
            decoded, since nothing ends them, but answers that are choices can be compared; one-token answers then give
            boosting exactly one unit each, as in AdaBoost.
        use_chat_template: pass the filled template through the tokenizer's chat template as the user's message. Of a
            prompt that is a conversation, and so needs this, the last message fills the template.
        system_message: stands in front of the messages.
        chat_template_kwargs: what the chat template reads besides, e.g. `{"enable_thinking": False}`.
        max_length: tokens that prompt and answer may have together; None leaves it to the tokenizer's
            `model_max_length`, which `ensemw2s.load_tokenizer` sets to the model's context.
        truncate_prompt: shorten a prompt that leaves too little room for the answer, instead of refusing it [choice].
            It is cut on the left: the end of the question stays, the beginning of the template does not.
    """

    prompt_template: str = "{prompt}\nAnswer:"
    answer_prefix: str = " "
    end_token: bool = True
    use_chat_template: bool = False
    system_message: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_length: int | None = None
    truncate_prompt: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.use_chat_template and (self.system_message, self.chat_template_kwargs) != (None, None):
            raise ValueError("system_message and chat_template_kwargs do nothing without use_chat_template=True")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template must contain {{prompt}}, got {shown(self.prompt_template)}")

    def prompt(self, prompt: Prompt, processing_class: PreTrainedTokenizerBase) -> PromptTokens:
        """Return a prompt in tokens, with what reads and writes behind it; see `ensemw2s.data.tokens`.

        Raises:
            ValueError: see `input`; a chat template that is missing (for a conversation too), refuses the messages, or
                reads no such kwargs.
        """
        if not (isinstance(prompt, str) or processing_class.chat_template):
            raise ValueError(
                f"the prompt {shown(prompt)} is a conversation, and this tokenizer has no chat template to render it: "
                "load the tokenizer of a chat model, set tokenizer.chat_template, or give prompts as texts"
            )
        asked = self.input(prompt)
        if isinstance(asked, str):
            return PromptTokens.of(asked, processing_class)
        template, settings = processing_class.get_chat_template(), self.chat_template_kwargs or {}
        for name in settings:
            if name not in template:
                raise ValueError(f"this tokenizer's chat template does not read {name:.60} of chat_template_kwargs")
        try:
            text = processing_class.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **settings)
        except jinja2.TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses {shown(asked)}: {error}") from error
        return PromptTokens.of(str(text), processing_class, add_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values; those of the chat template decide nothing where they are not set."""
        unset = {name for name in ("system_message", "chat_template_kwargs") if getattr(self, name) is None}
        return {name: value for name, value in asdict(self).items() if name not in unset}

    def input(self, prompt: Prompt) -> Prompt:
        """Return the text that is asked, or with `use_chat_template` the messages, the system's included.

        Raises:
            ValueError: a conversation without `use_chat_template`, or with a system message beside `system_message`.
        """
        if not self.use_chat_template:
            if isinstance(prompt, str):
                return self.prompt_template.replace("{prompt}", prompt)
            raise ValueError(
                f"the prompt {shown(prompt)} is a conversation, which the tokenizer's chat template renders: pass "
                'question_format=QuestionFormat(prompt_template="{prompt}", answer_prefix="", use_chat_template=True)'
            )
        *before, last = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_message is not None:
            if before and before[0]["role"] == "system":
                raise ValueError(f"the prompt has the message {shown(before[0])} already: leave system_message out")
            before.insert(0, {"role": "system", "content": self.system_message})
        return [*before, {**last, "content": self.prompt_template.replace("{prompt}", last["content"])}]

    def answer_ids(self, answer: str, processing_class: PreTrainedTokenizerBase, prompt: Prompt = "") -> list[int]:
        """Return the token ids of an answer behind its prompt, without the end token."""
        return self.prompt(prompt, processing_class).followed_by(self.answer_prefix, answer)

    def answer_text(self, ids: Sequence[int], prompt: PromptTokens) -> str:
        """Return the answer that tokens (without the end token) give behind a prompt, all its white space included."""
        return prompt.read(list(ids)).removeprefix(self.answer_prefix)


def checked_format(question_format: Any) -> QuestionFormat:
    """Return a format that somebody gave, or the default one for None; TypeError for anything else."""
    if question_format is None:
        return QuestionFormat()
    if not isinstance(question_format, QuestionFormat):
        template = shown(question_format) if isinstance(question_format, str) else "'{prompt}='"
        raise TypeError(
            f"question_format is {shown(question_format)}, expected a QuestionFormat: give "
            f"QuestionFormat(prompt_template={template}), with answer_prefix='' if nothing stands before the answer"
        )
    return question_format


def described_format(described: Any, where: str) -> dict[str, Any] | None:
    """Return the checked description of a format (`QuestionFormat.describe`); `where` begins the error for another."""
    if described is None:
        return None
    if not isinstance(described, Mapping):
        raise ValueError(f"{where}: question_format must be a mapping or null, got {shown(described)}")
    try:
        return QuestionFormat(**described).describe()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: question_format cannot be {shown(dict(described))}: {error}") from error


def format_of(model: Any, asked: QuestionFormat | None = None) -> QuestionFormat:
    """Return the format `asked` for, or the one in which a model was trained by its configuration, or the default one.

    A format that is not the one in which the model was trained comes with a warning.

    Raises:
        TypeError: see `checked_format`.
    """
    asked = None if asked is None else checked_format(asked)
    own = getattr(getattr(model, "config", None), "question_format", None)
    trained = None if own is None else QuestionFormat(**own)
    if None not in (asked, trained) and asked != trained:
        warnings.warn(
            f"the model was trained on questions in the format {trained}, and is asked in the format {asked}: leave "
            "question_format out to ask as in training",
            stacklevel=3,
        )
    return asked or trained or QuestionFormat()


def asked_in(answers: Dataset, question_format: QuestionFormat) -> Dataset:
    """Return answers whose description (`Dataset.info`) says in which format they were asked for.

    What is selected, filtered or mapped of them keeps it; files of rows do not.
    """
    answers.info.description = json.dumps({_FORMAT_OF_ANSWERS: question_format.describe()})
    return answers


def format_of_answers(answers: Any, columns: Sequence[str]) -> QuestionFormat:
    """Return the format in which answers were asked for (`asked_in`), or the default one where they do not say it.

    Args:
        answers: what was given.
        columns: their columns; those that only `TokenEnsemble.label` makes, without a format, come with a warning.
    """
    described: Any = getattr(getattr(answers, "info", None), "description", None)
    try:
        described = json.loads(described or "null")
    except ValueError:  # somebody else's words
        described = None
    own = described.get(_FORMAT_OF_ANSWERS) if isinstance(described, dict) else None
    if own is None and {"confidence", "agreement"} <= set(columns):
        warnings.warn(
            "these pseudo-answers no longer say in which format they were asked for (files and tables never do) "
            "and are taught in the default one: pass question_format, such as ensemble.question_format",
            stacklevel=3,
        )
    return QuestionFormat(**(described_format(own, "the description of the answers") or {}))


def to_prompt_completion(answers: Any, question_format: QuestionFormat) -> Dataset:
    """Return questions with answers (`ensemw2s.data.shapes.as_dataset`) as TRL's trainers read them: `prompt` and
    `completion`.

    With `use_chat_template` both are lists of messages, and there is a column `chat_template_kwargs` if the format has
    any; else they are texts, in which the template is filled and the prefix stands.

    Raises:
        TypeError, ValueError: see `check_questions`, `checked_format` and `QuestionFormat.input`.
    """
    question_format = checked_format(question_format)
    rows = []
    for row in check_questions(answers, "answers"):
        completion: Any = question_format.answer_prefix + row["answer"]
        if question_format.use_chat_template:
            completion = [{"role": "assistant", "content": completion}]
        rows.append({"prompt": question_format.input(row["prompt"]), "completion": completion})
        if question_format.chat_template_kwargs:
            rows[-1]["chat_template_kwargs"] = question_format.chat_template_kwargs
    return dataset_of(rows, "answers")


def tokenize_questions(
    dataset: Any,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat | None = None,
    name: str = "dataset",
    *,
    answer_ids: Sequence[Sequence[int]] | None = None,
) -> Dataset:
    """Turn questions with answers into token ids, the boundary between prompt and answer being a position.

    An answer has the tokens that follow its prompt's where both are tokenised as one text (`ensemw2s.data.tokens`), and
    is followed by the end token, which is one of its tokens [choice] unless `question_format.end_token` is False.

    Args:
        dataset: questions with answers, in any shape that `ensemw2s.data.shapes.as_dataset` takes.
        processing_class: must have an end token.
        question_format: how a question becomes tokens; None is `QuestionFormat()`.
        name: what errors call the dataset.
        answer_ids: the answers' tokens where they are known already, prefix and end token included, one row each;
            None tokenises the answers.

    Returns:
        `id`, `input_ids` (list of int: prompt, answer, end token) and `prompt_length` (int: where the answer starts).

    Raises:
        TypeError, ValueError: see `check_questions` and `checked_format`; a tokenizer without an end token, an answer
            of no tokens or one that the tokenizer changes, a prompt of no tokens, or more tokens than
            `question_format.max_length` (or the tokenizer's `model_max_length`); names the row.
    """
    from datasets import Dataset

    question_format = checked_format(question_format)
    rows, row_names = [], []
    for index, row in enumerate(check_questions(dataset, name)):
        row_names.append(row_name(row, index))
        place = f"{name}, {row_names[-1]}"
        prompt = question_format.prompt(row["prompt"], processing_class)
        if answer_ids is None:
            answer = answer_with_end(row["answer"], prompt, question_format, place)
        else:
            answer = list(answer_ids[index])
            if not answer:
                raise ValueError(f"{place}: the answer {shown(row['answer'])} has no tokens in answer_ids")
        ids = fitted_prompt(prompt, len(answer), question_format, place)
        rows.append({"id": row["id"], "input_ids": [*ids, *answer], "prompt_length": len(ids)})
    answers = (row["input_ids"][row["prompt_length"] :] for row in rows)
    warn_of_unknown(zip(row_names, answers, strict=True), processing_class, name)
    return Dataset.from_list(rows)


def answer_with_end(answer: str, prompt: PromptTokens, question_format: QuestionFormat, place: str) -> list[int]:
    """Return an answer's tokens behind its prompt, the end token included where the format has one.

    Raises:
        ValueError: a tokenizer without an end token, an answer of no tokens or one that the tokenizer changes; `place`
            names the row.
    """
    end = [_end_token(prompt.processing_class)]
    try:
        ids = prompt.followed_by(question_format.answer_prefix, answer)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not ids:
        raise ValueError(f"{place}: the answer {shown(answer)} has no tokens in this tokenizer")
    return ids + end if question_format.end_token else ids


def fitted_prompt(
    prompt: PromptTokens, num_answer_tokens: int, question_format: QuestionFormat, place: str
) -> list[int]:
    """Return a prompt's tokens, which leave room for the answer's; `place` names the row in errors.

    Raises:
        ValueError: no tokens, or more than fit and `question_format.truncate_prompt` is False.
    """
    ids, limit = _cut_prompt(prompt, num_answer_tokens, question_format, place)
    length = len(ids) + num_answer_tokens
    if limit is not None and length > limit:
        raise ValueError(
            f"{place}: prompt and answer have {length} tokens ({num_answer_tokens} of them the answer), more than the "
            f"{limit} allowed: leave the row out, raise max_length (up to the model's context), or let "
            "truncate_prompt=True shorten prompts"
        )
    return ids


def tokenize_prompts(
    dataset: Any,
    processing_class: PreTrainedTokenizerBase,
    question_format: QuestionFormat,
    name: str = "dataset",
    answer_length: int = 1,
) -> Dataset:
    """Turn questions into the token ids of their prompts: columns `id` and `input_ids`.

    Args:
        dataset: questions with or without answers, in any shape that `ensemw2s.data.shapes.as_dataset` takes.
        processing_class: the model's.
        question_format: how a question becomes tokens.
        name: of the dataset, for errors.
        answer_length: tokens to leave room for where prompts are cut (`question_format.truncate_prompt`).

    Raises:
        TypeError, ValueError: see `check_questions`; a tokenizer without an end token, a prompt of no tokens, or one
            that leaves no room for an answer (see `tokenize_questions`); names the row.
    """
    _end_token(processing_class)
    rows = []
    for index, row in enumerate(check_questions(dataset, name, answered=False)):
        prompt = question_format.prompt(row["prompt"], processing_class)
        ids, _ = _cut_prompt(prompt, answer_length, question_format, f"{name}, {row_name(row, index)}")
        rows.append({"id": row["id"], "input_ids": ids})
    return dataset_of(rows, name)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token_id is None): set one, answers end with it")
    return int(tokenizer.eos_token_id)


def _cut_prompt(
    prompt: PromptTokens, answer_length: int, question_format: QuestionFormat, place: str
) -> tuple[list[int], int | None]:
    """Return a prompt's tokens, cut on the left if the format says so, and how many it may have with its answer."""
    ids, own = prompt.ids, prompt.processing_class.model_max_length
    # Tokenizers without a limit carry an absurdly large one.
    limits = [limit for limit in (question_format.max_length, own) if limit is not None and limit < 10**9]
    limit = min(limits, default=None)
    if question_format.truncate_prompt and limit is not None:
        ids = prompt.front + prompt.body[-max(1, limit - answer_length - len(prompt.front)) :]
    if not ids:
        raise ValueError(f"{place}: the prompt has no tokens, so nothing precedes the answer")
    if limit is not None and len(ids) >= limit:
        raise ValueError(
            f"{place}: the prompt has {len(ids)} tokens and leaves no room for an answer within the {limit} allowed: "
            "leave the row out, raise max_length (up to the model's context), or pass truncate_prompt=True"
        )
    return ids, limit


def answer_lengths(examples: Dataset) -> np.ndarray:
    """Return int64 [N], the answer tokens (the end token among them) of each row of `tokenize_questions`."""
    rows = zip(examples["input_ids"], examples["prompt_length"], strict=True)
    return np.array([len(ids) - start for ids, start in rows], dtype=np.int64)


def check_examples(examples: Any, name: str, vocab_size: int | None = None) -> Dataset:
    """Return tokenised questions with answers, in any shape that `ensemw2s.data.shapes.as_dataset` takes, after
    checking them.

    Raises:
        ValueError: no rows, a column is missing, an answer or a prompt has no tokens, or a token is none of a
            vocabulary of `vocab_size`; names the row.
    """
    examples = as_dataset(examples, name)
    for column in ("input_ids", "prompt_length"):
        if column not in examples.column_names:
            raise ValueError(
                f"{name}: the examples have no column {column!r}, only {shown_names(examples.column_names)}: "
                "make them with ensemw2s.tokenize_questions"
            )
    if len(examples) == 0:
        raise ValueError(f"{name}: 0 examples, expected at least one")
    starts = np.asarray(examples["prompt_length"])
    for what, bad in (("answer", answer_lengths(examples) < 1), ("prompt", starts < 1)):
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"{name}, {_example_name(examples, row)}: the {what} has no tokens (prompt_length {starts[row]} of "
                f"{len(examples[row]['input_ids'])} tokens): leave the row out"
            )
    if vocab_size is not None:
        _check_vocabulary(examples, name, vocab_size)
    return examples


def _check_vocabulary(examples: Dataset, name: str, vocab_size: int) -> None:
    for row, ids in enumerate(examples["input_ids"]):
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"{name}, {_example_name(examples, row)}: token id {wrong}, but the model's "
                f"vocabulary has {vocab_size} tokens, numbered from 0: use the tokenizer that belongs to the model, or "
                "resize the model first (model.resize_token_embeddings(len(tokenizer)))"
            )


def _example_name(examples: Dataset, row: int) -> str:
    return row_name(examples[row], row) if "id" in examples.column_names else f"row {row}"
