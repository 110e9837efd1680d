"""Hostile inputs, each with the sentence that it must end with: exit code 2, no traceback, no file left behind.

Settings outside their range for every key, files of questions, configurations, records and tables, command lines,
arguments of functions, environments and streams; and inputs that were right until a few bytes were changed, which must
be read or be refused in a sentence that names their file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from docs.refresh_tables import refresh_tables
from ensemw2s.boosting import algorithm
from ensemw2s.boosting.config import BoostingConfig
from ensemw2s.cli import main
from ensemw2s.data.difficulty import split_by_difficulty
from ensemw2s.data.questions import load_questions, split_questions
from ensemw2s.data.tokens import QuestionFormat
from ensemw2s.experiments.config import STUDENTS, load_config
from ensemw2s.experiments.study import load_study
from ensemw2s.inference.decoding import Sampling
from ensemw2s.runtime.files import read_complete_lines, read_json, write_json_lines
from ensemw2s.runtime.records import read_records
from ensemw2s.runtime.values import RANGES
from ensemw2s.student.trainer import StudentConfig
from tests.faults.battery import Case
from tests.many_runs import study_records

# What no refused input may take, whatever it stands for.
_MOST_MEMORY = 400 * 2**20
_LONGEST_MESSAGE = 3000
_ROW = {"prompt": "what is 1", "answer": "one"}
_SIZES = {"train": 2, "validation": 2, "test_id": 2, "unlabelled": 2, "test_ood": 2}


def cases(long: bool, seed: int) -> Iterator[Case]:
    """Yield the battery's cases; the long pass tries every value for every key, and many more damaged files."""
    generator = np.random.default_rng(seed)
    yield from _bad_values(long, generator)
    yield from _bad_overrides()
    yield from _bad_documents()
    yield from _bad_questions()
    yield from _good_questions()
    yield from _bad_records()
    yield from _bad_commands()
    yield from _bad_arguments()
    yield from _bad_variables()
    yield from _fast_streams()
    yield from _damaged_files(150 if long else 8, seed)
    if long:
        yield from _whole_runs()


# ----------------------------------------------------------------------------------------------------------------------
# What is expected


