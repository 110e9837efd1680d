"""Files of labelled questions: rows as JSON lines, each bound to the run that wrote it, and what that run was.

Beside the rows, in `<name>.run.json`, stands the description of their run: all that decides an answer. Rows stay plain
JSON lines, one a question, which pandas and datasets read. Each ends with `check`, a hash of the row and of the
description, so that a row of another run, or one that was changed, is known by itself, whatever stands beside it.
"""

from __future__ import annotations

import base64
import glob
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemw2s.runtime.files import append_json_lines, write_json, write_json_lines
from ensemw2s.runtime.fingerprint import digest_json
from ensemw2s.runtime.parsing import parse_json
from ensemw2s.runtime.values import is_finite_number, shown

if TYPE_CHECKING:
    from datasets import Dataset


# One row per answer token, k wide.
TOP_COLUMNS = ("top_token_ids", "top_log_probs")
# On file: little-endian, whatever machine wrote it.
_FILE_DTYPES = dict(zip(TOP_COLUMNS, ("<i4", "<f4"), strict=True))
_KIND = "labels"
# A row's last key on file; rows that are handed out do not have it.
_CHECK = "check"
# What the file of rows begins with, however early the process that wrote it was killed.
_FIRST_BYTES = b'{"id": '
_WAY_OUT = "name another file or delete this one"


def packed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a labelled row as plain JSON: the arrays of its cache as base64 of their bytes.

    A cache stands in the line of its answer, so that a kill drops both or neither, and keeps every bit; a third of its
    size is the price.
    """
    packed = {**row, "answer_ids": [int(token) for token in row["answer_ids"]]}
    for name in _FILE_DTYPES.keys() & row.keys():
        packed[name] = base64.b64encode(row[name].astype(_FILE_DTYPES[name]).tobytes()).decode("ascii")
    return packed


def unpacked_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `packed_row` was given."""
    unpacked = {**row, "answer_ids": np.array(row["answer_ids"], dtype=np.int32)}
    for name in _FILE_DTYPES.keys() & row.keys():
        flat = np.frombuffer(base64.b64decode(row[name]), dtype=_FILE_DTYPES[name])
        unpacked[name] = flat.reshape(len(row["answer_ids"]), -1)
    return unpacked


