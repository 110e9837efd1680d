"""Questions and answers: loading, checking, splitting.

A dataset is a `datasets.Dataset` with columns `prompt` and `answer`, and optionally `choices`, `difficulty` and `id`.
Anything else is brought to that at the door (`shapes`).
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import numbers
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemw2s.data.bigbench import bigbench_questions
from ensemw2s.data.characters import character_questions
from ensemw2s.data.known_datasets import binary_question, from_schema
from ensemw2s.data.shapes import Prompt, as_dataset, dataset_of, with_column
from ensemw2s.runtime.fingerprint import digest_json
from ensemw2s.runtime.parsing import parse_json, read_text, require_file
from ensemw2s.runtime.values import LARGEST, shown, shown_names

# `datasets` is imported where it is used: an ensemble can decode without it.
if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


SOURCE_KINDS = ("file", "hub", "bigbench", "reasoning_gym", "characters")
_UNANSWERED = (
    ". Answers are needed to learn from questions and to measure with them; a TokenEnsemble answers questions without "
    "any by its method label"
)
_OPTIONS = ("columns", "schema", "context", "choices", "binary", "prompt_regex", "prompt_filter")
# A generator is asked for this many batches of questions before its distinct prompts count as exhausted.
_MAX_TRIES = 8
# What `_content_ids` makes; nobody knows a row by it.
_MADE_UP = re.compile(r"[0-9a-f]{16}(-[0-9]+)?")
_LETTERS_OF_PROMPT = 40
# Of a text that stands for a choice: its letter, or its place.
_FOR_A_CHOICE = re.compile(r"\(?([A-Za-z]|[0-9]{1,2})[.)]?")
_TEXT_OF_CHOICE = "a letter or an index has to become the text of the choice itself"


def load_questions(
    source: Mapping[str, Any] | str | os.PathLike[str], *, columns: Mapping[str, str] | None = None
) -> Dataset:
    """Load questions from a file, the hub, or a generator.

    Args:
        source: a path, or a mapping with exactly one of

            - `file`: a local `.jsonl`, `.json`, `.csv` or `.parquet` file;
            - `hub`: a dataset's id on the hub, with `name` and `split` where needed;
            - `bigbench`: a task of that package, which holds real questions (see
              `ensemw2s.data.bigbench.bigbench_questions`);
            - `reasoning_gym`: a task of that package, with `size`, `seed` and the task's own settings;
            - `characters`: a task of `ensemw2s.models.characters`, with `size`, `seed`, `min_length`, `max_length`;

            and optionally

            - `columns`: what our columns are called in a file or on the hub, e.g. `{"prompt": "question"}`;
            - `schema`: the published dataset whose rows a file or the hub holds ("arc", "gsm8k", "quartz", "sciq"; see
              `ensemw2s.data.known_datasets.SCHEMAS`), which maps all columns;
            - `context`: whether the passage that belongs to a schema's question goes into the prompt;
            - `choices`: one list of answers for all questions;
            - `binary`: True makes each question with choices a yes/no question (see
              `ensemw2s.data.known_datasets.binary_question`);
            - `prompt_filter`: a regular expression; questions of a file, the hub or BIG-bench in whose prompts it finds
              nothing are left out;
            - `prompt_regex`: its first group, found in each prompt, replaces the prompt.
        columns: the same as `columns` in the mapping, for a path.

    Returns:
        Columns `id` (made from the content where there is none), `prompt`, `answer`, `choices` where there are any,
        and whatever else came along; later rows that repeat a prompt are left out, with a warning.

    Raises:
        TypeError: a source that is neither a path nor a mapping, such as questions themselves.
        ValueError: an unknown kind of source, task, schema or setting, a file that cannot be read as what its name
            says, a missing column, choices that are none (`check_questions`), an empty result, fewer distinct
            questions than `size`, or a regex that does not match.
        FileNotFoundError: the file does not exist.
        ImportError: reasoning_gym or bigbench is not installed.
    """
    from datasets import Dataset

    if not isinstance(source, str | os.PathLike | Mapping):
        raise TypeError(
            f"a source of questions is a path or a mapping, got a {type(source).__name__}: questions in memory need no "
            "loading, pass them as they are (check_questions(data, columns=...) gives their columns our names)"
        )
    source = {"file": source} if isinstance(source, str | os.PathLike) else dict(source)
    if columns is not None:
        if "columns" in source:
            raise ValueError("columns is given twice, in the source and beside it: keep one of them")
        source["columns"] = columns
    kinds = [kind for kind in SOURCE_KINDS if kind in source]
    if len(kinds) != 1:
        raise ValueError(
            f"a source of questions needs exactly one of {', '.join(SOURCE_KINDS)}; got {shown_names(source)}"
        )
    kind = kinds[0]
    if not isinstance(source[kind], str | os.PathLike) or not os.fspath(source[kind]):
        raise ValueError(f"{kind} of a source of questions must be text, got {shown(source[kind])}")
    columns, schema, context, choices, binary, regex, wanted = (source.pop(name, None) for name in _OPTIONS)
    if kind in ("reasoning_gym", "characters"):
        name = f"{kind} {source[kind]}"
        for option, value in (("columns", columns), ("schema", schema), ("context", context)):
            if value is not None:
                raise ValueError(f"{name}: its questions have our columns already, leave `{option}` out")
        if wanted is not None:
            raise ValueError(f"{name}: its own settings say which questions it makes, leave `prompt_filter` out")
        return _answered_by_choice(check_questions(_generated(kind, source, regex), name), choices, binary, name)
    loaded = {"file": _from_file, "hub": _from_hub, "bigbench": _from_bigbench}[kind](source)
    name = str(source[kind])
    if schema is None and context is not None:
        raise ValueError(f"{name}: `context` belongs to a `schema`; give both or neither")
    if schema is not None:
        if columns is not None:
            raise ValueError(f"{name}: the schema {shown(schema)} names all columns, leave `columns` out")
        loaded = from_schema(loaded, schema, context, name)
    checked = check_questions(loaded, name, columns=columns)
    if (regex is not None or wanted is not None or binary) and not isinstance(checked[0]["prompt"], str):
        raise ValueError(
            f"{name}: prompt_filter, prompt_regex and binary are for texts, not for conversations: leave them out"
        )
    rows = [_cut_prompt(row, regex) for row in _wanted(checked, wanted, name)]
    distinct = _distinct(rows)
    if repeated := len(rows) - len(distinct):
        answers = len({(question_key(row["prompt"]), str(row.get("answer"))) for row in rows}) - len(distinct)
        differing = f", {answers} of them with another answer" if answers else ""
        warnings.warn(
            f"{name}: {repeated} of {len(rows)} rows repeat the prompt of an earlier one{differing} and "
            "are left out: a question must not come twice, or it could be trained on and asked in a test",
            stacklevel=2,
        )
    return _answered_by_choice(check_questions(Dataset.from_list(distinct), name), choices, binary, name)


def _answered_by_choice(dataset: Dataset, choices: Sequence[str] | None, binary: bool | None, name: str) -> Dataset:
    """Give all questions the same choices, or make each a yes/no question, if that is asked for."""
    if choices is not None:
        if "choices" in dataset.column_names:
            raise ValueError(f"{name} has a column `choices` already: leave the option `choices` out")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"choices must be a list of texts (quote yes and no in YAML), got {shown(choices)}")
        dataset = check_questions(with_column(dataset, "choices", [choices] * len(dataset)), name)
    if not isinstance(binary, bool | None):
        raise ValueError(f"binary must be true or false, got {shown(binary)}")
    if binary and "choices" not in dataset.column_names:
        raise ValueError(f"{name}: binary questions are made of questions with choices, and there is no such column")
    if not binary:
        return dataset
    return check_questions(type(dataset).from_list([binary_question(row) for row in dataset]), name)


def _from_file(source: Mapping[str, Any]) -> Dataset:
    path = Path(source["file"])
    _no_more_settings(source, ("file",))
    if path.suffix not in _READERS:
        raise ValueError(f"{shown(str(path))[1:-1]}: expected a file that ends in {', '.join(_READERS)}")
    return _READERS[path.suffix](require_file(path, "name a local file of questions"))


def _read_json(path: Path) -> Dataset:
    """Read a list of objects, or one object a line."""
    text = read_text(path)
    if path.suffix == ".json":
        rows = parse_json(text, str(path)) if text.strip() else []
    else:
        # Not splitlines: it cuts at characters that JSON allows inside a string (U+2028 and others).
        lines = enumerate(text.split("\n"), start=1)
        rows = [parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects with prompt and answer")
    return dataset_of(rows, str(path))


def _read_csv(path: Path) -> Dataset:
    """Read every field as text: a reader that guesses types turns the answer 007 into 7."""
    text = read_text(path)
    _require_commas(path, text.partition("\n")[0].strip())
    # A prompt may be as long as the file, which is in memory already.
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        # Strict: a quote that nobody closes would make the rest of the file one field.
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has the column {shown(twice[0])} twice: keep one of them")
    for index, row in enumerate(rows):
        if None in row:
            raise ValueError(f"{path}, row {index} has more fields than the header: quote fields that contain a comma")
    return dataset_of(rows, str(path))


def _require_commas(path: Path, header: str) -> None:
    found = [mark for mark in (";", "\t", "|") if mark in header]
    if found and "," not in header:
        raise ValueError(
            f"{path}: its first line {shown(header)} has {shown(found[0])} where commas are expected: write the file "
            f"with commas, e.g. by pandas.read_csv(file, sep={shown(found[0])}, dtype=str).to_csv(file, index=False)"
        )


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow.parquet import ParquetFile

    try:
        # Without the notes that other programs leave beside the columns, and with text that is text.
        table = ParquetFile(path).read().replace_schema_metadata(None)
        table.validate(full=True)
        return Dataset(InMemoryTable(table))
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from error


_READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _from_hub(source: Mapping[str, Any]) -> Dataset:
    import datasets

    _no_more_settings(source, ("hub", "name", "split"))
    for option in ("name", "split"):
        if not isinstance(source.get(option, ""), str):
            raise ValueError(f"{option} of a hub source must be text, got {shown(source[option])}")
    try:
        return datasets.load_dataset(source["hub"], source.get("name"), split=source.get("split", "train"))
    except Exception as error:
        # Of whatever library the hub was asked by.
        raise ValueError(
            f"cannot load {source['hub']} (name {source.get('name')}, split {source.get('split', 'train')}) from the "
            f"hub: {error}. Check its id and your connection, or name a local file"
        ) from error


def _from_bigbench(source: Mapping[str, Any]) -> Dataset:
    _no_more_settings(source, ("bigbench",))
    return dataset_of(bigbench_questions(source["bigbench"]), f"bigbench {source['bigbench']}")


def _generated(kind: str, source: Mapping[str, Any], regex: str | None) -> Dataset:
    from datasets import Dataset

    settings = dict(source)
    task, size, seed = settings.pop(kind), settings.pop("size", None), settings.pop("seed", 0)
    if type(size) is not int or not 1 <= size <= LARGEST:
        raise ValueError(f"{kind} {task}: size must be a whole number of questions, at least 1; got {shown(size)}")
    if type(seed) is not int:
        raise ValueError(f"{kind} {task}: seed must be a whole number, got {shown(seed)}")
    make: Callable[..., list[dict[str, str]]]
    make = _reasoning_gym_questions if kind == "reasoning_gym" else character_questions
    rows: list[dict[str, Any]] = []
    for attempt in range(_MAX_TRIES):
        # A generator repeats itself; ask for more under fresh seeds until there are `size` distinct prompts. It uses
        # seed + i for question i: neighbouring seeds would share nearly all questions, and an easy and a hard set of
        # one seed would have the same words. So a stream's seed is far from every other one.
        try:
            stream = json.dumps((seed, attempt, kind, task, settings), sort_keys=True, default=str)
            fresh = make(task, size=size, seed=int(_content_id(stream), 16) >> 16, **settings)
        except (TypeError, AssertionError, AttributeError, LookupError, OverflowError) as error:
            raise ValueError(f"{kind} {task} refuses the settings {shown(settings)}: {error}") from error
        rows = _distinct(rows + [_cut_prompt(row, regex) for row in fresh])
        if len(rows) >= size:
            return Dataset.from_list(rows[:size])
    raise ValueError(
        f"{kind} {task} gives only {len(rows)} distinct questions with these settings, {size} are wanted: "
        "ask for fewer or widen the task's settings"
    )


def _reasoning_gym_questions(task: str, /, **settings: Any) -> list[dict[str, str]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("questions from reasoning_gym need that package: pip install reasoning-gym") from error
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        raise ValueError(f"reasoning_gym has no task {shown(task)}; the nearest are {', '.join(near) or 'none'}")
    rows = list(reasoning_gym.create_dataset(task, **settings))
    if any(row["answer"] is None for row in rows):
        raise ValueError(f"reasoning_gym {task} has questions without one right answer: choose another task")
    return [{"prompt": row["question"], "answer": str(row["answer"])} for row in rows]


def _no_more_settings(source: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [key for key in source if key not in known]
    if unknown:
        raise ValueError(
            f"unknown setting {unknown[0]!s:.100} of a {known[0]} source: it takes {', '.join((*known, *_OPTIONS))}"
        )


def _wanted(rows: Iterable[dict[str, Any]], pattern: str | None, name: str) -> list[dict[str, Any]]:
    """Return the rows in whose prompts a regular expression finds something; all without one."""
    if pattern is None:
        return list(rows)
    found = [row for row in rows if _search("prompt_filter", pattern, row["prompt"])]
    if not found:
        raise ValueError(f"{name}: prompt_filter {shown(pattern)} finds nothing in any prompt, so no question is left")
    return found


def _cut_prompt(row: dict[str, Any], regex: str | None) -> dict[str, Any]:
    if regex is None:
        return row
    found = _search("prompt_regex", regex, row["prompt"].strip())
    if found is None or not any(found.groups()[:1]):
        raise ValueError(f"prompt_regex {shown(regex)} finds no group in the prompt {shown(row['prompt'])}")
    return row | {"prompt": found.group(1)}


def _search(option: str, pattern: str, text: str) -> re.Match[str] | None:
    try:
        return re.search(pattern, text)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{option} {shown(pattern)} is no regular expression: {error}") from error


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(question_key(row["prompt"]), row)
    return list(first.values())


def question_key(prompt: Prompt) -> str:
    """Return what makes two prompts the same question: their words, whatever the case, the spacing and the roles."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return " ".join(text.split()).casefold()


