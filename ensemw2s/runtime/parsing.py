"""Reading JSON and YAML that somebody else wrote: bounded in size and depth, and nothing in it lost without a word.

Python's readers take much that is no sentence of these languages, or say less than they know: a key that stands twice
is taken once, `NaN` is a number, a value nested 100,000 deep overflows the stack, and twenty lines of YAML can stand
for a billion values. Whatever is refused here is a ValueError that names the file, and the line where it is known.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ensemw2s.runtime.values import shown, shown_names

# What settings may take; questions and records may be as long as they like.
MOST_BYTES = 4 * 2**20
MOST_VALUES = 100_000
MOST_LEVELS = 64
_TOO_DEEP = f"{{}} is nested more than {MOST_LEVELS} levels deep, expected a few"


class _RepeatedKeyError(ValueError):
    """An object has the key twice that is its argument."""


def require_file(path: str | os.PathLike[str], advice: str) -> Path:
    """Return `path` if it is a regular file; `advice` ends every error ("name a local file of questions").

    Raises:
        FileNotFoundError: nothing is there, or a link to nothing.
        ValueError: a folder, a pipe or a device is there, or the name is none that a file can have.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which does not exist: {advice}") from error
        raise FileNotFoundError(f"{path} does not exist: {advice}") from error
    except ValueError as error:
        raise ValueError(f"{shown(str(path))} is no name of a file ({error}): {advice}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ValueError(f"{path} is {kind}, not a file: {advice}")
    return path


def read_text(path: str | os.PathLike[str], *, most_bytes: int | None = None) -> str:
    """Return the text of a UTF-8 file without a byte order mark; ValueError for other bytes, or too many."""
    path = Path(path)
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {most_bytes:,} for a file of settings")
    return decoded(path.read_bytes(), str(path))


def decoded(text: bytes, place: str) -> str:
    """Return bytes as text; what is not UTF-8 raises ValueError that names `place`."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text ({error}): save it as UTF-8") from error


def parse_json(text: str | bytes, place: str, *, not_finite: bool = False) -> Any:
    """Return what a JSON text says.

    Args:
        text: the text; bytes are UTF-8.
        place: begins every error: the file, and the line if there is one text for each.
        not_finite: whether NaN and infinity may stand there, which transformers writes.

    Raises:
        ValueError: no JSON; a key that an object has twice; NaN, infinity, or a number too large for a float; more
            than `MOST_LEVELS` levels.
    """
    text = decoded(text, place) if isinstance(text, bytes) else text
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_constant=float if not_finite else _refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP.format(place)) from error
    except _RepeatedKeyError as error:
        key = error.args[0]
        raise ValueError(
            f"{place}: the key {shown(key)} stands twice in one object{_lines_of(key, text)}: keep one of them"
        ) from error
    except ValueError as error:
        # Of a number; and Python reads no whole number of more than 4,300 digits.
        raise ValueError(f"{place} holds a number that cannot be read: {error}") from error
    _check_levels(value, place)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKeyError(next(key for key, count in counts.items() if count > 1))
    return made


def _lines_of(key: str, text: str) -> str:
    """Say on which lines of a text with several an object's key stands; the key may be there elsewhere, too."""
    found = [
        text.count("\n", 0, match.start()) + 1 for match in re.finditer(f"{re.escape(json.dumps(key))}\\s*:", text)
    ]
    return f" (lines {shown_names(dict.fromkeys(found))})" if "\n" in text.strip() and found else ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON, write null for a value that is missing")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text:.40} is beyond the largest float")
    return value


def _check_levels(value: Any, place: str) -> None:
    waiting = [(value, 1)]
    while waiting:
        holder, level = waiting.pop()
        if level > MOST_LEVELS:
            raise ValueError(_TOO_DEEP.format(place))
        items = holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
        waiting += [(item, level + 1) for item in items if isinstance(item, (dict, list))]


