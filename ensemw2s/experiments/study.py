"""A study: one experiment on many tasks with many seeds, run in pieces, its figures kept in one file.

Each pair of a task and a seed is a *cell*: an `Experiment` in a folder of its own. What a cell measured goes into the
study's records, one JSON object per line, from which `ensemw2s report` makes tables and plots. Cells that are in the
records are not run again, whether their folders are still there or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ensemw2s.experiments.config import ExperimentConfig, build_config, check_folder_name, merge_settings, read_settings
from ensemw2s.experiments.questions import easy_and_hard, levels_records, splits_of
from ensemw2s.runtime.accounts import enter_growing, is_ours
from ensemw2s.runtime.claims import InUseError, Kind, claim_shared, held_file
from ensemw2s.runtime.files import DiskFullError, read_json_lines, write_json_lines
from ensemw2s.runtime.fingerprint import digest_json
from ensemw2s.runtime.records import (
    STUDY_FILE,
    TEST_SPLITS,
    AnswersRecord,
    ArmRecord,
    CellRecord,
    ConfidencesRecord,
    CostRecord,
    EnvironmentRecord,
    LabelsRecord,
    LevelsRecord,
    MixtureRecord,
    PgrRecord,
    PhaseRecord,
    RelabelRecord,
    RoundRecord,
    StudyRecord,
)
from ensemw2s.runtime.values import check_number, shown, shown_names

# What a study keeps of a cell's records: kind -> fields, None for all. Of the rounds it keeps a summary, a kind of its
# own: tables of rounds are for the report of one run.
KEPT: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys((kind.kind for kind in (
        ArmRecord, AnswersRecord, PgrRecord, CostRecord, LabelsRecord, RelabelRecord, LevelsRecord, ConfidencesRecord,
    )), None),
    MixtureRecord.kind: ("arm", "num_experts", "expert_weights"),
    RoundRecord.kind: (
        "arm", "round", "attempt", "error", "prior_error", "expert_weight", "accepted", "effective_sample_size",
        "num_units", "shrinkage", "train_tokens", "generation", "chain",
    ),
}  # fmt: skip
_KIND = Kind("study", "a study", files=("*.log",), setting="name or output_dir")
_ROUND_SUMMARY = "round_summary"
# A cell's questions are its own: generators start from another seed in each.
_SEED_STEP = 1000
# What every cell has of its own, so that a study has no such key.
_OF_CELLS = ("seed", "task")
_MOST_SEEDS = 10_000
# What the next cell would meet as well.
_END_THE_STUDY = (DiskFullError, InUseError, MemoryError, BrokenProcessPool)


@dataclass(frozen=True)
class StudyConfig:
    """What a study does.

    Attributes:
        settings: of the experiment, as in its own file, without `data` where tasks bring theirs.
        tasks: the tasks, by name: settings that replace those of the experiment.
        seeds: of the cells of each task.
        comparisons: pairs of arms whose difference is what the study is for, declared before it is run.
        primary_split: "id" or "ood": the split on which they are judged.
    """

    settings: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    comparisons: tuple[tuple[str, str], ...] = ()
    primary_split: str = "ood"

    @property
    def name(self) -> str:
        """Return the study's name."""
        return str(self.settings["name"])

    def with_tasks(self, names: Sequence[str]) -> StudyConfig:
        """Return the study of these tasks alone; a name that is none of the tasks raises ValueError."""
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise ValueError(f"{shown(unknown[0])} is none of the study's tasks {shown_names(self.tasks)}")
        return dataclasses.replace(self, tasks={name: self.tasks[name] for name in names})

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, all tasks with one seed before any with the next."""
        for seed in self.seeds:
            for task in self.tasks:
                yield Cell(task, seed, self._experiment(task, seed))

    def _experiment(self, task: str, seed: int) -> ExperimentConfig:
        settings = merge_settings(self.settings, self.tasks[task])
        folder = str(Path(str(settings.get("output_dir", "run"))) / self.name)
        own = {"name": f"{task}-{seed}", "task": task, "seed": seed, "output_dir": folder,
               "store": settings.get("store") or str(Path(folder) / "store")}  # fmt: skip
        for source in ("easy", "hard"):
            sources = settings.get("data", {})
            if isinstance(sources, Mapping) and isinstance(sources.get(source), Mapping) and "seed" in sources[source]:
                first = sources[source]["seed"]
                if type(first) is not int:
                    raise ValueError(f"data.{source}.seed must be a whole number, got {shown(first)}")
                shifted = first + _SEED_STEP * seed
                own = merge_settings(own, {"data": {source: {**sources[source], "seed": shifted}}})
        return build_config(merge_settings(settings, own))


@dataclass(frozen=True)
class Cell:
    """One task with one seed."""

    task: str
    seed: int
    config: ExperimentConfig

    @property
    def key(self) -> str:
        """Return a hash of what decides the cell's results, as levels do not."""
        settings = self.config.results_key()
        settings["data"].pop("level", None)
        return digest_json(settings, 8)