def check_questions(
    data: Any, name: str = "the data", *, columns: Mapping[str, str] | None = None, answered: bool = True
) -> Dataset:
    """Return questions, in any shape and with any `columns` that `ensemw2s.data.shapes.as_dataset` takes, as a checked
    dataset.

    It has a column `id` (text): where there was none, a hash of prompt and answer. With `answered=False` questions need
    no answers. `name` begins every error.

    Raises:
        TypeError, ValueError: see `as_dataset`; no rows, a missing column, a prompt or answer that is no text or empty,
            an `id` used twice, or choices that `check_choices` refuses.
    """
    dataset = as_dataset(data, name, columns)
    needed = ["prompt", "answer"] if answered else ["prompt"]
    for column in needed:
        if column not in dataset.column_names:
            unanswered = _UNANSWERED if column == "answer" else ""
            raise ValueError(
                f"{name} has no column {column!r}; its columns are {shown_names(dataset.column_names)}. Rename yours, "
                f'or map them: columns={{"{column}": "yours"}} of load_questions (files) or check_questions (data) in '
                f"Python, `columns: {{{column}: yours}}` beside the file in a configuration, or --columns "
                f"{column}=yours of `ensemw2s init`{unanswered}"
            )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: expected at least one question")
    for index, row in enumerate(dataset.select_columns(needed)):
        for column, value in row.items():
            text = value[-1]["content"] if column == "prompt" and isinstance(value, list) else value
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{name}, row {index}: {column} is {shown(value)}, expected text that is not empty"
                    + (_remedy_of_number(column, dataset) if isinstance(value, numbers.Number) else "")
                )
    if "id" not in dataset.column_names:
        dataset = with_column(dataset, "id", _numbered(_content_ids(dataset)))
    ids = [_checked_id(value, f"{name}, row {index}") for index, value in enumerate(dataset["id"])]
    twice = [value for value, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{name} has the id {shown(twice[0])} more than once: ids must be unique")
    if not isinstance(dataset[0]["id"], str):
        dataset = with_column(dataset.remove_columns("id"), "id", ids)
    if "choices" in dataset.column_names:
        check_choices(dataset, name)
    return dataset


def row_name(row: Mapping[str, Any], index: int) -> str:
    """Return how errors name a row of checked questions: by its id, or by its place and prompt if we made the id up."""
    if not _MADE_UP.fullmatch(str(row["id"])):
        return f"id {row['id']!s:.60}"
    prompt = row.get("prompt")
    text = prompt[-1]["content"] if isinstance(prompt, list) else prompt
    return f"row {index}" if text is None else f"row {index} ({shown(text[:_LETTERS_OF_PROMPT])})"


def _checked_id(value: Any, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "" or value != value:
        raise ValueError(
            f"{place}: id is {shown(value)}, expected text or a number. Fill it in every row, or remove the column"
        )
    return str(value)


def check_choices(dataset: Dataset, name: str) -> None:
    """Check the column `choices` (lists of texts) and, where there is one, `answer` against it.

    Raises:
        ValueError: choices that are no list of texts, fewer than 2 of them, one of them empty or there twice, or an
            answer that is not among them; names the row as `row_name` does.
    """
    columns = [column for column in ("id", "prompt", "choices", "answer") if column in dataset.column_names]
    for index, row in enumerate(dataset.select_columns(columns)):
        choices, place = row["choices"], f"{name}, {row_name(row, index)}"
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(
                f"{place}: choices is {shown(choices)}, expected a list of texts. Fill it in every row, or remove the "
                "column. A CSV file cannot hold lists: write such questions as JSON lines or parquet"
            )
        if len(choices) < 2:
            raise ValueError(
                f"{place}: choices is {shown(choices)}, expected at least 2 to choose from: leave the row out"
            )
        stripped = [choice.strip() for choice in choices]
        if "" in stripped or len(set(stripped)) < len(stripped):
            raise ValueError(f"{place}: choices is {shown(choices)}, expected different texts, none of them empty")
        if row.get("answer", choices[0]) not in choices:
            raise ValueError(
                f"{place}: the answer {shown(row['answer'])} is not among the choices {shown(choices)}: write it "
                f"exactly as there{f'; {_TEXT_OF_CHOICE}' if _FOR_A_CHOICE.fullmatch(row['answer'].strip()) else ''}"
            )


def _remedy_of_number(column: str, dataset: Dataset) -> str:
    if column == "answer" and "choices" in dataset.column_names:
        return f": {_TEXT_OF_CHOICE}"
    return ": make numbers text, with str()"


def _content_id(*parts: Any) -> str:
    return digest_json(parts, 8)


def _content_ids(dataset: Dataset) -> list[str]:
    content = [column for column in ("prompt", "answer") if column in dataset.column_names]
    return [_content_id(*row.values()) for row in dataset.select_columns(content)]


def _numbered(ids: Iterable[str]) -> list[str]:
    seen: Counter[str] = Counter()
    numbered = []
    for value in ids:
        seen[value] += 1
        numbered.append(value if seen[value] == 1 else f"{value}-{seen[value]}")
    return numbered


def check_disjoint(splits: Mapping[str, Dataset]) -> None:
    """Raise ValueError, naming question and splits, if a question stands in two splits."""
    home: dict[str, str] = {}
    for name, dataset in splits.items():
        for prompt in dataset["prompt"]:
            other = home.setdefault(question_key(prompt), name)
            if other != name:
                raise ValueError(
                    f"the question {shown(prompt)} is in both {other} and {name}: remove it from one "
                    "(exclude_questions does), or what is measured is memory"
                )


def exclude_questions(dataset: Any, others: Sequence[Any]) -> Dataset:
    """Return the rows of `dataset` whose question is in none of `others`, all of them as `split_questions` takes them.

    Raises:
        TypeError, ValueError: see `check_questions`; or no row is left.
    """
    dataset = check_questions(dataset, "dataset", answered=False)
    checked = [check_questions(other, f"others, dataset {i}", answered=False) for i, other in enumerate(others)]
    taken = {question_key(prompt) for other in checked for prompt in other["prompt"]}
    kept = [i for i, prompt in enumerate(dataset["prompt"]) if question_key(prompt) not in taken]
    if not kept:
        raise ValueError(f"all {len(dataset)} questions are among those to be excluded: load other questions")
    return dataset.select(kept)


def split_questions(dataset: Any, sizes: Mapping[str, int], seed: int = 0) -> DatasetDict:
    """Cut a dataset into named splits, deterministically and whatever order its rows come in.

    Questions are ranked by a hash of seed and prompt; repeated prompts are used once.

    Args:
        dataset: questions with or without answers, in any shape that `ensemw2s.data.shapes.as_dataset` takes.
        sizes: split name -> number of questions, at least 1 each.
        seed: another seed gives other splits.

    Raises:
        TypeError, ValueError: see `check_questions`; a size below 1, or fewer distinct questions than the sizes ask
            for.
    """
    from datasets import DatasetDict

    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"split {name} must be a number of questions, at least 1 (no share), got {shown(size)}")
    dataset = check_questions(dataset, "dataset", answered=False)
    first: dict[str, int] = {}
    prompts = list(dataset["prompt"])
    # Of rows that repeat a prompt the one whose content sorts first is used, so that their order plays no part.
    for _, index in sorted(zip(_content_ids(dataset), range(len(dataset)), strict=True)):
        first.setdefault(_content_id(str(seed), question_key(prompts[index])), index)
    wanted = sum(sizes.values())
    if len(first) < wanted:
        raise ValueError(
            f"the splits {dict(sizes)} need {wanted} distinct questions, the dataset has {len(first)} (a repeated one "
            "counts once): make the splits smaller or load more questions"
        )
    order = iter([first[key] for key in sorted(first)])
    return DatasetDict({name: dataset.select(list(itertools.islice(order, size))) for name, size in sizes.items()})


def warn_of_unknown(
    answers: Iterable[tuple[str, Sequence[int]]], processing_class: PreTrainedTokenizerBase, name: str
) -> None:
    """Warn of answers, given as names of their rows (`row_name`) and tokens, with letters that no token stands for."""
    token = processing_class.unk_token_id
    # In some tokenizers it is the end token too.
    last = -1 if token == processing_class.eos_token_id else None
    unknown = [row for row, ids in answers if token in ids[:last]]
    if unknown:
        warnings.warn(
            f"{name}: {len(unknown)} answers have letters that this tokenizer does not know, the first of them that of "
            f"{unknown[0]}. They become {processing_class.unk_token!r}, which says nothing: leave these rows out, "
            "or use another tokenizer",
            stacklevel=3,
        )
