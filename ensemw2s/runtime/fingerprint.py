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
    """Name tokenised questions (`tokens.tokenize_questions`) by a hash of all their tokens, in their order."""
    return digest_columns(examples, ["input_ids", "prompt_length"])


def digest_values(*values: Any) -> str:
    """Name values of JSON by a hash."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def plain(value: Any) -> Any:
    """Turn what JSON does not know (sets, enums, paths) into what it does, sets into the same list everywhere."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