class CellError(RuntimeError):
    """Cells of a study failed; the others were run."""


class Study:
    """Run a study's cells and keep their figures in `records` (None: `records.jsonl` in the study's folder).

    `say` is called with each line meant for the reader.
    """

    def __init__(
        self,
        config: StudyConfig,
        records: str | os.PathLike[str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config = config
        self.cells = list(config.cells())
        self.file = Path(records) if records is not None else self.cells[0].config.folder.parent / STUDY_FILE
        self.say = say

    def missing(self) -> list[Cell]:
        """Return the cells whose figures are not in the records, or are those of another configuration.

        Records of a cell that are gone or changed raise ValueError, which names the file and the cell.
        """
        records = self._records()
        self._check_whole(records)
        kept = _kept_keys(records)
        return [cell for cell in self.cells if kept.get((cell.task, cell.seed)) != cell.key]

    def _require_same_settings(self) -> None:
        kept = _kept_keys(self._records())
        others = [cell for cell in self.cells if kept.get((cell.task, cell.seed), cell.key) != cell.key]
        if others:
            raise ValueError(
                f"{self.file} holds {len(others)} of the cells as they were measured with other settings, the first of "
                f"them {others[0].task}, seed {others[0].seed}. Give the study of the changed settings another name "
                "(or other records), or pass --overwrite to replace what was measured"
            )

    def run(self, jobs: int = 1, minutes: float | None = None, overwrite: bool = False) -> None:
        """Run the missing cells, `jobs` at a time, and add each to the records as soon as it is finished.

        With more than one job each cell has a process of its own; after `minutes` no cell is begun (None runs all).
        With `overwrite`, what cells measured or left with other settings is replaced.

        A cell that fails does not keep the others from being run.

        Raises:
            ValueError: the records hold cells that were measured with other settings; names one.
            CellError: cells failed; names each, and why. What they left is kept for the next call.
            InUseError: another process adds to the records, or works in a cell's folder; no further cell is begun.
            DiskFullError, MemoryError, BrokenProcessPool: likewise, since the next cell would meet the same.
        """
        check_number("jobs", jobs, whole=True)
        if minutes is not None:
            check_number("minutes", minutes)
        # What is no file of records is refused before anything is written.
        self._records()
        claim_shared(self.cells[0].config.folder.parent, _KIND)
        with held_file(self.file):
            end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
            waiting = self.missing()
            if not overwrite:
                self._require_same_settings()
            done = len(self.cells) - len(waiting)
            self.say(f"{self.config.name}: {done} of {len(self.cells)} cells are in {self.file}")
            self._add_levels()
            failed: list[str] = []
            if jobs == 1:
                while waiting and time.monotonic() < end:
                    cell = waiting.pop(0)
                    self._add(cell, partial(_run_cell, cell, overwrite), failed)
            else:
                self._run_side_by_side(waiting, jobs, end, failed, overwrite)
            if waiting:
                self.say(f"{len(waiting)} cells are left: the same command goes on with them")
            if failed:
                raise CellError(
                    f"{len(failed)} of {len(self.cells)} cells failed, and the same command runs them again. "
                    + "; ".join(failed)
                )

    def _run_side_by_side(self, waiting: list[Cell], jobs: int, end: float, failed: list[str], overwrite: bool) -> None:
        """Take cells from `waiting` until `end`, `jobs` at a time; `failed` is told of those that fail."""
        context = multiprocessing.get_context("spawn")
        running: dict[Any, Cell] = {}
        with ProcessPoolExecutor(min(jobs, len(waiting) or 1), mp_context=context, initializer=_start_worker) as pool:
            while running or (waiting and time.monotonic() < end):
                while waiting and len(running) < jobs and time.monotonic() < end:
                    cell = waiting.pop(0)
                    running[pool.submit(_run_cell, cell, overwrite)] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._add(running.pop(future), future.result, failed)

    def _add(self, cell: Cell, result: Callable[[], list[dict[str, Any]]], failed: list[str]) -> None:
        """Add the records that `result` returns, or the cell's failure to `failed`."""
        try:
            records = result()
        except _END_THE_STUDY:
            raise
        except Exception as error:
            kind = "" if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: "
            failed.append(f"{cell.task}, seed {cell.seed}: {kind}{error}")
            self.say(f"{cell.task}, seed {cell.seed}, failed: {_log_of(cell)} says where")
            return
        others = [row for row in self._records() if not _is_of(row, cell)]
        rows = [row for row in others if row["kind"] not in (StudyRecord.kind, EnvironmentRecord.kind)]
        environment = [record for record in records if record["kind"] == EnvironmentRecord.kind]
        comparisons = [list(pair) for pair in self.config.comparisons]
        header = StudyRecord(name=self.config.name, primary_split=self.config.primary_split, comparisons=comparisons)
        write_json_lines(self.file, [header.to_json(), *environment, *rows, *_kept(cell, records)])
        seconds = sum(record["seconds"] for record in records if record["kind"] == PhaseRecord.kind)
        self.say(f"{cell.task}, seed {cell.seed}: {seconds:.0f} s")

    def _add_levels(self) -> None:
        """Record the levels of the questions of cells that were measured before the configuration knew levels."""
        records = self._records()
        kept = _kept_keys(records)
        rules = {(row["task"], row["seed"]): row.get("rule") for row in records if row["kind"] == LevelsRecord.kind}
        lacking = [
            cell
            for cell in self.cells
            if kept.get((cell.task, cell.seed)) == cell.key
            and cell.config.data.level is not None
            and cell.config.data.level.rule != rules.get((cell.task, cell.seed))
        ]
        for cell in lacking:
            records = _with_levels(records, cell)
        if lacking:
            write_json_lines(self.file, records)
            self.say(f"the levels of the questions of {len(lacking)} cells were added")

    def _records(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        rows = read_json_lines(self.file, "Bring back the file as it was, or delete the line")
        if not all(isinstance(row.get("kind"), str) for row in rows):
            raise ValueError(
                f'{self.file} is no file of a study\'s records: expected a text field "kind" in every line'
            )
        return rows

    def _check_whole(self, records: Sequence[Mapping[str, Any]]) -> None:
        for cell in (row for row in records if row["kind"] == CellRecord.kind and "records" in row):
            place = (cell["task"], cell["seed"])
            rows = [r for r in records if r is not cell and (r.get("task"), r.get("seed")) == place]
            if digest_json(rows, 8) != cell["records"]:
                raise ValueError(
                    f"{self.file}: the records of {cell['task']}, seed {cell['seed']}, are not those that were "
                    "measured: some are gone or changed. Bring them back, or delete the line of kind cell, and it is "
                    "run again"
                )


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study from a YAML or JSON file.

    It holds the keys of an experiment and, beside them, `tasks` (name -> keys that replace those of the experiment),
    `seeds` (a number of seeds, from 0 on, or a list), and what is declared beforehand: `comparisons` (pairs of arms)
    and `primary_split`. A `seed` or a `task` of its `base`, an experiment, does not count: the cells have their own.
    Overrides are "dotted.key=value" each, e.g. "seeds=3".

    Raises:
        FileNotFoundError: no such file.
        ValueError: unparsable text, no tasks or seeds, an arm in a comparison that no cell has, or whatever
            `config.build_config` refuses in a cell.
    """
    settings = read_settings(path, overrides, not_inherited=_OF_CELLS)
    settings.pop("quick", None)
    tasks, seeds = settings.pop("tasks", None), settings.pop("seeds", None)
    comparisons, split = settings.pop("comparisons", []), settings.pop("primary_split", "ood")
    if not isinstance(tasks, Mapping) or not tasks or not all(isinstance(task, Mapping) for task in tasks.values()):
        alone = ""
        if tasks is None:
            alone = " (one experiment over several seeds is `tasks: {any_name: {}}`; with one seed, use `ensemw2s run`)"
        raise ValueError(
            f"{path}: tasks must be a mapping of names to settings of an experiment, got {shown(tasks)}{alone}"
        )
    if not isinstance(split, str) or split not in TEST_SPLITS:
        raise ValueError(f'{path}: primary_split must be "id" or "ood", got {shown(split)}')
    if not isinstance(settings.get("name"), str):
        raise ValueError(f"{path}: name must be a text: it names the study")
    check_folder_name(settings["name"])
    for section, own in {"": settings, **{f"tasks.{task}.": own for task, own in tasks.items()}}.items():
        idle = [key for key in (*_OF_CELLS, *(["name"] if section else ())) if own.get(key) is not None]
        if idle:
            raise ValueError(
                f"{path}: {section}{idle[0]} does nothing in a study, whose cells have names, tasks and seeds of their "
                "own (keys `tasks` and `seeds`): leave it out"
            )
    study = StudyConfig(settings, dict(tasks), _seeds(path, seeds), _pairs(path, comparisons), split)
    for cell in study.cells():
        derived = ["zero_shot_weak", "zero_shot_strong", "best_expert", "majority_vote", "uniform_average"]
        arms = [*derived, *cell.config.expert_arms(), *cell.config.students]
        unknown = [arm for pair in study.comparisons for arm in pair if arm not in arms]
        if unknown:
            raise ValueError(f"{path}: comparisons name {unknown[0]:.100}, which is none of the arms {', '.join(arms)}")
    return study


def _kept_keys(records: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, Any], Any]:
    """Return the keys of the cells in the records, by task and seed."""
    return {(r.get("task"), r.get("seed")): r.get("key") for r in records if r["kind"] == CellRecord.kind}


def _seeds(path: str | os.PathLike[str], seeds: Any) -> tuple[int, ...]:
    numbers = range(min(seeds, _MOST_SEEDS + 1)) if type(seeds) is int else seeds
    good = isinstance(numbers, list | range) and all(type(seed) is int and seed >= 0 for seed in numbers)
    if not good or not 1 <= len(numbers) <= _MOST_SEEDS or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{path}: seeds must be a number of seeds, or a list of different whole numbers, 1 to {_MOST_SEEDS} of "
            f"them; got {shown(seeds)}"
        )
    return tuple(numbers)


def _pairs(path: str | os.PathLike[str], comparisons: Any) -> tuple[tuple[str, str], ...]:
    good = isinstance(comparisons, list) and all(
        isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1] for pair in comparisons
    )
    if not good:
        raise ValueError(f"{path}: comparisons must be a list of pairs of different arms, got {shown(comparisons)}")
    return tuple((str(first), str(second)) for first, second in comparisons)


def _kept(cell: Cell, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    place = {"task": cell.task, "seed": cell.seed}
    rows: list[dict[str, Any]] = []
    for record in (record for record in records if record["kind"] in KEPT):
        chosen = {name: record[name] for name in KEPT[record["kind"]] or record if name in record}
        kind = _ROUND_SUMMARY if record["kind"] == RoundRecord.kind else record["kind"]
        rows.append({**chosen, "kind": kind, **place})
    return [CellRecord(task=cell.task, seed=cell.seed, key=cell.key, records=digest_json(rows, 8)).to_json(), *rows]


def _with_levels(records: Sequence[dict[str, Any]], cell: Cell) -> list[dict[str, Any]]:
    """Return the records with the levels of a cell's questions, which are taken from their sources once more."""
    data = cell.config.data
    if data.questions is not None:
        raise ValueError(
            f"{cell.task}, seed {cell.seed}, was measured without data.level, and which of one source's questions it "
            "asked is known to its own run alone: run it anew with --overwrite, or leave data.level out"
        )
    found = levels_records(data, splits_of(data, *easy_and_hard(data), cell.config.seed))
    asked = {row["split"]: row["questions"] for row in found}
    for row in (row for row in records if row["kind"] == AnswersRecord.kind and _is_of(row, cell)):
        if row["questions"] != asked.get(row["split"], row["questions"]):
            raise ValueError(
                f"{cell.task}, seed {cell.seed}: its sources no longer give the questions that were asked, so that "
                "their levels cannot be told: bring the sources back, or leave data.level out"
            )
    kept = [row for row in records if not (row["kind"] == LevelsRecord.kind and _is_of(row, cell))]
    last = max(index for index, row in enumerate(kept) if _is_of(row, cell))
    kept[last + 1 : last + 1] = [{**row, "task": cell.task, "seed": cell.seed} for row in found]
    own = [row for row in kept if _is_of(row, cell)]
    digest = digest_json([row for row in own if row["kind"] != CellRecord.kind], 8)
    return [
        {**row, "records": digest} if row["kind"] == CellRecord.kind and "records" in row and _is_of(row, cell) else row
        for row in kept
    ]


def _is_of(row: Mapping[str, Any], cell: Cell) -> bool:
    return (row.get("task"), row.get("seed")) == (cell.task, cell.seed)


def _start_worker() -> None:
    from ensemw2s.runtime.console import quiet_libraries

    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave no cell running behind a study that was killed: the next one would run it a second time beside it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _log_of(cell: Cell) -> Path:
    folder = cell.config.folder
    return folder.with_name(f"{folder.name}.log")


def _run_cell(cell: Cell, overwrite: bool) -> list[dict[str, Any]]:
    from ensemw2s.experiments.experiment import Experiment
    from ensemw2s.experiments.folder import PHASES

    log_file = _log_of(cell)
    if log_file.exists() and not is_ours(log_file):
        raise ValueError(f"{log_file} is no log of this study, which would overwrite it: move it away")
    enter_growing(log_file)
    with log_file.open("w") as log, contextlib.redirect_stderr(log):
        try:
            experiment = Experiment(cell.config, overwrite=overwrite, say=lambda line: print(line, file=log))
            # A study has a report of its own.
            return experiment.run(tuple(phase for phase in PHASES if phase != "report"))
        except Exception:
            traceback.print_exc(file=log)
            raise