class _Loader(yaml.SafeLoader):
    """YAML whose plain words mean what they mean in YAML 1.2, within bounds, with every key once.

    The 1.1 of PyYAML reads `no` as false, `012` as 10, `1:30` as 90, `1_000` as 1000 and dates as dates, and does not
    read `1e-3` as a number. Where the two differ on a word that people write, it is refused; the rest is text.
    """

    # Texts, numbers, lists and mappings; no dates, bytes or sets.
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.level = self.count = 0
        # The number of values that each node stands for, once it is complete.
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark, before = self.peek_event().start_mark, self.count
        self.level += 1
        if self.level > MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MOST_LEVELS} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if is_alias and id(node) not in self.sizes:
            raise yaml.MarkedYAMLError(problem="an alias within what it stands for", problem_mark=mark)
        # An alias stands for all that its anchor does.
        self.count = before + self.sizes.setdefault(id(node), self.count - before + 1)
        if self.count > MOST_VALUES:
            problem = f"more than {MOST_VALUES:,} values, those that aliases stand for included"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before `<<` adds what it merges, which may name a key again.
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if key.tag not in _KEY_TAGS:
                raise yaml.MarkedYAMLError(problem="a key must be text: put it in quotes", problem_mark=key.start_mark)
            mark = first.setdefault(key.value, key.start_mark)
            if mark is not key.start_mark:
                problem = f"the key {shown(key.value)} stands twice, first in line {mark.line + 1}: keep one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # PyYAML 6.0.4 takes the value of a chain's far end for a key of one letter, and of a list's last mapping.
        own = {key.value: (key, value) for key, value in node.value if key.tag != _MERGE}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for value in (value for key, value in node.value if key.tag == _MERGE):
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(problem="<< takes mappings alone", problem_mark=source.start_mark)
                self.flatten_mapping(source)
                for pair in source.value:
                    merged.setdefault(pair[0].value, pair)
        node.value = list((merged | own).values())


def _resolve(tag: str, pattern: str, first: Iterable[str]) -> None:
    _Loader.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), list(first))


_TWO_MEANINGS = "!two-meanings"
_MERGE = "tag:yaml.org,2002:merge"
_KEY_TAGS = ("tag:yaml.org,2002:str", _MERGE, _TWO_MEANINGS)
_NUMBER = "-+.0123456789"
_resolve("tag:yaml.org,2002:null", "~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("tag:yaml.org,2002:int", "[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER)
_resolve(
    "tag:yaml.org,2002:float",
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    _NUMBER,
)
_resolve(_MERGE, "<<", "<")
_resolve(
    _TWO_MEANINGS,
    "[Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF|[-+]?0[0-9_]+|[-+]?[0-9]+(?:_[0-9]+)+|[0-9]+(?::[0-5]?[0-9])+",
    f"{_NUMBER}yYnNoO",
)


def _refuse_two_meanings(loader: _Loader, node: yaml.ScalarNode) -> NoReturn:
    word = node.value
    meant = "true or false" if word.isalpha() else "plain digits without zeros in front"
    raise yaml.MarkedYAMLError(
        problem=f"{word:.60} means one thing in YAML 1.1 and another in YAML 1.2: write {meant}, or put it in quotes "
        "if it is text",
        problem_mark=node.start_mark,
    )


_Loader.add_constructor(_TWO_MEANINGS, _refuse_two_meanings)


def parse_yaml(text: str, place: str) -> Any:
    """Return what a YAML text says; `place` begins every error.

    Raises:
        ValueError: no YAML; a key that stands twice; a word that YAML 1.1 and 1.2 read differently (`no`, `on`, `012`,
            `1_000`); more than `MOST_LEVELS` levels or `MOST_VALUES` values, those behind aliases included.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{place} cannot be read as YAML{where}: {said}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # Of characters that YAML does not allow, and of tags such as !!int and !!timestamp with other text behind.
        raise ValueError(f"{place} cannot be read as YAML: {' '.join(str(error).split())}") from error
