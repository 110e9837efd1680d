"""What decides a result, in a form that can be compared: values and data as hashes, settings as plain JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def digest_columns(dataset: Dataset, columns: Iterable[str]) -> str:
    """Name a dataset by a hash of some columns, in the order of its rows."""
    digest = hashlib.blake2b(digest_size=16)
    names = list(columns)
    for row in dataset.select_columns(names):
        digest.update(json.dumps([row[name] for name in names]).encode())
    return digest.hexdigest()


def digest_questions(questions: Dataset) -> str:
    """Name questions by a hash of their prompts and answers, in their order."""
    return digest_columns(questions, ["prompt", "answer"])


def digest_examples(examples: Dataset) -> str:
    """Name tokenised questions (`ensemw2s.tokenize_questions`) by a hash of all their tokens, in their order."""
    return digest_columns(examples, ["input_ids", "prompt_length"])


def digest_json(value: Any, size: int = 16) -> str:
    """Name a value by a hash of `size` bytes; JSON or `plain` knows all that is in it, and no order of keys counts."""
    text = json.dumps(value, sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def plain(value: Any) -> Any:
    """Turn what JSON does not know (sets, enums, paths) into what it does, sets into the same list everywhere."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