def _config(folder: Path, **changes: Any) -> Path:
    """Write a configuration of an experiment that is never run, and return its file."""
    settings = {
        "name": "run", "output_dir": str(folder / "out"), "weak": {"source": str(folder / "weak")},
        "strong": {"source": str(folder / "strong")}, "lora": {"r": 4}, "students": STUDENTS,
        "data": {"easy": {"file": "easy.jsonl"}, "hard": {"file": "hard.jsonl"}, "sizes": _SIZES},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def _output(arguments: list[str]) -> tuple[int, str]:
    """Return the exit code of a command line, and what it printed to standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, errors.getvalue()


def _is_told(code: int, errors: str, fragment: str, expected: int = 2) -> None:
    assert code == expected, f"exit code {code}: {errors[-2000:]}"
    assert fragment in errors, f"expected {fragment!r} in: {errors[-2000:]}"
    assert "Traceback" not in errors and len(errors) < _LONGEST_MESSAGE, errors[-2000:]


def _refused(folder: Path, arguments: list[str], fragment: str) -> None:
    before = sorted(folder.rglob("*"))
    with _little_memory():
        code, errors = _output(arguments)
    _is_told(code, errors, fragment)
    assert sorted(folder.rglob("*")) == before, "a refused input left files behind"


def _raises(fragment: str, function: Callable[[], Any]) -> None:
    with _little_memory():
        try:
            made = function()
        except (ValueError, TypeError, FileNotFoundError) as error:
            message = str(error)
        else:
            raise AssertionError(f"expected {fragment!r}, got {made!r:.200}")
    assert fragment in message and len(message) < _LONGEST_MESSAGE, f"expected {fragment!r} in: {message[:2000]}"


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Let the process have little more memory than it has, or end in a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + _MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ----------------------------------------------------------------------------------------------------------------------
# Settings

_NO_NUMBERS = ["text", "'3'", "true", "[1]", "{a: 1}", "''"]
# Of every range that is in use, numbers outside of it.
_OUTSIDE = {
    "(0, inf)": ["0", "-1", ".nan", ".inf", "-.inf"],
    "-1 or [1, inf)": ["0", "-2", "4294967296", "1.5"],
    "[1, inf)": ["0", "-3", "99999999999999999999"],
    "[2, inf)": ["1", "0", "-2", "99999999999999999999"],
    "[0, inf)": ["-1", ".nan", ".inf"],
    "[0, 1)": ["1", "-0.1", ".nan", "2"],
    "(0, 1]": ["0", "1.001", ".nan", "-.inf"],
    "[0, 1]": ["-0.001", "1.001", ".nan", ".inf"],
    "(-inf, 0]": ["0.001", ".nan", "-.inf"],
    "[1, 10000]": ["0", "10001", "-1", "1.0"],
    "[1, 1024]": ["0", "-1", "1025", "100000", "2.0"],
    "[0, 4294967295]": ["-1", "4294967296", "1.5", ".nan"],
}  # fmt: skip
_TRAINING = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2",
    "adam_epsilon", "warmup_steps", "logging_steps", "save_steps", "save_total_limit",
)  # fmt: skip
_SECTIONS = {
    "boosting.": (
        *_TRAINING, "num_rounds", "shrinkage", "uniform_mix", "draw_fraction", "num_classes", "window",
        "effective_sample_size_floor", "weight_cap", "min_effective_sample_size", "error_folds",
    ),
    "ensembles.other.": ("num_rounds", "shrinkage", "learning_rate"),
    "student.": (
        *_TRAINING, "temperature", "soft_weight", "top_logprobs", "confidence_alpha", "confidence_warmup",
        "min_confidence", "keep_fraction",
    ),
    "students.ceiling.": ("num_train_epochs", "per_device_train_batch_size"),
    "labelling.": ("max_new_tokens", "batch_size"),
    "data.format.": ("max_length",),
    "data.difficulty.": ("folds", "tolerance", "resolution"),
    "lora.": ("r", "lora_alpha", "lora_dropout"),
    "": ("threads", "seed"),
}  # fmt: skip


def _bad_values(long: bool, generator: np.random.Generator) -> Iterator[Case]:
    """Yield bad values for every number that a configuration may set: all of them, or one for each."""
    for section, names in _SECTIONS.items():
        for name in names:
            values = [*_OUTSIDE[RANGES[name]], *_NO_NUMBERS]
            for value in values if long else [str(generator.choice(values))]:
                yield _override(f"{section}{name}={value}", f"{section}{name} must be")


def _override(override: str, fragment: str, *more: str) -> Case:
    def run(folder: Path) -> None:
        arguments = ["plan", str(_config(folder, ensembles={"other": {}})), override, *more]
        _refused(folder, arguments, fragment)

    return Case(f"override {override:.60}", run)


def _bad_overrides() -> Iterator[Case]:
    """Yield what is no number, and settings that do nothing beside others."""
    for override, fragment in {
        "boosting.sampling=boot": "boosting.sampling must be one of draw",
        "boosting.recipe=[]": "boosting.recipe must be one of paper",
        "boosting.prior=.nan": "boosting.prior must be",
        "boosting.prior=half": "boosting.prior must be",
        "boosting.lr_scheduler_type=zigzag": "boosting.lr_scheduler_type: zigzag is not a valid",
        "boosting.optim=best": "boosting.optim: best is not a valid",
        "boosting.train_sampling_strategy=sorted": "boosting.train_sampling_strategy must be one of random",
        "boosting.lora_ranks=[4]": "boosting.lora_ranks must list a rank",
        "boosting.lora_ranks=[a, b, c, d, e]": "boosting.lora_ranks must be list[int]",
        "boosting.draw_fraction=0.3": 'boosting.draw_fraction=0.3 does nothing without sampling="without_replacement"',
        "boosting.num_classes=7": 'boosting.num_classes=7 does nothing without prior="uniform"',
        "boosting={recipe: bagging, shrinkage: 0.5}": "boosting.shrinkage=0.5 does nothing without weights",
        "boosting={recipe: deep_ensemble, uniform_mix: 0.5}": "boosting.uniform_mix=0.5 does nothing without weights",
        "boosting={recipe: bagging, weight_cap: 2}": "boosting.weight_cap=2 does nothing without weights",
        "boosting={prior: 0.5, prior_weights: current}": "boosting.prior_weights='current' does nothing without prior",
        "boosting.window=3": "only applies to unit",
        "ensembles.other={sampling: all, shrinkage: 0.5}": "ensembles.other.shrinkage=0.5 does nothing without weights",
        "student.variant=softly": "student.variant must be one of sft",
        "student.temperature=2": "student.temperature=2 does nothing, because none of",
        "student.soft_weight=0.5": 'has variant="soft"',
        "student.confidence_alpha=0.25": 'has variant="confidence"',
        "students.ceiling={teacher: truth, top_logprobs: 4}": "students.ceiling.top_logprobs=4 does nothing without",
        "students.ceiling.teacher=[truth]": "students.ceiling.teacher must be one of",
        "students.ceiling.teacher=1e400": "students.ceiling.teacher must be one of",
        "data.sizes.train=.inf": "data.sizes.train must be int, got inf",
        "data.sizes.train=true": "data.sizes.train must be int, got True",
        "data.difficulty.folds=5": "data.difficulty splits data.questions, which is not given",
        "data.format.prompt_template=5": "data.format.prompt_template must be str",
        "data.format.prompt_template=x": "data.format.prompt_template must contain {prompt}",
        "weak.source=''": "weak.source must not be empty",
        "weak.dtype=int8": "weak.dtype must be",
        "output_dir=''": "output_dir must not be empty",
        "store=''": "store must not be empty",
        "name=''": "name must not be empty",
        f"name={'a' * 300}": "name must have at most 200 bytes",
        f"name={'é' * 101}": "name must have at most 200 bytes",
        'name="a\\0b"': "name holds a character that no file can hold",
        'name="\\ud800"': "name holds a character that no file can hold",
        'data.easy.file="\\udfff"': "data.easy.file holds a character",
        f"ensembles.{'a' * 101}={{}}": "the name of an arm is made of",
        "ensembles.../up={}": "cannot read the override",
        "name=no": "no means one thing in YAML 1.1 and another in YAML 1.2",
        "seed=012": "012 means one thing in YAML 1.1",
        "seed=1_000": "1_000 means one thing in YAML 1.1",
        "task=1:30": "1:30 means one thing in YAML 1.1",
        "equal_cost=on": "on means one thing in YAML 1.1",
        "seed=2024-01-01": "seed must be int, got '2024-01-01'",
        "seed=!!timestamp 2001-99-99": "cannot be read as YAML",
        "seed=!!python/object/apply:os.getcwd []": "cannot be read as YAML",
        "seed=!!set {1}": "cannot be read as YAML",
        "seed=" + "9" * 5000: "cannot be read as YAML",
        "seed=" + "[" * 5000: "nested more than 64 levels deep",
        ".".join("a" * 2000) + "=1": "cannot read the override",
        "a..b=1": "cannot read the override 'a..b=1': expected key=value",
        "=1": "cannot read the override '=1'",
        "boosting={a: 1, a: 2}": "the key 'a' stands twice, first in line 1",
        "boosting={1: 2}": "a key must be text",
        "boosting={on: 2}": "on means one thing",
        "zzz=" + "x" * 100_000: "unknown key zzz",
        "z" * 100_000 + "=1": "unknown key zzz",
        "threads=" + "x" * 100_000: "threads must be int | None",
    }.items():
        yield _override(override, fragment)
    yield _override("seed=1", "the override 'seed' is given twice", "seed=2")


# ----------------------------------------------------------------------------------------------------------------------
# Files of settings

_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
_MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
)
_DOCUMENTS: dict[str, tuple[str, bytes, str]] = {
    "an anchor bomb": ("a.yaml", _BOMB.encode(), "more than 100,000 values"),
    "a bomb of merges": ("a.yaml", _MERGE_BOMB.encode(), "more than 100,000 values"),
    "an anchor within itself": ("a.yaml", b"a: &a [*a]", "line 1, column 8: an alias within what it stands for"),
    "a duplicate key": (
        "a.yaml",
        b"name: x\nseed: 1\nname: y\n",
        "line 3, column 1: the key 'name' stands twice, first in line 1",
    ),
    "a nested duplicate": (
        "a.yaml",
        b"a:\n  b: 1\n  c: 2\n  b: 3\n",
        "line 4, column 3: the key 'b' stands twice, first in line 2",
    ),
    "a duplicate in JSON": (
        "a.json",
        b'{"name": "x",\n"seed": 1,\n"name": "y"}',
        "the key 'name' stands twice in one object (lines 1, 3)",
    ),
    "deep YAML": ("a.yaml", b"[" * 100_000, "nested more than 64 levels deep"),
    "deep YAML blocks": ("a.yaml", b"- " * 100_000, "nested more than 64 levels deep"),
    "deep JSON": ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested more than 64 levels deep"),
    "less deep JSON": ("a.json", b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 levels deep"),
    "a large file": ("a.yaml", b"a: 1\n#" + b"x" * 5_000_000, "expected at most 4,194,304 for a file of settings"),
    "an empty file": ("a.yaml", b"", "must hold a mapping of keys to values, got NoneType"),
    "an empty JSON file": ("a.json", b"", "is not valid JSON"),
    "a list": ("a.yaml", b"- 1", "must hold a mapping of keys to values, got list"),
    "a word": ("a.json", b'"word"', "must hold a mapping of keys to values, got str"),
    "no UTF-8": ("a.yaml", b"name: \xff\xfe", "is not UTF-8 text"),
    "UTF-16": ("a.yaml", "name: x".encode("utf-16"), "is not UTF-8 text"),
    "NUL bytes": ("a.yaml", b"name: x\0y", "cannot be read as YAML"),
    "NaN in JSON": ("a.json", b'{"seed": NaN}', "NaN is no JSON"),
    "infinity in JSON": ("a.json", b'{"seed": 1e400}', "1e400 is beyond the largest float"),
    "a long number": ("a.json", b'{"seed": ' + b"9" * 5000 + b"}", "holds a number that cannot be read"),
    "a long number in YAML": ("a.yaml", b"seed: " + b"9" * 5000, "cannot be read as YAML"),
    "half a character": (
        "a.json",
        b'{"name": "\\ud800", "weak": {}, "strong": {}, "data": {}}',
        "name holds a character",
    ),
    "two documents": ("a.yaml", b"a: 1\n---\nb: 2", "expected a single document"),
    "an unknown tag": ("a.yaml", b"a: !x 1", "could not determine a constructor"),
    "code": ("a.yaml", b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "an unknown alias": ("a.yaml", b"a: *x", "line 1, column 4: found undefined alias"),
    "a tab": ("a.yaml", b"a:\n\t- 1", "line 2, column 1"),
    "an open bracket": ("a.yaml", b"a: [", "line 1, column 5"),
    "a truncated JSON file": ("a.json", b'{"name": "x", ', "is not valid JSON"),
    "YAML called JSON": ("a.json", b"name: x", "is not valid JSON"),
    "a list as a key": ("a.yaml", b"? [1]\n: 2", "a key must be text"),
    "a number as a key": ("a.yaml", b"1: 2", "a key must be text"),
    "no as a key": ("a.yaml", b"no: 2", "no means one thing in YAML 1.1"),
    "bytes": ("a.yaml", b"name: !!binary aGVsbG8=", "cannot be read as YAML"),
    "a base that is a list": ("a.yaml", b"base: [x.yaml]", "base must be the name of a YAML or JSON file"),
    "a base that is a folder": ("a.yaml", b"base: .", "is a folder, not a file"),
    "a base that is empty": ("a.yaml", b"base: ''", "base must be the name"),
    "a base with a NUL": ("a.yaml", b'base: "a\\0b"', "a.yaml: base:"),
}


def _bad_documents() -> Iterator[Case]:
    for label, (name, text, fragment) in _DOCUMENTS.items():
        yield Case(f"configuration: {label}", partial(_refuse_document, name, text, fragment))
    yield Case("configuration: a folder, pipe, device or link", _refuse_what_is_no_file)
    yield Case("configuration: a long chain of bases", _refuse_a_chain)
    yield Case("configuration: words that YAML 1.1 would turn", _keep_words)
    for label, (changes, fragment) in _STUDIES.items():
        yield Case(f"study: {label}", partial(_refuse_study, changes, fragment))


def _refuse_document(name: str, text: bytes, fragment: str, folder: Path) -> None:
    (folder / name).write_bytes(text)
    _refused(folder, ["plan", str(folder / name)], fragment)
    _refused(folder, ["study", str(folder / name)], fragment if "name holds" not in fragment else "tasks must be")


def _refuse_what_is_no_file(folder: Path) -> int:
    os.mkfifo(folder / "pipe.yaml")
    (folder / "dangling.yaml").symlink_to("gone.yaml")
    (folder / "self.yaml").symlink_to("self.yaml")
    (folder / "empty").mkdir()
    tries = {
        "pipe.yaml": "is a pipe, socket or device, not a file", "dangling.yaml": "is a link to gone.yaml",
        "self.yaml": "A link leads to itself", "empty": "config.json does not exist", "gone": "gone does not exist",
        "a" * 300: "File systems take names of up to 255 bytes", "a\0b": "is no name of a file",
    }  # fmt: skip
    for name, fragment in tries.items():
        _refused(folder, ["plan", str(folder / name)], fragment)
    _refused(folder, ["plan", "/dev/null"], "is a pipe, socket or device, not a file")
    return len(tries) + 1


def _refuse_a_chain(folder: Path) -> None:
    for number in range(40):
        (folder / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    _refused(folder, ["plan", str(folder / "0.yaml")], "in a chain of bases: expected at most 20")


def _keep_words(folder: Path) -> int:
    words = {
        "2024-01-01": "2024-01-01",
        "y": "y",
        "=": "=",
        "'no'": "no",
        "0x": "0x",
        "1e": "1e",
        "😀": "😀",
        "1_a": "1_a",
    }
    for word, meant in words.items():
        found = load_config(_config(folder), [f"task={word}"]).task
        assert found == meant, f"{word} became {found!r}"
    return len(words)


_STUDY = {"tasks": {"a": {}}, "seeds": 2}
_STUDIES: dict[str, tuple[dict[str, Any], str]] = {
    "no tasks": ({"seeds": 2}, "tasks must be a mapping of names"),
    "tasks that are a list": (_STUDY | {"tasks": ["a"]}, "tasks must be a mapping of names"),
    "a task that is no mapping": (_STUDY | {"tasks": {"a": 5}}, "tasks must be a mapping of names"),
    "no seeds": ({"tasks": {"a": {}}}, "seeds must be a number of seeds"),
    "seeds: 0": (_STUDY | {"seeds": 0}, "seeds must be a number of seeds"),
    "seeds: true": (_STUDY | {"seeds": True}, "seeds must be a number of seeds"),
    "a billion seeds": (_STUDY | {"seeds": 10**12}, "seeds must be a number of seeds"),
    "the same seed twice": (_STUDY | {"seeds": [1, 1]}, "seeds must be a number of seeds"),
    "a seed of true": (_STUDY | {"seeds": [True]}, "seeds must be a number of seeds"),
    "a seed below 0": (_STUDY | {"seeds": [-1]}, "seeds must be a number of seeds"),
    "a seed beyond 32 bits": (_STUDY | {"seeds": [2**32]}, "seed must be from 0 to 4294967295"),
    "a seed of its own": (_STUDY | {"seed": 3}, "seed does nothing in a study"),
    "a task with a seed": (_STUDY | {"tasks": {"a": {"seed": 3}}}, "tasks.a.seed does nothing in a study"),
    "a task with a name": (_STUDY | {"tasks": {"a": {"name": "x"}}}, "tasks.a.name does nothing in a study"),
    "an arm against itself": (_STUDY | {"comparisons": [["ensemble", "ensemble"]]}, "pairs of different arms"),
    "an unknown arm": (_STUDY | {"comparisons": [["ensemble", "enemy"]]}, "comparisons name enemy"),
    "another split": (_STUDY | {"primary_split": ["ood"]}, 'primary_split must be "id" or "ood"'),
    "a source's seed in words": (
        _STUDY | {"data": {"easy": {"characters": "copy", "seed": "x"}, "hard": {"file": "b"}, "sizes": _SIZES}},
        "data.easy.seed must be a whole number",
    ),
    "no name": (_STUDY | {"name": 5}, "name must be a text"),
}


def _refuse_study(changes: dict[str, Any], fragment: str, folder: Path) -> None:
    _refused(folder, ["study", str(_config(folder, **changes))], fragment)


# ----------------------------------------------------------------------------------------------------------------------
# Questions


def _lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


_QUESTIONS: dict[str, tuple[str, bytes, str]] = {
    "an empty JSONL file": ("a.jsonl", b"", "is empty: expected questions"),
    "blank lines": ("a.jsonl", b"\n \r\n", "is empty: expected questions"),
    "an empty JSON file": ("a.json", b"", "is empty: expected questions"),
    "an empty Parquet file": ("a.parquet", b"", "is not a Parquet file that can be read"),
    "an empty list": ("a.json", b"[]", "is empty: expected questions"),
    "numbers": ("a.jsonl", b"1\n2", "expected a list of objects"),
    "null": ("a.json", b"null", "expected a list of objects"),
    "lists of lists": ("a.json", b"[[1]]", "expected a list of objects"),
    "no UTF-8": ("a.jsonl", b'{"prompt": "\xff"}', "is not UTF-8 text"),
    "no UTF-8 in CSV": ("a.csv", b"prompt,answer\n\xe9,b", "is not UTF-8 text"),
    "UTF-16": ("a.csv", "prompt,answer\na,b".encode("utf-16"), "is not UTF-8 text"),
    "NUL bytes": ("a.jsonl", b"\0\0\0", "line 1 is not valid JSON"),
    "a torn line": ("a.jsonl", _lines(_ROW) + b'{"prompt": "a', "line 2 is not valid JSON"),
    "a deep line": ("a.jsonl", _lines(_ROW) + b"[" * 100_000, "line 2 is nested more than 64 levels deep"),
    "deep JSON": ("a.json", b'[{"prompt":' + b"[" * 100_000, "is nested more than 64 levels deep"),
    "a key that stands twice": (
        "a.jsonl",
        b'{"prompt": "a", "answer": "b", "prompt": "c"}',
        "line 1: the key 'prompt' stands",
    ),
    "NaN": ("a.jsonl", b'{"prompt": "a", "answer": NaN}', "line 1 holds a number that cannot be read: NaN"),
    "infinity": ("a.jsonl", b'{"prompt": "a", "answer": -Infinity}', "line 1 holds a number that cannot be read: -Inf"),
    "1e400": ("a.jsonl", b'{"prompt": "a", "answer": 1e400}', "line 1 holds a number that cannot be read: 1e400"),
    "a number of 5,000 digits": (
        "a.jsonl",
        b'{"id": ' + b"9" * 5000 + b"}",
        "line 1 holds a number that cannot be read",
    ),
    "half a character": ("a.jsonl", b'{"prompt": "\\ud800", "answer": "b"}', "column 'prompt' must be of one type"),
    "half a character in a name": (
        "a.jsonl",
        b'{"prompt": "a", "answer": "b", "\\ud800": 1}',
        "a column has a name that is",
    ),
    "a number beyond 64 bits": ("a.jsonl", _lines(_ROW | {"grade": 10**30}), "column 'grade' must be of one type"),
    "numbers and text": ("a.jsonl", _lines(_ROW, _ROW | {"answer": 7}), "column 'answer' must be of one type"),
    "lists and text": ("a.jsonl", _lines(_ROW, _ROW | {"answer": ["a"]}), "column 'answer' must be of one type"),
    "a number for an answer": ("a.jsonl", _lines(_ROW | {"answer": 7}), "row 0: answer is 7, expected text"),
    "a missing answer": ("a.jsonl", _lines(_ROW, {"prompt": "b"}), "row 1: answer is None, expected text"),
    "a null prompt": ("a.jsonl", _lines(_ROW | {"prompt": None}), "row 0: prompt is None, expected text"),
    "a prompt of no length": ("a.jsonl", _lines(_ROW | {"prompt": ""}), "row 0: prompt is '', expected text"),
    "a prompt of white space": ("a.jsonl", _lines(_ROW | {"prompt": "\u2003\n\t"}), "expected text that is not empty"),
    "a prompt that is a list": ("a.jsonl", _lines(_ROW | {"prompt": ["x" * 99] * 999}), "row 0: prompt has 'xxx"),
    "no prompt": (
        "a.jsonl",
        _lines({"question": "a", "answer": "b"}),
        "has no column 'prompt'; its columns are question",
    ),
    "200 columns": ("a.jsonl", _lines({f"c{i}": 1 for i in range(200)}), "and 188 more"),
    "the same id twice": (
        "a.jsonl",
        _lines(_ROW | {"id": 1}, {"prompt": "b", "answer": "c", "id": 1}),
        "has the id '1' more than once",
    ),
    "an id as text and number": (
        "a.jsonl",
        _lines(_ROW | {"id": 1}, {"prompt": "b", "answer": "c", "id": "1"}),
        "has the id '1' more",
    ),
    "a missing id": (
        "a.jsonl",
        _lines(_ROW | {"id": "x"}, {"prompt": "b", "answer": "c"}),
        "row 1: id is None, expected text",
    ),
    "an id of true": ("a.jsonl", _lines(_ROW | {"id": True}), "row 0: id is True, expected text or a number"),
    "an id that is a list": ("a.jsonl", _lines(_ROW | {"id": [1]}), "row 0: id is [1], expected text or a number"),
    "an empty id": ("a.jsonl", _lines(_ROW | {"id": ""}), "row 0: id is '', expected text or a number"),
    "one choice": ("a.jsonl", _lines(_ROW | {"choices": ["one"]}), "expected at least 2 to choose from"),
    "no choice": (
        "a.jsonl",
        _lines(_ROW | {"choices": ["one", "b"]}, {"prompt": "b", "answer": "c"}),
        "choices is None",
    ),
    "equal choices": ("a.jsonl", _lines(_ROW | {"choices": ["one", "one "]}), "expected different texts"),
    "an empty choice": (
        "a.jsonl",
        _lines(_ROW | {"choices": ["one", ""]}),
        "expected different texts, none of them empty",
    ),
    "a choice of null": ("a.jsonl", _lines(_ROW | {"choices": ["one", None]}), "expected a list of texts"),
    "choices of numbers": ("a.jsonl", _lines(_ROW | {"choices": [1, 2]}), "expected a list of texts"),
    "choices that are text": ("a.jsonl", _lines(_ROW | {"choices": "one two"}), "expected a list of texts"),
    "an answer that is no choice": (
        "a.jsonl",
        _lines(_ROW | {"choices": ["two", "three"]}),
        "is not among the choices",
    ),
    "a million choices": (
        "a.jsonl",
        _lines(_ROW | {"choices": [str(i) for i in range(100_000)]}),
        "is not among the choices",
    ),
    "a header alone": ("a.csv", b"prompt,answer\n", "is empty: expected questions"),
    "an open quote": ("a.csv", b'prompt,answer\n"a,b\nc,d\n', "is not valid CSV: unexpected end of data"),
    "text behind a quote": ("a.csv", b'prompt,answer\n"a"b,c\n', "is not valid CSV"),
    "too many fields": ("a.csv", b"prompt,answer\na,b,c\n", "row 0 has more fields than the header"),
    "too few fields": ("a.csv", b"prompt,answer\na\n", "row 0: answer is None"),
    "a column twice": ("a.csv", b"prompt,answer,answer\na,b,c\n", "has the column 'answer' twice"),
    "semicolons": ("a.csv", b"prompt;answer\na;b\n", "where commas are expected: write the file with commas"),
    "choices in CSV": ("a.csv", b"prompt,answer,choices\na,b,b|c\n", "expected a list of texts"),
    "text called Parquet": ("a.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "is not a Parquet file that can be read"),
    "another suffix": ("a.txt", b"x", "expected a file that ends in .jsonl"),
    "no suffix": ("questions", b"x", "expected a file that ends in .jsonl"),
}
_SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "two kinds": ({"file": "a", "hub": "b"}, "exactly one of file, hub"),
    "a file of null": ({"file": None}, "file of a source of questions must be text, got None"),
    "a file of nothing": ({"file": ""}, "file of a source of questions must be text, got ''"),
    "a folder": ({"file": "{folder}/empty.jsonl"}, "is a folder, not a file"),
    "a pipe": ({"file": "{folder}/pipe.jsonl"}, "is a pipe, socket or device"),
    "a dangling link": ({"file": "{folder}/link.jsonl"}, "is a link to gone, which does not exist"),
    "a NUL in a name": ({"file": "a\0b.jsonl"}, "is no name of a file"),
    "a name of 300 characters": ({"file": "a" * 300 + ".jsonl"}, "File name too long"),
    "columns of text": ({"file": "{good}", "columns": "prompt"}, "columns must map our names"),
    "columns that are not ours": ({"file": "{good}", "columns": {"question": "prompt"}}, "is none of our columns"),
    "two columns from one": (
        {"file": "{good}", "columns": {"prompt": "prompt", "answer": "prompt"}},
        "two of our names",
    ),
    "a column that is a list": ({"file": "{good}", "columns": {"prompt": ["prompt"]}}, "has no column ['prompt']"),
    "a schema of 5": ({"file": "{good}", "schema": 5}, "unknown schema 5"),
    "a schema that is a list": ({"file": "{good}", "schema": ["arc"]}, "unknown schema ['arc']"),
    "a context of 1": ({"file": "{good}", "schema": "arc", "context": 1}, "has no column 'question'"),
    "binary of 1": ({"file": "{good}", "binary": 1}, "binary must be true or false, got 1"),
    "choices of true": ({"file": "{good}", "choices": [True, False]}, "choices must be a list of texts"),
    "a regex of 5": ({"file": "{good}", "prompt_regex": 5}, "is no regular expression"),
    "a deep regex": ({"file": "{good}", "prompt_regex": "(" * 5000 + ")" * 5000}, "is no regular expression"),
    "a regex that finds nothing": ({"file": "{good}", "prompt_regex": "(zzz)"}, "finds no group in the prompt"),
    "an unknown setting": ({"file": "{good}", "z" * 5000: 1}, "unknown setting zzz"),
    "a size of true": ({"characters": "copy", "size": True}, "size must be a whole number of questions"),
    "a size of 1e30": ({"characters": "copy", "size": 10**30}, "size must be a whole number of questions"),
    "a seed of text": ({"characters": "copy", "size": 3, "seed": "x"}, "seed must be a whole number"),
    "a length of text": ({"characters": "copy", "size": 3, "min_length": "x", "max_length": 3}, "refuses the settings"),
    "an unknown task": ({"characters": "copi", "size": 3, "min_length": 2, "max_length": 3}, "did you mean copy?"),
    "a hub split of 5": ({"hub": "a/b", "split": 5}, "split of a hub source must be text"),
}


def _bad_questions() -> Iterator[Case]:
    for label, (name, text, fragment) in _QUESTIONS.items():
        yield Case(f"questions: {label}", partial(_refuse_questions, name, text, fragment))
    for label, (source, fragment) in _SOURCES.items():
        yield Case(f"source: {label}", partial(_refuse_source, source, fragment))
    for label, (rows, schema, fragment) in _PUBLISHED.items():
        yield Case(f"schema {schema}: {label}", partial(_refuse_published, rows, schema, fragment))


def _refuse_questions(name: str, text: bytes, fragment: str, folder: Path) -> None:
    (folder / name).write_bytes(text)
    with contextlib.suppress(FileNotFoundError):
        _raises(fragment, lambda: load_questions(folder / name))
    _raises(str(folder / name), lambda: load_questions(folder / name))


def _refuse_source(source: dict[str, Any], fragment: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "link.jsonl").symlink_to("gone")
    (folder / "empty.jsonl").mkdir()
    good = folder / "good.jsonl"
    good.write_bytes(_lines(_ROW))
    places = {"{folder}": str(folder), "{good}": str(good)}
    if "file" in source and isinstance(source["file"], str):
        source = source | {"file": re.sub(r"{\w+}", lambda match: places[match[0]], source["file"])}
    if "File name" in fragment:
        _raised(OSError, fragment, lambda: load_questions(source))
    else:
        _raises(fragment, lambda: load_questions(source))


def _raised(kind: type[Exception] | tuple[type[Exception], ...], fragment: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except kind as error:
        assert fragment in str(error), error
    else:
        raise AssertionError(f"expected {fragment!r}")


_ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
_PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {
    "lists of other lengths": (
        _ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}},
        "arc",
        "lists of as many texts",
    ),
    "text of null": (_ARC | {"choices": {"text": None, "label": ["A"]}}, "arc", "lists of as many texts"),
    "labels of numbers": (_ARC | {"choices": {"text": ["a"], "label": [1]}}, "arc", "lists of as many texts"),
    "choices of null": (_ARC | {"choices": None}, "arc", "row 0: choices is None"),
    "a key that is a list": (_ARC | {"answerKey": ["A"]}, "arc", "row 0: answerKey is ['A']"),
    "a key of null": (_ARC | {"answerKey": None}, "arc", "row 0: answerKey is None"),
    "an answer without its mark": ({"question": "q", "answer": "4"}, "gsm8k", "has nothing behind ####"),
    "an answer of null": ({"question": "q", "answer": None}, "gsm8k", "has nothing behind ####"),
    "a question of null": ({"question": None, "answer": "#### 4"}, "gsm8k", "row 0: prompt is ''"),
}


def _refuse_published(row: dict[str, Any], schema: str, fragment: str, folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(_lines(row))
    _raises(fragment, lambda: load_questions({"file": str(folder / "a.jsonl"), "schema": schema}))


def _good_questions() -> Iterator[Case]:
    """Yield what looks odd and is right: it must be read, and mean what it says."""
    yield Case("questions: odd ones that are right", _read_odd_questions)
    yield Case("questions: 5,000 with one id twice", _find_one_of_many)


def _read_odd_questions(folder: Path) -> int:
    long = "x" * 1_000_000
    tries: list[tuple[str, bytes, str, list[Any]]] = [
        ("a.jsonl", b"\xef\xbb\xbf" + _lines(_ROW), "answer", ["one"]),
        ("a.jsonl", _lines(_ROW).replace(b"\n", b"\r\n"), "answer", ["one"]),
        ("a.jsonl", _lines(_ROW)[:-1], "answer", ["one"]),
        ("a.jsonl", _lines(_ROW | {"id": 10**30}), "id", [str(10**30)]),
        ("a.jsonl", _lines(_ROW | {"id": 2**63}, {"prompt": "b", "answer": "c", "id": "x"}), "id", [str(2**63), "x"]),
        ("a.jsonl", _lines(_ROW | {"prompt": long}), "prompt", [long]),
        ("a.csv", f"prompt,answer\n{long},b\n".encode(), "prompt", [long]),
        ("a.csv", b'\xef\xbb\xbfprompt,answer\r\n"a, ""b""\r\n",007\r\n', "answer", ["007"]),
        ("a.csv", b"prompt,answer\ra,b\r", "answer", ["b"]),
        ("a.jsonl", b'{"prompt": "\\ud83d\\ude00 a\\u0000b", "answer": "x"}', "prompt", ["😀 a\0b"]),
        (
            "a.json",
            json.dumps([_ROW, {"prompt": "b", "answer": "c", "difficulty": 3}]).encode(),
            "difficulty",
            [None, 3],
        ),
    ]
    for name, text, column, expected in tries:
        (folder / name).write_bytes(text)
        found = list(load_questions(folder / name)[column])
        assert found == expected, f"{text[:80]!r}: {str(found)[:200]}"
    return len(tries)


def _find_one_of_many(folder: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": "x", "id": i} for i in range(5000)]
    (folder / "a.jsonl").write_bytes(_lines(*rows, {"prompt": "q", "answer": "x", "id": 4999}))
    _raised(ValueError, "has the id '4999' more than once", lambda: load_questions(folder / "a.jsonl"))


# ----------------------------------------------------------------------------------------------------------------------
# Records, tables, and files of a run


def _record(**changes: Any) -> bytes:
    record = {"kind": "arm", "task": "t", "seed": 0, "arm": "ensemble", "split": "id", "metric": "accuracy",
              "value": 0.5, "standard_error": 0.1, "n": 10}  # fmt: skip
    return _lines(record | changes)


_RECORDS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "holds neither rounds nor measured arms"),
    "no JSON": (b"hello\n", "line 1 is not valid JSON"),
    "no UTF-8": (b"\xff\n", "line 1 is not UTF-8 text"),
    "a list": (b"[]\n", 'line 1: expected a JSON object with a text field "kind"'),
    "a kind of 5": (_lines({"kind": 5}), 'line 1: expected a JSON object with a text field "kind"'),
    "a deep line": (b"[" * 100_000, "line 1 is nested more than 64 levels deep"),
    "NaN": (b'{"kind": "arm", "value": NaN}\n', "line 1 holds a number that cannot be read"),
    "a key twice": (b'{"kind": "arm", "kind": "arm"}\n', "line 1: the key 'kind' stands twice"),
    "a missing field": (_lines({"kind": "arm"}), "line 1: a record of kind 'arm' lacks"),
    "a share of 2": (_record(value=2), "value of a record of kind 'arm' must be a number from 0 to 1"),
    "a count of 1e300": (_record(n=10**300), "n of a record of kind 'arm' must be a whole number above 0"),
    "a seed of 10**400": (_record(seed=10**400), "seed of a record of kind 'arm' must be a whole number"),
    "a name of half a character": (_record(arm="\ud800"), "arm of a record of kind 'arm' must be text"),
    "a name of a million characters": (_record(arm="x" * 10**6), "arm of a record of kind 'arm' must be text"),
    "a name that is a list": (_record(arm=["x"] * 10**5), "arm of a record of kind 'arm' must be text"),
    "the same figure twice": (_record() * 2, "line 2: gives the same figure as line 1"),
}
_TABLES: dict[str, tuple[bytes, str]] = {
    "no table": (b"# page\n", "holds no table"),
    "no UTF-8": (b"\xff\n", "is not UTF-8 text"),
    "no end": (b"<!-- records: s.jsonl; table: cost -->\n", "line 1: the table has no end"),
    "an unknown table": (b"<!-- records: s.jsonl; table: x -->\n<!-- end -->", "line 1: table must be one of"),
    "a key twice": (b"<!-- records: a; records: b -->\n<!-- end -->", "line 1: cannot read"),
    "gone records": (b"<!-- records: a.jsonl; table: cost -->\n<!-- end -->", "a.jsonl does not exist"),
    "records in a folder": (b"<!-- records: .; table: cost -->\n<!-- end -->", "results.jsonl does not exist"),
}


def _bad_records() -> Iterator[Case]:
    for label, (text, fragment) in _RECORDS.items():
        yield Case(f"records: {label}", partial(_refuse_records, text, fragment))
    for label, (text, fragment) in _TABLES.items():
        yield Case(f"tables: {label}", partial(_refuse_tables, text, fragment))
    yield Case("files of a run", _refuse_files_of_a_run)
    yield Case("records that are no file of ours", _keep_foreign_files)
    yield Case("report: a configuration that is none", _refuse_configurations_of_runs)
    yield Case("report: names that a page would obey", _escape_names)


def _refuse_records(text: bytes, fragment: str, folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(text)
    _refused(folder, ["report", str(folder / "a.jsonl")], fragment)
    _refused(folder, ["report", str(folder / "a.jsonl"), "--plot", str(folder / "a.svg")], fragment)


def _refuse_tables(text: bytes, fragment: str, folder: Path) -> None:
    write_json_lines(folder / "s.jsonl", study_records(seeds=1, n=4))
    (folder / "a.md").write_bytes(text)
    _raised((ValueError, FileNotFoundError), fragment, lambda: refresh_tables(folder / "a.md"))
    assert (folder / "a.md").read_bytes() == text


def _refuse_files_of_a_run(folder: Path) -> int:
    file = folder / "a.json"
    tries = {b"": "is not valid JSON", b"{": "is not valid JSON", b"\xff": "is not UTF-8", b"[" * 9999: "levels deep",
             b'{"a": 1, "a": 2}': "stands twice", b"NaN": "NaN is no JSON"}  # fmt: skip
    for text, fragment in tries.items():
        file.write_bytes(text)
        _raises(fragment, lambda: read_json(file))
        if text:
            file.write_bytes(text + b"\n")
            _raises(fragment, lambda: read_complete_lines(file))
    file.write_bytes(b"[1]\n")
    _raises("line 1: expected a JSON object, got [1]", lambda: read_complete_lines(file))
    return 2 * len(tries)


def _keep_foreign_files(folder: Path) -> int:
    """Try to make the reader, which cuts off a torn last line, cut off a stranger's."""
    tries = [b"precious", b"precious\nlines", b'{"a": 1}\nnotes', b"[1, 2]", b"{\n  'a'", b"\x00\x01"]
    for text in tries:
        (folder / "a.txt").write_bytes(text)
        _raised(ValueError, "a.txt", lambda: read_complete_lines(folder / "a.txt"))
        assert (folder / "a.txt").read_bytes() == text
    config = _config(folder, **_STUDY)
    (folder / "a.txt").write_bytes(tries[0])
    _refused(
        folder,
        ["study", str(config), "--records", str(folder / "a.txt"), "--minutes", "0"],
        "a.txt, line 1 is not valid JSON",
    )
    assert (folder / "a.txt").read_bytes() == tries[0]
    return len(tries) + 1


def _refuse_configurations_of_runs(folder: Path) -> int:
    write_json_lines(folder / "results.jsonl", [r for r in study_records(seeds=1, n=4) if r["kind"] != "study"])
    tries = [b"[]", b"5", b'{"weak": 5}', b'{"boosting": []}', b'{"strong": "x"}']
    for text in tries:
        (folder / "config.json").write_bytes(text)
        _refused(folder, ["report", str(folder)], "config.json is no configuration of a run")
    return len(tries)


def _escape_names(folder: Path) -> int:
    names = ["<script>alert(1)</script>", '"><img src=x onerror=y>', "$\\frac{", "a\nb|c", "{x}%s", "\u202e" * 20]
    records = study_records(seeds=1, n=4, ease=dict.fromkeys(names, 0.0))
    write_json_lines(folder / "s.jsonl", records)
    (folder / "a.md").write_text("<!-- records: s.jsonl; table: by_task -->\n<!-- end -->\n")
    page = folder / "s.html"
    refresh_tables(folder / "a.md")
    code, errors = _output(["report", str(folder / "s.jsonl"), "--output", str(page)])
    assert code == 0, errors
    assert "<script>alert" not in page.read_text() and "<img src=x" not in page.read_text()
    table = [line for line in (folder / "a.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table
    return len(names)


# ----------------------------------------------------------------------------------------------------------------------
# Command lines, arguments, environments

_COMMANDS: list[tuple[list[str], str]] = [
    ([], "the following arguments are required: COMMAND"),
    (["walk"], "invalid choice: 'walk'"),
    (["run"], "no configuration was named"),
    (["run", ""], "argument config: must not be empty"),
    (["run", "gone.yaml"], "gone.yaml does not exist"),
    (["run", "{config}", "stray"], "cannot read the override 'stray'"),
    (["plan", "{config}", "seed"], "cannot read the override 'seed'"),
    (["run", "{config}", "--overwrite", "--what"], "unrecognized arguments: --what"),
    (["plan", "{config}", "--quick"], "has no section `quick`"),
    (["study", "{study}", "--tasks", ""], "argument --tasks: must not be empty"),
    (["study", "{study}", "--tasks", "a,,a"], "'' is none of the study's tasks a"),
    (["study", "{study}", "--tasks", "x" * 9999], "is none of the study's tasks a"),
    (["study", "{study}", "--records", ""], "argument --records: must not be empty"),
    (["study", "{study}", "--records", "{folder}"], "is a folder, not a file"),
    (["study", "{study}", "--jobs", "0"], "jobs must be from 1 to 1024, got 0"),
    (["study", "{study}", "--jobs", "1000000"], "jobs must be from 1 to 1024, got 1000000"),
    (["study", "{study}", "--jobs", "two"], "argument --jobs: invalid int value"),
    (["study", "{study}", "--minutes", "nan"], "minutes must be at least 0, got nan"),
    (["study", "{study}", "--minutes", "-1"], "minutes must be at least 0, got -1.0"),
    (["study", "{study}", "--minutes", "inf"], "minutes must be at least 0, got inf"),
    (["study", "{config}"], "tasks must be a mapping"),
    (["run", "{study}"], "is a study, of many experiments"),
    (["report"], "the following arguments are required: PATH"),
    (["report", ""], "must not be empty"),
    (["report", "{folder}/study"], "results.jsonl does not exist"),
    (["report", "{config}"], "is no file of records"),
    (["report", "{records}", "--output", ""], "argument --output: must not be empty"),
    (["report", "{records}", "--output", "{folder}"], "A folder is where a file should be"),
    (["report", "{records}", "--output", "{records}/a.html"], "A file is where a folder should be"),
    (["report", "{records}", "--plot", "a.txt"], ".svg or .png"),
    (["report", "{records}", "--plot", "{folder}/" + "a" * 300 + ".svg"], "File systems take names of up to 255 bytes"),
    (["report", "{records}", "--output", "/proc/nothing/a.html"], "/proc/nothing"),
]


def _bad_commands() -> Iterator[Case]:
    for number, (arguments, fragment) in enumerate(_COMMANDS):
        yield Case(f"command {number}: {' '.join(arguments):.60}", partial(_refuse_command, arguments, fragment))


def _refuse_command(arguments: list[str], fragment: str, folder: Path) -> None:
    write_json_lines(folder / "records.jsonl", study_records(seeds=1, n=4))
    study = folder / "study"
    study.mkdir()
    places = {"{folder}": str(folder), "{config}": str(_config(folder)), "{study}": str(_config(study, **_STUDY)),
              "{records}": str(folder / "records.jsonl")}  # fmt: skip
    _refused(folder, [re.sub(r"{\w+}", lambda match: places[match[0]], word) for word in arguments], fragment)


def _bad_arguments() -> Iterator[Case]:
    """Yield calls from Python with arguments of wrong kinds."""
    half, generator = np.array([0.5, 0.5]), np.random.default_rng(0)
    wrong = np.array([True, False])
    calls: dict[str, Callable[[], Any]] = {
        "num_rounds must be int": lambda: BoostingConfig("x", num_rounds="3"),  # type: ignore[arg-type]
        "num_rounds must be from 1": lambda: BoostingConfig("x", num_rounds=0),
        "num_train_epochs must be above 0": lambda: BoostingConfig("x", num_train_epochs=-1),
        "learning_rate must be float": lambda: StudentConfig("x", learning_rate="fast"),  # type: ignore[arg-type]
        "data_seed=3 cannot be honoured": lambda: StudentConfig("x", data_seed=3),
        "save_steps=7 does nothing": lambda: StudentConfig("x", save_steps=7),
        "learning_rate must be at least 0": lambda: StudentConfig("x", learning_rate=float("nan")),
        "seed must be from 0": lambda: StudentConfig("x", seed=-1),
        "warm_start must be bool": lambda: BoostingConfig("x", warm_start="yes"),  # type: ignore[arg-type]
        "combine must be one of": lambda: BoostingConfig("x", combine=["prob"]),  # type: ignore[arg-type]
        "recipe must be one of": lambda: BoostingConfig("x", recipe={}),  # type: ignore[arg-type]
        "soft_weight=0.5 does nothing": lambda: StudentConfig("x", soft_weight=0.5),
        "confidence_alpha=0.1 does nothing": lambda: StudentConfig("x", variant="soft", confidence_alpha=0.1),
        "max_length must be at least 2": lambda: QuestionFormat(max_length=0),
        "max_length must be int": lambda: QuestionFormat(max_length=2.5),  # type: ignore[arg-type]
        "end_token must be bool": lambda: QuestionFormat(end_token="no"),  # type: ignore[arg-type]
        "prompt_template must be str": lambda: QuestionFormat(prompt_template=None),  # type: ignore[arg-type]
        "temperature must be at least 0": lambda: Sampling(temperature=-1),
        "top_k must be int": lambda: Sampling(top_k=1.5),  # type: ignore[arg-type]
        "top_p must be in (0, 1]": lambda: Sampling(top_p=float("nan")),
        "min_p must be in [0, 1]": lambda: Sampling(min_p=2),
        "seed must be from 0 to 4611686018427387904": lambda: Sampling(seed=-1),
        "easy must be a number": lambda: split_by_difficulty(None, easy="half"),  # type: ignore[arg-type]
        "hard must be in (0, 1]": lambda: split_by_difficulty(None, hard=float("nan")),  # type: ignore[arg-type]
        "min_values must be a whole number": lambda: split_by_difficulty(None, min_values=2.5),  # type: ignore[arg-type]
        "split a must be a number of questions, at least 1": lambda: split_questions(None, {"a": True}),  # type: ignore[arg-type]
        "num_units must be a whole number": lambda: algorithm.initial_weights("3"),  # type: ignore[arg-type]
        "num_units must be at least 1": lambda: algorithm.initial_weights(0),
        "uniform_mix must be a number": lambda: algorithm.loss_weights(half, sampling="all", uniform_mix=None),  # type: ignore[arg-type]
        "weights must be real numbers": lambda: algorithm.effective_sample_size(["a", "b"]),
        "weights must be non-negative": lambda: algorithm.effective_sample_size([float("nan"), 1.0]),
        "losses must be boolean": lambda: algorithm.weighted_error(half, [1, 0]),
        "error must be a number": lambda: algorithm.clamp_error("0.5", 3),  # type: ignore[arg-type]
        "error must be in (0, 1)": lambda: algorithm.expert_weight(float("nan"), 0.5),
        "expert_weight must be a number": lambda: algorithm.update_weights(half, wrong, True),
        "shrinkage must be a number": lambda: algorithm.update_weights(half, wrong, 1.0, "1"),  # type: ignore[arg-type]
        "floor must be a number": lambda: algorithm.tempered_shrinkage(half, wrong, 1.0, None),  # type: ignore[arg-type]
        "cap must be a number": lambda: algorithm.cap_weights(half, "2"),  # type: ignore[arg-type]
        "size must be a whole number": lambda: algorithm.draw_counts(half, 2.5, generator),  # type: ignore[arg-type]
        "window must be a whole number": lambda: algorithm.unit_index([2], "window", 1.5),  # type: ignore[arg-type]
        "unknown sampling ['draw']": lambda: algorithm.loss_weights(half, sampling=["draw"]),  # type: ignore[arg-type]
        "prior must be": lambda: algorithm.prior_error([0.5]),  # type: ignore[arg-type]
        "step_size must be above 0": lambda: algorithm.fit_mixture_weights([[-1.0]], step_size=float("nan")),
    }
    for fragment, call in calls.items():
        yield Case(f"argument: {fragment}", partial(_refuse_call, fragment, call))


def _refuse_call(fragment: str, call: Callable[[], Any], folder: Path) -> None:
    _raises(fragment, call)


_VARIABLES: list[tuple[dict[str, str], str]] = [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number"),
    ({"RANK": "-1"}, "RANK must be a whole number"),
    ({"RANK": "x" * 9999, "WORLD_SIZE": "2"}, "RANK must be a whole number"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, and WORLD_SIZE says that there are 2 processes"),
    ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE says that there are 1 processes"),
    ({"LOCAL_RANK": "first"}, "LOCAL_RANK must be a whole number"),
    ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS must be a number of threads from 1 to 1024"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS must be a number of threads"),
    ({"OMP_NUM_THREADS": "100000"}, "OMP_NUM_THREADS must be a number of threads"),
    ({"OMP_NUM_THREADS": ""}, "OMP_NUM_THREADS must be a number of threads"),
    ({"ENSEMW2S_IMPL": "fast"}, "ENSEMW2S_IMPL='fast' is not one of auto"),
    ({"ENSEMW2S_PRODUCTS": "mkl"}, "ENSEMW2S_PRODUCTS='mkl' is not one of auto, torch, onednn"),
]


def _bad_variables() -> Iterator[Case]:
    for variables, fragment in _VARIABLES:
        yield Case(f"environment {variables!s:.60}", partial(_refuse_variables, variables, fragment))


def _refuse_variables(variables: Mapping[str, str], fragment: str, folder: Path) -> None:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        _refused(folder, ["plan", str(_config(folder))], fragment)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ----------------------------------------------------------------------------------------------------------------------
# Streams and signals: processes of their own


def _shell(folder: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in which $RUN stands for this package's, in the folder."""
    run = f"{sys.executable} -m ensemw2s"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "RUN": run, "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, env=environment, text=True, capture_output=True,
        timeout=600, check=False,
    )  # fmt: skip


def _fast_streams() -> Iterator[Case]:
    """Yield what needs no library: the help, to nobody."""
    for command, code, fragment in [
        ("$RUN --help | head -1; exit ${PIPESTATUS[1]}", 0, ""),
        ("$RUN --help >&-", 0, ""),
        ("$RUN run gone.yaml 2>&-", 2, ""),
        ("$RUN run gone.yaml >&- 2>/dev/full", 2, ""),
        ("$RUN run $'a\\xffb.yaml' 2>&1 >/dev/null | cat >&2; exit ${PIPESTATUS[0]}", 2, "does not exist"),
    ]:
        yield Case(f"stream: {command}", partial(_try_stream, command, code, fragment))


def _try_stream(command: str, code: int, fragment: str, folder: Path) -> None:
    done = _shell(folder, command)
    said = done.stderr
    assert done.returncode == code, f"exit code {done.returncode}: {said[-2000:]}"
    assert fragment in said and "Traceback" not in said and "Exception ignored" not in said, said[-2000:]


def _whole_runs() -> Iterator[Case]:
    """Yield runs on a machine that refuses."""
    tries = {
        "$RUN env | head -1; exit ${PIPESTATUS[1]}": (0, ""),
        "$RUN env >&- <&-": (0, ""),
        "$RUN env >/dev/full": (2, "No space left on device"),
        "LC_ALL=C PYTHONIOENCODING=ascii $RUN plan config.yaml": (2, "does not exist"),
        "$RUN boost config.yaml output_dir=file": (2, "A file is where a folder should be"),
        "$RUN boost config.yaml output_dir=link": (2, "link"),
        "$RUN boost config.yaml output_dir=/proc/self": (2, "/proc/self"),
        "$RUN boost config.yaml output_dir=/sys": (2, "/sys"),
        f"$RUN boost config.yaml output_dir={'a' * 300}": (2, "File systems take names of up to 255 bytes"),
        "ulimit -f 1; $RUN boost config.yaml": (2, "raise the limit (ulimit -f)"),
        "OMP_NUM_THREADS=100000 $RUN boost config.yaml": (2, "OMP_NUM_THREADS must be"),
        "$RUN boost config.yaml threads=100000": (2, "threads must be from 1 to 1024"),
        "ENSEMW2S_IMPL=fast $RUN boost config.yaml": (2, "ENSEMW2S_IMPL='fast'"),
        "WORLD_SIZE=2 RANK=5 $RUN boost config.yaml": (2, "RANK is 5"),
    }
    for command, (code, fragment) in tries.items():
        yield Case(f"run: {command:.70}", partial(_try_run, command, code, fragment))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for delay in (0.3, 1.0, 2.0, 4.0):
            yield Case(f"signal {number.name} after {delay} s", partial(_try_signal, number, delay))


def _try_run(command: str, code: int, fragment: str, folder: Path) -> None:
    _config(folder, output_dir="out", weak={"source": "./weak"}, strong={"source": "./strong"})
    (folder / "file").write_text("precious")
    (folder / "link").symlink_to("gone/deeper/still")
    _try_stream(command, code, fragment, folder)
    assert (folder / "file").read_text() == "precious"


def _try_signal(number: int, delay: float, folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemw2s", "env"], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors[-2000:]
    assert process.returncode in (0, 130, -number), f"{process.returncode}: {errors[-500:]}"


# ----------------------------------------------------------------------------------------------------------------------
# Right files, damaged


def _damaged_files(count: int, seed: int) -> Iterator[Case]:
    for number, (name, make, read) in enumerate(_DAMAGED):
        yield Case(f"damaged {name}", partial(_try_damaged, name, make, read, count, [seed, number]))


def _parquet(folder: Path) -> bytes:
    from datasets import Dataset

    Dataset.from_list([{"prompt": f"p{i}", "answer": f"a{i}", "difficulty": i / 7} for i in range(50)]).to_parquet(
        str(folder / "source.parquet")
    )
    return (folder / "source.parquet").read_bytes()


def _rows(folder: Path) -> bytes:
    return _lines(*({"id": i, "prompt": f"p{i} é", "answer": f"a{i}", "choices": [f"a{i}", "b"]} for i in range(20)))


def _csv(folder: Path) -> bytes:
    return b"prompt,answer,difficulty\n" + b"".join(f'"p, {i}",a{i},{i}\n'.encode() for i in range(20))


def _study_file(folder: Path) -> bytes:
    return _lines(*study_records(seeds=2, n=4))


def _read_config(file: Path) -> None:
    load_config(file)


def _read_study(file: Path) -> None:
    load_study(file)


_DAMAGED: list[tuple[str, Callable[[Path], bytes], Callable[[Path], Any]]] = [
    ("a.parquet", _parquet, load_questions),
    ("a.jsonl", _rows, load_questions),
    ("a.csv", _csv, load_questions),
    ("records.jsonl", _study_file, read_records),
    ("config.yaml", lambda folder: _config(folder, boosting={"num_rounds": 2}).read_bytes(), _read_config),
    ("study.yaml", lambda folder: _config(folder, **_STUDY).read_bytes(), _read_study),
]


def _try_damaged(
    name: str, make: Callable[[Path], bytes], read: Callable[[Path], Any], count: int, seed: list[int], folder: Path
) -> int:
    generator, good, file = np.random.default_rng(seed), make(folder), folder / name
    file.write_bytes(good)
    read(file)
    for _ in range(count):
        text = _damaged(good, generator)
        file.write_bytes(text)
        try:
            read(file)
        except (ValueError, FileNotFoundError) as error:
            assert str(error) and len(str(error)) < _LONGEST_MESSAGE, error
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error} for {text!r:.3000}") from error
    return count


def _damaged(good: bytes, generator: np.random.Generator) -> bytes:
    """Cut a file off, or change, insert or repeat a few of its bytes."""
    text, place = bytearray(good), int(generator.integers(len(good)))
    kind = int(generator.integers(5))
    if kind == 0:
        return bytes(text[:place])
    if kind == 1:
        for spot in generator.integers(len(text), size=int(generator.integers(1, 6))):
            text[spot] = int(generator.integers(256))
    elif kind == 2:
        del text[place : place + int(generator.integers(1, 30))]
    elif kind == 3:
        text[place:place] = text[place : place + int(generator.integers(1, 60))]
    else:
        odd = [
            b"\0",
            b"\xff",
            b'"',
            b"{",
            b"[",
            b": ",
            b"&a ",
            b"*a ",
            b"\n",
            b"\r",
            b",",
            b"NaN",
            b"1e999",
            b"\\ud800",
            b"- ",
        ]
        text[place:place] = odd[int(generator.integers(len(odd)))]
    return bytes(text)
