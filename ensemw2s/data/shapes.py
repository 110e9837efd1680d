"""Data as people have it, brought to one shape: the door through which all questions and answers come.

A prompt is a text or a conversation, a list of messages `{"role": ..., "content": ...}`; an answer is a text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ensemw2s.runtime.console import no_dataset_bars
from ensemw2s.runtime.values import shown, shown_names

# `datasets` is imported where it is used: an ensemble can decode without it.
if TYPE_CHECKING:
    from datasets import Dataset


Prompt = str | list[dict[str, str]]
COLUMNS = ("prompt", "answer", "choices", "difficulty", "id")
_SHAPES = "a datasets.Dataset (of a DatasetDict, one split), an IterableDataset, a pandas DataFrame or a list of dicts"


def as_dataset(data: Any, name: str, columns: Mapping[str, str] | None = None) -> Dataset:
    """Return questions as a dataset without a format, with our columns.

    TRL's columns become ours where ours are not there: `completion` is the answer, and `messages` are a prompt and, the
    last of them, the answer. An answer may be given as one message of the assistant.

    Args:
        data: a `datasets.Dataset` in any format, an `IterableDataset` (which is read whole, into memory), a pandas
            DataFrame, or a list of dicts; lists in them may be NumPy arrays.
        name: begins every error.
        columns: what our columns are called in `data`, e.g. `{"prompt": "question"}`.

    Raises:
        TypeError: data of another shape.
        ValueError: a list of no rows, values of several types in a column, `columns` that do not fit, or messages of
            anything but `role` and `content`, both text.
    """
    import pandas as pd
    from datasets import Dataset, IterableDataset

    if isinstance(data, pd.DataFrame):
        # What is missing is None, as elsewhere, in every kind of column.
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    computed = isinstance(data, Dataset) and data.format["type"] == "custom"
    if computed or isinstance(data, IterableDataset | list | tuple):
        data = dataset_of(list(data), name)
    if isinstance(data, str | os.PathLike):
        raise TypeError(
            f"{name} is {str(data)[:200]!r}, expected {_SHAPES}: a file is read by load_questions, and a "
            'single question is [{"prompt": ...}]'
        )
    if not isinstance(data, Dataset):
        single = ': a single question is [{"prompt": ...}]' if isinstance(data, Mapping) else ""
        raise TypeError(f"{name} is a {type(data).__name__}, expected {_SHAPES}{single}")
    return _with_texts(_renamed(data.with_format(None), columns or {}, name), name)


def with_column(dataset: Dataset, name: str, values: Any) -> Dataset:
    """Return the dataset with one column more, without a bar for rows that were selected before."""
    with no_dataset_bars():
        return dataset.add_column(name, values)


def dataset_of(rows: Sequence[Mapping[str, Any]], name: str) -> Dataset:
    """Return rows as a dataset with every column that any row has, without disturbing other threads.

    `Dataset.from_list` computes a fingerprint of the content, for which dill takes `sys.stdout` from all threads for a
    moment; where two threads do so at once, it may never come back.
    Raises ValueError for no rows or values of several types, TypeError for rows that are no dicts, naming `name`.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.arrow_writer import OptimizedTypedSequence
    from datasets.fingerprint import generate_random_fingerprint
    from datasets.table import InMemoryTable

    if not rows:
        raise ValueError(f"{name} is empty: expected questions with columns prompt and answer")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f'{name}, row {index} is {shown(row)}, expected a dict such as {{"prompt": "..."}}')
    made: dict[str, Any] = {}
    for column in dict.fromkeys(column for row in rows for column in row):
        values = [row.get(column) for row in rows]
        if column == "id":
            # Whole numbers as long as any, and text.
            values = [str(value) if type(value) is int else value for value in values]
        try:
            made[column] = pa.array(OptimizedTypedSequence(values, col=column))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{name}: the values of column {shown(column)} must be of one type, text that is whole, or numbers of "
                f"up to 64 bits ({error})"
            ) from error
    try:
        return Dataset(InMemoryTable.from_pydict(made), fingerprint=generate_random_fingerprint())
    except ValueError as error:
        raise ValueError(f"{name}: a column has a name that is no text, {shown_names(map(shown, made))}") from error


def _renamed(dataset: Dataset, columns: Mapping[str, str], name: str) -> Dataset:
    """Give the columns our names; what held one of our names before, and is not asked for, is left out."""
    if not isinstance(columns, Mapping):
        raise ValueError(
            f'columns must map our names to those of {name}, e.g. {{"prompt": "question"}}; got {shown(columns)}'
        )
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            turned = f': our names come first, {{"{theirs}": "{ours!s:.60}"}} ({theirs}={ours!s:.60} in --columns)'
            hint = turned if theirs in COLUMNS else ""
            raise ValueError(f"columns: {shown(ours)} is none of our columns {', '.join(COLUMNS)}{hint}")
        if theirs not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {shown(theirs)} (for {ours}); its columns are "
                f"{shown_names(dataset.column_names)}"
            )
    if len(set(columns.values())) < len(columns):
        raise ValueError(f"columns maps two of our names to one column of {name}: {shown(columns)}; give each its own")
    dropped = [ours for ours in columns if ours in dataset.column_names and ours not in columns.values()]
    return dataset.remove_columns(dropped).rename_columns({theirs: ours for ours, theirs in columns.items()})


def _with_texts(dataset: Dataset, name: str) -> Dataset:
    """Turn TRL's columns into ours, conversations into plain messages, and answers that are messages into text."""
    names = dataset.column_names
    if "messages" in names and not {"prompt", "answer"} & set(names):
        turns = [_messages(row, f"{name}, row {i}: messages") for i, row in enumerate(dataset["messages"])]
        dataset = with_column(dataset, "prompt", [row[:-1] for row in turns])
        dataset = with_column(dataset, "answer", [row[-1:] for row in turns]).remove_columns("messages")
    elif "completion" in names and "answer" not in names:
        dataset = dataset.rename_column("completion", "answer")
    for column, read in (("prompt", _messages), ("answer", _spoken)):
        values = list(dataset[column]) if column in dataset.column_names else []
        if any(isinstance(value, list) for value in values):
            made = [read(value, f"{name}, row {i}: {column}") for i, value in enumerate(values)]
            if made != values:
                # Without any column a dataset would have no rows.
                given = dataset.rename_column(column, f"{column} as given")
                dataset = with_column(given, column, made).remove_columns(f"{column} as given")
    return dataset


def _messages(value: Any, place: str) -> list[dict[str, str]]:
    for message in value if isinstance(value, list) and value else [value]:
        known = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        # Where rows differ in their keys, Arrow fills them up with None.
        if not known or any(item for key, item in message.items() if key not in ("role", "content")):
            raise ValueError(
                f"{place} has {shown(message)}, expected messages of role and content, both text: tools, images and "
                "the like are not supported, leave the row out"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _spoken(value: Any, place: str) -> str:
    messages = _messages(value, place)
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(f"{place} is {shown(value)}, expected one message, the assistant's, behind its prompt")
    return messages[0]["content"]
