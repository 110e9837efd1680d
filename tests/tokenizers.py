"""Tokenizers of every make, trained on a few lines, for tests of how texts become tokens and tokens texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests import tiny

SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
BYTES = [f"<0x{value:02X}>" for value in range(256)]
TEXT = (
    "What is 12 plus 30? Answer: 42\nSay the word: token\ndef add(a, b):\n    return a + b\n"
    "the theory of the other thing is that they answer\nx = [1, 2]\n\n\tindented  twice   three\n"
) * 3


def wrapped(inner: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """Return a transformers tokenizer with the usual special tokens."""
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **(tokens | settings))


def _template(front: bool, behind: bool) -> processors.TemplateProcessing:
    single = " ".join(["<s>"] * front + ["$A"] + ["</s>"] * behind)
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])


def byte_level(add_prefix_space: bool = False, behind: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen and SmolLM2 have it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT], trainer)
    inner.post_processor = _template(front=False, behind=behind)
    return wrapped(inner, unk_token=None)


def _pieces(split: bool = True) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of SentencePiece's kind, single bytes for what it does not know included."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split)
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + BYTES, show_progress=False)
    inner.train_from_iterator(TEXT.splitlines(), trainer)
    state = json.loads(inner.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def _sentence_piece_decoder() -> Any:
    strip = decoders.Strip(content=" ", left=1, right=0)
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])


def metaspace(scheme: str = "always", split: bool = True, front: bool = True, behind: bool = False) -> Any:
    """SentencePiece's space before words, in front of the first word too unless `scheme` is "never"."""
    vocabulary, merges = _pieces()
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    inner.decoder = _sentence_piece_decoder()
    if scheme == "never":
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = _template(front, behind)
    return wrapped(inner)


def legacy_llama(front: bool = True, behind: bool = False) -> PreTrainedTokenizerFast:
    """As the files of Llama-2, Mistral and TinyLlama say it: the dummy prefix is a normaliser's."""
    vocabulary, merges = _pieces()
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = _sentence_piece_decoder()
    inner.post_processor = _template(front, behind)
    return wrapped(inner)


def llama_class(legacy: bool, behind: bool = False) -> PreTrainedTokenizerBase:
    """transformers' own class."""
    vocabulary, merges = _pieces()
    return LlamaTokenizer(
        vocab=vocabulary, merges=merges, legacy=legacy, add_bos_token=True, add_eos_token=behind, pad_token="</s>"
    )


def letters(normalizer: Any = None, decoder: Any = None, known: str = tiny.LETTERS, front: bool = False) -> Any:
    """One token per letter."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *known])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if decoder is not None:
        inner.decoder = decoder
    inner.post_processor = _template(front, behind=False)
    return wrapped(inner)


def words(known: str) -> PreTrainedTokenizerFast:
    """One token per word, white space between them being none."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *known.split()])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(inner)


class PlainLetters(PreTrainedTokenizer):
    """One token per byte, in Python: a tokenizer without a fast backend, which appends its end token."""

    def __init__(self, **settings: Any) -> None:
        self.table = {token: index for index, token in enumerate([*SPECIAL, *map(chr, range(256))])}
        self.back = {index: token for token, index in self.table.items()}
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", **settings)

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.table)

    def _tokenize(self, text: str, **settings: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return self.table.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.back[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(token) for token in tokens).decode(errors="replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [BOS, *token_ids_0, EOS]


# Those that keep every text. Each is made once.
FAITHFUL: dict[str, Callable[[], Any]] = {
    name: functools.cache(make)
    for name, make in {
        "byte level": byte_level,
        "byte level, space in front": functools.partial(byte_level, add_prefix_space=True),
        "byte level, end appended": functools.partial(byte_level, behind=True),
        "metaspace always": functools.partial(metaspace, "always"),
        "metaspace always, unsplit": functools.partial(metaspace, "always", split=False),
        "metaspace first": functools.partial(metaspace, "first"),
        "metaspace first, end appended": functools.partial(metaspace, "first", behind=True),
        "metaspace never": functools.partial(metaspace, "never", front=False),
        "legacy llama": legacy_llama,
        "legacy llama, end appended": functools.partial(legacy_llama, front=False, behind=True),
        "llama class": functools.partial(llama_class, legacy=False),
        "llama class, legacy, end appended": functools.partial(llama_class, legacy=True, behind=True),
        "python": PlainLetters,
    }.items()
}
__all__ = ["BOS", "EOS", "FAITHFUL", "PlainLetters", "byte_level", "legacy_llama", "letters", "words"]
