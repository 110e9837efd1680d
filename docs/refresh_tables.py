"""Refresh the tables of Markdown files that are made from records: `python docs/refresh_tables.py docs/results.md`.

A table stands between two comments, each alone on its line:

    <!-- records: docs/results/small_pair.jsonl; table: ablation; reference: ensemble -->
    <!-- end -->

What stands between them is replaced; the rest of the file is left as it is, and so are comments inside fenced code.
The keys are `records`, paths from the Markdown file's folder, separated by commas, each of a study's file or of a run's
folder; `table`, one of `tables.TABLES`; and what that table takes: `arms`, separated by commas, `reference` and
`split`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ensemw2s.report.pool import Pool, pool_runs
from ensemw2s.report.tables import NOTES, TABLES, Rows, extent
from ensemw2s.runtime.files import new_file
from ensemw2s.runtime.parsing import require_file
from ensemw2s.runtime.records import read_records
from ensemw2s.runtime.values import shown

_START = re.compile(r"\s*<!--(.*\brecords\s*:.*)-->\s*$")
_END = re.compile(r"\s*<!--\s*end\s*-->\s*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_LISTS = ("records", "arms")


def refresh_tables(path: str | os.PathLike[str]) -> int:
    """Make every table of a Markdown file anew and return their number; the file is written whole or not at all.

    Raises:
        FileNotFoundError: the Markdown file, or records that it names, are not there.
        ValueError: no table, a marker without its end, an unknown key, table, arm or split, or records that cannot be
            pooled; names file and line of the marker.
    """
    file = Path(path)
    require_file(file, "give the Markdown file whose tables should be refreshed")
    # Bytes, since reading as text would turn \r\n into \n.
    before = _decoded(file)
    lines = before.splitlines(keepends=True)
    blocks = list(_blocks(lines, file))
    if not blocks:
        raise ValueError(f"{file} holds no table: mark one by a line `<!-- records: FILE; table: NAME -->`")
    pools: dict[tuple[Path, ...], Pool] = {}
    for start, end in reversed(blocks):
        try:
            text = _table(lines[start], file.parent, pools)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{file}, line {start + 1}: {error}") from error
        newline = "\r\n" if lines[start].endswith("\r\n") else "\n"
        lines[start + 1 : end] = [line + newline for line in text]
    after = "".join(lines)
    if after != before:
        with new_file(file) as aside:
            aside.write_bytes(after.encode("utf-8"))
    return len(blocks)


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from error


def markdown_table(content: Rows) -> list[str]:
    """Return a table as lines of Markdown: the first column to the left, figures to the right."""
    headers, rows = content
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return [f"| {' | '.join(map(_escaped, row))} |" for row in (headers, rule, *rows)]


def _escaped(cell: str) -> str:
    # A name may hold line breaks, a row of a table may not.
    return " ".join(cell.split()).replace("|", "\\|")


def _blocks(lines: Sequence[str], file: Path) -> Iterator[tuple[int, int]]:
    """Yield the numbers of the lines of each marker and its end."""
    fence, start = "", None
    for number, line in enumerate(lines):
        mark = _FENCE.match(line)
        if start is None and mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        if fence:
            continue
        if _START.match(line):
            if start is not None:
                break
            start = number
        elif start is not None and _END.match(line):
            yield start, number
            start = None
    if start is not None:
        raise ValueError(f"{file}, line {start + 1}: the table has no end: add the line `<!-- end -->` where it ends")


def _table(marker: str, folder: Path, pools: dict[tuple[Path, ...], Pool]) -> list[str]:
    options = _options(marker)
    if "records" not in options:
        raise ValueError("the key records is missing: name the file of a study, or the folder of a run")
    paths = tuple(folder / path for path in options.pop("records"))
    name = options.pop("table", "")
    if name not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {shown(name)}")
    takes = list(inspect.signature(TABLES[name]).parameters)[1:]
    for key in options:
        if key not in takes:
            raise ValueError(f"unknown key {shown(key)}: table {name} takes records, table, {', '.join(takes)}")
    if paths not in pools:
        pools[paths] = pool_runs(record for path in paths for record in read_records(path))
    pool = pools[paths]
    note = f"{extent(pool)}. {NOTES[name]}"
    return ["", *markdown_table(TABLES[name](pool, **options)), "", " ".join((note, *pool.remarks)), ""]


def _options(marker: str) -> dict[str, Any]:
    """Return the keys and values of a marker; those that hold several as lists."""
    match = _START.match(marker)
    assert match is not None
    options: dict[str, Any] = {}
    for part in match[1].split(";"):
        key, separator, value = (word.strip() for word in part.partition(":"))
        if not separator or not value or key in options:
            raise ValueError(
                f"cannot read {shown(part.strip())}: expected each key once, as key: value, separated by ;"
            )
        options[key] = [item.strip() for item in value.split(",")] if key in _LISTS else value
    return options


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {refresh_tables(name)} tables refreshed")
