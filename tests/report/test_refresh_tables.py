"""Tables in Markdown files: what is replaced, what is left alone, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from docs.refresh_tables import markdown_table, refresh_tables
from ensemw2s.report.page import tables
from ensemw2s.runtime.files import write_json_lines
from tests.many_runs import pool_of, study_records

MARKER = "<!-- records: results/small_pair.jsonl; table: {} -->"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_json_lines(folder / "results" / "small_pair.jsonl", study_records(n=40))
    return folder


def refreshed(folder: Path, text: str) -> str:
    file = folder / "page.md"
    file.write_bytes(text.encode())
    refresh_tables(file)
    return file.read_bytes().decode()


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_stands_between_its_marker_and_its_end(folder: Path, name: str) -> None:
    marker = MARKER.format(name)
    before = f"# Title\n\n{marker}\nold\n\n| old |\n<!-- end -->\n\ntext after\u2028it"
    after = refreshed(folder, before)
    start, inside, end = (
        f"# Title\n\n{marker}\n",
        after[len(f"# Title\n\n{marker}\n") :],
        "<!-- end -->\n\ntext after\u2028it",
    )
    assert after.startswith(start) and after.endswith(end)
    lines = inside[: -len(end)].split("\n")
    headers, rows = tables.TABLES[name](pool_of(study_records(n=40)))
    table = [line for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == headers
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]] == rows
    # GitHub needs an empty line between a comment and a table.
    assert lines[0] == "" and lines[1] == table[0]
    assert "3 tasks × 3 seeds × 40 ID and 40 OOD questions. " in inside
    assert "old" not in inside[: -len(end)]


def test_a_second_time_changes_nothing_and_writes_nothing(folder: Path) -> None:
    file = folder / "twice.md"
    file.write_text(f"{MARKER.format('differences')}\n<!-- end -->\n{MARKER.format('pgr')}\n<!-- end -->\n")
    assert refresh_tables(file) == 2
    once = file.read_bytes()
    os.utime(file, ns=(0, 0))
    assert refresh_tables(file) == 2
    assert file.read_bytes() == once
    assert file.stat().st_mtime_ns == 0


def test_options_reach_the_table(folder: Path) -> None:
    after = refreshed(
        folder,
        "<!-- records: results/small_pair.jsonl; table: ablation; reference: paper; arms: ensemble, ceiling -->\n"
        "<!-- end -->\n",
    )
    assert "| Arm, minus recipe as published |" in after
    assert [line.split(" |")[0] for line in after.split("\n") if line.startswith("|")][2:] == [
        "| Ensemble", "| Ceiling: taught by truth",
    ]  # fmt: skip
    after = refreshed(folder, f"{MARKER.format('by_task; split: id')}\n<!-- end -->\n")
    assert "| Arm, ID in % | reversal | sorting | sums |" in after


def test_several_files_are_pooled(folder: Path) -> None:
    records = study_records(n=40)
    for name, tasks in (("one", ("sums",)), ("two", ("reversal", "sorting"))):
        write_json_lines(folder / f"{name}.jsonl", [r for r in records if r.get("task", tasks[0]) in tasks])
    whole, parts = (
        refreshed(folder, f"<!-- table: differences; records: {names} -->\n<!-- end -->\n").partition("\n")[2]
        for names in ("results/small_pair.jsonl", "one.jsonl, two.jsonl")
    )
    assert whole == parts


def test_what_was_left_out_is_said_below_the_table(folder: Path) -> None:
    records = [r for r in study_records(n=40) if (r.get("arm"), r.get("task"), r.get("seed")) != ("paper", "sums", 1)]
    write_json_lines(folder / "holes.jsonl", records)
    after = refreshed(folder, "<!-- records: holes.jsonl; table: accuracies -->\n<!-- end -->\n")
    assert "Left out of task sums: paper, which was not measured with seed 1." in after


def test_windows_line_ends_stay(folder: Path) -> None:
    after = refreshed(folder, f"a\r\n{MARKER.format('accuracies')}\r\n<!-- end -->\r\nb\r\n")
    assert after.count("\n") == after.count("\r\n") > 5


def test_markers_in_code_are_no_markers(folder: Path) -> None:
    code = f"```\n{MARKER.format('nothing')}\n<!-- end -->\n```\n~~~~\n```\n{MARKER.format('nothing')}\n~~~~\n"
    real = f"{MARKER.format('accuracies')}\n<!-- end -->\n"
    after = refreshed(folder, f"{code}{real}<!-- end -->\n")
    assert after.startswith(code)
    assert "| Arm |" in after


def test_bars_in_cells_are_escaped() -> None:
    assert markdown_table((["a|b", "c"], [["d", "e|f"]])) == ["| a\\|b | c |", "| --- | ---: |", "| d | e\\|f |"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker\n", r"page\.md holds no table: mark one by a line `<!-- records: FILE; table: NAME -->`"),
        ("\n<!-- records: x; table: pgr -->\n", r"page\.md, line 2: the table has no end: add the line `<!-- end -->`"),
        ("<!-- records: x; table: pgr -->\n<!-- records: y -->\n<!-- end -->\n", "line 1: the table has no end"),
        ("<!-- records: results/small_pair.jsonl; table: tables -->\n<!-- end -->\n",
         "line 1: table must be one of accuracies, by_task, .*, got 'tables'"),
        ("<!-- records: results/small_pair.jsonl -->\n<!-- end -->\n", "line 1: table must be one of .*, got ''"),
        ("<!-- records: results/small_pair.jsonl; table: pgr; reference: paper -->\n<!-- end -->\n",
         "line 1: unknown key 'reference': table pgr takes records, table, arms"),
        ("<!-- records: results/small_pair.jsonl; table: pgr; arms: papre -->\n<!-- end -->\n",
         "line 1: no task measured arm 'papre'"),
        ("<!-- records: results/small_pair.jsonl; table: pgr; arms -->\n<!-- end -->\n",
         "line 1: cannot read 'arms': expected each key once, as key: value, separated by ;"),
        ("<!-- records: a; records: b; table: pgr -->\n<!-- end -->\n", "cannot read 'records: b': expected each key"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_named_with_its_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refreshed(folder, text)
    assert (folder / "page.md").read_text() == text, "the file is as it was"


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"page\.md, line 1: .*gone\.jsonl does not exist: give the folder of"):
        refreshed(folder, "<!-- records: gone.jsonl; table: pgr -->\n<!-- end -->\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.md does not exist: give the Markdown file"):
        refresh_tables(folder / "nowhere.md")
