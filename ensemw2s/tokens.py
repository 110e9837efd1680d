"""How a text becomes tokens and tokens become text again, with the boundary between prompt and answer kept.

A prompt is tokenised by itself, since that is what a model is given when it is to answer, with what the tokenizer puts
in front of every text (BOS) and without what it appends (EOS). What follows is tokenised as the model would go on
writing it: behind the prompt, as one text, never as a text of its own, to which some tokenizers (SentencePiece's) give
a space that nobody wrote. Where the tokens of the one text do not begin with the prompt's, because one of them reaches
across the boundary, the prompt keeps its tokens and what follows gets those that it has behind another text.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

# Texts behind which what follows is tokenised where the prompt will not do. Nothing in front is right for byte-level
# tokenizers; SentencePiece's need something, which must not become one token with what follows.
_ANCHORS = ("", "\n", ":")
# Letters around the first difference of two texts that an error shows.
_SHOWN = 30


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text alone, without those that the tokenizer would add."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens, without special tokens and without tidying its spaces."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a tokenizer cuts it.

    Attributes:
        text: the prompt.
        alone: the tokens of the text alone.
        front: the special tokens in front of the prompt (BOS), which are there once.
        body: the tokens of the prompt behind them.
        tokenizer: whose tokens they are.
    """

    text: str
    alone: list[int]
    front: list[int]
    body: list[int]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = True) -> PromptTokens:
        """Tokenise a prompt.

        Args:
            text: the prompt.
            tokenizer: the model's.
            add_special_tokens: put in front what the tokenizer puts there; False for a text that has it already.

        Raises:
            ValueError: the tokenizer puts special tokens into the midst of a text.
        """
        alone = encode(text, tokenizer)
        front = _front(text, alone, tokenizer) if add_special_tokens else []
        written = front or [tokenizer.bos_token_id]
        if alone[: len(written)] == written:
            # The text has it already, as that of a chat template does.
            return cls(text, alone, written, alone[len(written) :], tokenizer)
        return cls(text, alone, front, alone, tokenizer)

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
        whole = decode([*self.ids, *ids], self.tokenizer)
        return whole[len(self._read) :] if whole.startswith(self._read) else decode(ids, self.tokenizer)

    @functools.cached_property
    def _read(self) -> str:
        """Return the text of the prompt's own tokens."""
        return decode(self.ids, self.tokenizer)

    def _ways(self, text: str) -> Iterator[list[int]]:
        """Yield tokens for `text`, the best first."""
        ways = (self._behind(front, text) for front in (self.text, *_ANCHORS))
        return (ids for ids in ways if ids is not None)

    def _behind(self, front: str, text: str) -> list[int] | None:
        """Return the tokens of `text` behind `front`, None where a token reaches across the boundary."""
        before = self.alone if front == self.text else encode(front, self.tokenizer)
        whole = encode(front + text, self.tokenizer)
        return whole[len(before) :] if whole[: len(before)] == before else None

    def _lacks_letters(self, found: str, text: str, ids: list[int]) -> bool:
        """Say whether nothing is wrong but that unknown tokens stand for letters of `text`."""
        letters = iter(text)
        return self.tokenizer.unk_token_id in ids and all(letter in letters for letter in found)

    def _is_only_spaced(self, found: str, text: str, ids: list[int]) -> bool:
        """Say whether the tokens are right, and it is the decoder that puts white space between them."""
        alike = _same("".join(found.split()), "".join(text.split()))
        return alike and _spaces(found) > _spaces(text) and not _come_back([*self.body, *ids], self.tokenizer)


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Return the ids that end an answer, rising: the tokenizer's, and all of the generation config's."""
    ends = getattr(generation_config, "eos_token_id", None)
    return sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])} - {None})


def require_readable(prompt: PromptTokens) -> None:
    """Raise ValueError for a tokenizer whose tokens cannot be turned into text, since its decoder adds white space."""
    found = decode(prompt.body, prompt.tokenizer)
    if _spaces(found) <= _spaces(prompt.text) or _come_back(prompt.body, prompt.tokenizer):
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
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _around(text: str, other: str) -> str:
    """Return `text`, quoted, or what there is of it around the first letter in which it differs from `other`."""
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start, end = max(0, place - _SHOWN), place + _SHOWN
    return f"{'... ' if start else ''}{text[start:end]!r}{' ...' if end < len(text) else ''}"