def read_labels(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows that `TokenEnsemble.label` left in its `output_file`; none if there is no such file.

    The file is left as it is: a last line that a kill has cut off is not read.

    Raises:
        ValueError: a row that is damaged or, where the description of its run is beside the file, was changed or
            belongs to another run; names file and line.
    """
    lines = _Lines.of(Path(path))
    description = _description_beside(Path(path))
    return lines.checked(None if description is None else digest_json(description))


@dataclass(frozen=True)
class LabelFile:
    """Where a call of `label` keeps its finished rows, and finds those of an earlier call.

    Each process but the main one has a file of its own beside it, until all are done.

    Attributes:
        path: the file of the main process, and in the end of all rows.
        describe: returns what decides the answers, as plain JSON; called on the main process alone.
        questions: columns `id`, `prompt` and optionally `choices`.
    """

    path: Path
    describe: Callable[[], dict[str, Any]]
    questions: Dataset

    def resume(self) -> tuple[list[dict[str, Any]], str]:
        """Return what any process of an earlier call has finished, left in one file, and the run's digest.

        On the main process alone, before any row is written.

        Raises:
            ValueError: rows of another run, saying what differs; rows that are damaged, naming file and line; or a file
                of something else.
        """
        if self.path.is_dir():
            raise ValueError(f"output_file {self.path} is a folder: name a file in it")
        mine = json.loads(json.dumps({"kind": _KIND, **self.describe()}))
        digest = digest_json(mine)
        files = [self.path, *self._others()]
        read = [_Lines.of(file) for file in files]
        theirs = _description_beside(self.path)
        if theirs is not None and theirs != mine and any(lines.whole for lines in read):
            raise ValueError(
                f"{self.path} holds answers of another run; differing: {self._differences(mine, theirs, read)}. "
                f"Answers of two runs are not mixed: {_WAY_OUT}"
            )
        ids = set(self.questions["id"])
        rows = {row["id"]: row for lines in read for row in lines.checked(digest, ids)}
        if theirs != mine:
            write_json(_description_file(self.path), mine)
        if len(files) > 1:
            self.join(rows.values(), digest)
        elif read[0].torn:
            os.truncate(self.path, self.path.stat().st_size - read[0].torn)
        return list(rows.values()), digest

    def append(self, rows: Iterable[Mapping[str, Any]], digest: str, process: int) -> None:
        """Keep finished rows of a process."""
        file = self.path if process == 0 else self.path.with_name(f"{self.path.name}.process-{process}")
        append_json_lines(file, (_with_check(packed_row(row), digest) for row in rows))

    def join(self, rows: Iterable[Mapping[str, Any]], digest: str) -> None:
        """Leave all rows in one file; on the main process alone."""
        write_json_lines(self.path, (_with_check(packed_row(row), digest) for row in rows))
        for file in self._others():
            file.unlink()

    def _others(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.process-*"))

    def _differences(self, mine: Mapping[str, Any], theirs: Mapping[str, Any], read: Sequence[_Lines]) -> str:
        """Say what differs between two descriptions, with the values where they are short."""
        found = []
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                # Hashes tell nobody anything.
                hashed = name in ("experts", "base", "questions", "tokenizer", "prompt_tokens")
                values = "" if hashed else f" ({shown(theirs.get(name))} on file, {shown(mine.get(name))} now)"
                found.append(f"{name}{values}")
        if mine.get("questions") != theirs.get("questions"):
            found.append(self._changed_question(read))
        return ", ".join(part for part in found if part)

    def _changed_question(self, read: Sequence[_Lines]) -> str:
        """Name a question on file that is now another one."""
        now = {row["id"]: row for row in self.questions}
        for row in (_parsed(line) for lines in read for line in lines.whole):
            if not isinstance(row, dict):
                continue
            row_id = row.get("id")
            if not _is_id(row_id) or row_id not in now:
                return f"there is no question with the id {shown(row_id)} any more"
            for name in ("prompt", "choices"):
                if row.get(name) != now[row_id].get(name):
                    return f"the {name} of id {shown(row_id)} was {shown(row.get(name))}"
        return ""


def _description_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def _description_beside(path: Path) -> dict[str, Any] | None:
    """Return the description of a file of rows; raises ValueError if it is something else."""
    file = _description_file(path)
    if not file.exists():
        return None
    found = _parsed(file.read_bytes())
    if not isinstance(found, dict) or found.get("kind") != _KIND:
        raise ValueError(f"{file} does not describe a run of label(): delete it, or name another output_file")
    return found


def _with_check(row: Mapping[str, Any], digest: str) -> dict[str, Any]:
    return {**row, _CHECK: digest_json([digest, row], 8)}


@dataclass(frozen=True)
class _Lines:
    """The lines of a file that was appended to: the whole ones, and the bytes of the last if a kill has cut it off."""

    file: Path
    whole: list[bytes]
    torn: int

    @classmethod
    def of(cls, file: Path) -> _Lines:
        """Read a file, of no lines if it does not exist; a last line that is no beginning of a row is a ValueError."""
        content = file.read_bytes() if file.exists() else b""
        *whole, last = content.split(b"\n")
        # Without an end it may be whole nevertheless, and no row of ours.
        row = _parsed(last)
        if last[: len(_FIRST_BYTES)] != _FIRST_BYTES[: len(last)] or (row is not None and _CHECK not in row):
            raise ValueError(
                f"{file}, line {len(whole) + 1}: no row that label() began to write: this is no file of labels. Name "
                "another output_file"
            )
        return cls(file, whole, len(last))

    def checked(self, digest: str | None = None, ids: set[Any] | None = None) -> list[dict[str, Any]]:
        """Return all rows, without their checks: of the run `digest`, on the questions `ids`, where these are given.

        Raises:
            ValueError: a row that `label` would not have written; names file and line.
        """
        rows: list[dict[str, Any]] = []
        seen: dict[Any, int] = {}
        for number, line in enumerate(self.whole, 1):
            row = _parsed(line)
            problem = (
                _problem(row, ids)
                or (_other_shape(row, rows[0]) if rows else None)
                or _other_run(row, digest)
                or (f"the id {shown(row['id'])} is in line {seen[row['id']]} already" if row["id"] in seen else None)
            )
            if problem:
                raise ValueError(
                    f"{self.file}, line {number}: {problem}. Delete that line, and label() answers the question again; "
                    f"or {_WAY_OUT}"
                )
            seen[row["id"]] = number
            rows.append({name: value for name, value in row.items() if name != _CHECK})
        return [unpacked_row(row) for row in rows]


def _parsed(line: bytes) -> Any:
    """Return what a line says, None if it is no JSON or holds NaN."""
    with suppress(ValueError):
        return parse_json(line, "the line")
    return None


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool | str) and is_finite_number(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and -1e-9 <= value <= 1 + 1e-9


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are(check: Callable[[Any], bool], least: int) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and len(values) >= least and all(map(check, values))


# Key -> what it must be, in a function and in words.
_Columns = dict[str, tuple[Callable[[Any], bool], str]]
_COLUMNS: _Columns = {
    "id": (_is_id, "text or a whole number"),
    "prompt": (lambda value: bool(value) and isinstance(value, str | list), "text or messages"),
    "answer": (_is_text, "text"),
    "answer_ids": (_are(_is_token, 1), "a list of token ids, at least one"),
    "num_tokens": (_is_token, "a number of tokens"),
    "finished": (lambda value: isinstance(value, bool), "true or false"),
    # A mean of float32 logarithms may be a rounding above 0.
    "confidence": (lambda value: _is_number(value) and value <= 1e-3, "a finite log-probability, at most 0"),
    "agreement": (_is_share, "a share in [0, 1]"),
    "expert_agreement": (_are(_is_share, 1), "a list of shares in [0, 1], one for each expert"),
    _CHECK: (_is_text, "text"),
}
_WITH_CHOICES: _Columns = {"choices": (_are(_is_text, 0), "a list of texts")}
_WITH_CACHE: _Columns = {
    "top_token_ids": (_is_text, "base64 text"),
    "top_log_probs": (_is_text, "base64 text"),
    "top_temperature": (lambda value: _is_number(value) and value > 0, "a positive number"),
}


# What is wrong with a row as it is on file, in words; None if nothing is.


def _problem(row: Any, ids: set[Any] | None) -> str | None:
    if not isinstance(row, dict):
        return "no JSON object (or one with NaN or infinity in it): the line is damaged"
    found = row.get("id")
    if ids is not None and _is_id(found) and found not in ids:
        return f"it answers the question {shown(found)}, which is not in this dataset, so it belongs to another run"
    columns = dict(_COLUMNS)
    for optional in (_WITH_CHOICES, _WITH_CACHE):
        columns |= optional if optional.keys() & row.keys() else {}
    missing = [name for name in columns if name not in row]
    if missing:
        return f"it has no {missing[0]!r}, as every row of label() has"
    unknown = [name for name in row if name not in columns]
    if unknown:
        return f"it has {shown(unknown[0])}, which no row of label() has"
    for name, (is_right, words) in columns.items():
        if not is_right(row[name]):
            return f"{name} is {shown(row[name])}, expected {words}"
    count = len(row["answer_ids"])
    if row["num_tokens"] != count:
        return f"answer_ids has {count} tokens, num_tokens says {row['num_tokens']}"
    if row["answer"] not in row.get("choices", [row["answer"]]):
        return f"the answer {shown(row['answer'])} is not among its choices"
    return _problem_of_cache(row, count) if "top_log_probs" in row else None


def _problem_of_cache(row: Mapping[str, Any], count: int) -> str | None:
    content: dict[str, bytes] = {}
    for name in TOP_COLUMNS:
        try:
            content[name] = base64.b64decode(row[name], validate=True)
        except ValueError:
            return f"{name} is no base64 text"
        if not content[name] or len(content[name]) % (4 * count):
            return f"{name} has {len(content[name])} bytes, no multiple of 4 for each of {count} tokens"
    if len(content["top_token_ids"]) != len(content["top_log_probs"]):
        return "top_token_ids and top_log_probs differ in their numbers of values"
    if np.isnan(np.frombuffer(content["top_log_probs"], dtype="<f4")).any():
        return "top_log_probs holds NaN"
    return None


def _other_shape(row: Mapping[str, Any], first: Mapping[str, Any]) -> str | None:
    """Compare a row with the first of its file: both have as many experts and keep as many tokens."""
    if row.keys() - {_CHECK} != first.keys():
        return "it has other keys than the first row"
    counts = len(row["expert_agreement"]), len(first["expert_agreement"])
    if counts[0] != counts[1]:
        return f"expert_agreement has {counts[0]} values, that of the first row {counts[1]}"
    if _width(row) != _width(first):
        return f"top_log_probs keeps {_width(row)} tokens, that of the first row {_width(first)}"
    return None


def _width(row: Mapping[str, Any]) -> int:
    """Return the number of tokens kept for each answer token."""
    return len(base64.b64decode(row.get("top_log_probs", ""))) // (4 * len(row["answer_ids"]))


def _other_run(row: Mapping[str, Any], digest: str | None) -> str | None:
    content = {name: value for name, value in row.items() if name != _CHECK}
    if digest is None or _with_check(content, digest)[_CHECK] == row[_CHECK]:
        return None
    return "it was changed after it was written, or belongs to another run"
