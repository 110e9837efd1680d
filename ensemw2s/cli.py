"""The command line: parses, calls the library, prints."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemw2s import __version__
from ensemw2s.files import is_disk_full

if TYPE_CHECKING:
    from rich.console import Console

PHASE_HELP = {
    "boost": "train the weak baseline and the boosted experts, and save their ensemble",
    "label": "let the single expert and the ensemble answer the unlabelled hard questions",
    "student": "train the students on those answers, and the ceiling on the truth",
    "evaluate": "measure every arm on easy (ID) and hard (OOD) test questions",
}
EXAMPLES = """examples:
  ensemw2s plan examples/reverse_words.yaml
  ensemw2s run examples/reverse_words.yaml
  ensemw2s run examples/reverse_words.yaml --quick
  ensemw2s run examples/reverse_words.yaml boosting.recipe=paper name=as_published
  ensemw2s boost examples/reverse_words.yaml && ensemw2s label run/reverse_words
  ensemw2s report run/reverse_words run/as_published --output both.html
  ensemw2s report run/words_seed_0 run/words_seed_1 run/words_seed_2
  ensemw2s report docs/results/study.jsonl --plot docs/study.svg --markdown README.md
  accelerate launch --num_processes 2 -m ensemw2s run examples/reverse_words.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Read by OpenMP when torch is imported, further down. Threads that wait by spinning slow a busy machine tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parse(arguments)
    try:
        options.command(options)
    except KeyboardInterrupt:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not several:
            _complain(f"interrupted. {_go_on(arguments)}")
        elif os.environ.get("RANK") == "0":
            _complain(f"interrupted, or ended by the launcher because another process failed. {_go_on(arguments)}")
        return 130
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, FloatingPointError, ImportError) as error:
        if os.environ.get("ENSEMW2S_DEBUG"):
            raise
        _explain(error)
        return 2
    except Exception as error:
        if not is_disk_full(error):
            raise
        _complain(f"error: {error}\nWhat was finished is kept: free some space and run the same command again")
        return 2
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops collecting key=value words at the first option; those behind it are meant the same way.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ensemw2s",
        description="Boost weak language-model experts on easy questions, let their ensemble answer hard ones, and "
        "teach a stronger student with the answers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ensemw2s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="everything: boost, label, student, evaluate, report")
    run.set_defaults(command=_run, phases=None)
    for phase, text in PHASE_HELP.items():
        one = commands.add_parser(phase, help=text, description=f"{text[0].upper()}{text[1:]}.")
        one.set_defaults(command=_run, phases=("data", phase) if phase == "boost" else (phase,))
        _add_experiment_arguments(one)
        _add_overwrite(one)
    _add_experiment_arguments(run)
    _add_overwrite(run)

    plan = commands.add_parser(
        "plan", help="estimate what a run will take, phase by phase: tokens, FLOPs, seconds, memory, disk",
        description="Estimate what a run will take on this machine, which is measured for up to a minute. Models that "
        "are not here yet are fetched or made; nothing is written to the run's folder.",
    )  # fmt: skip
    plan.set_defaults(command=_plan)
    _add_experiment_arguments(plan)

    study = commands.add_parser(
        "study", help="an experiment on many tasks with many seeds, in pieces, its figures in one file",
        description="Run the cells (task and seed) of a study that are not in its records yet.",
    )  # fmt: skip
    study.add_argument("config", help="a YAML or JSON file: an experiment's keys, tasks, seeds, comparisons")
    study.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seeds=3 boosting.num_rounds=5")
    study.add_argument("--tasks", help="run the cells of these tasks only: names with commas between them")
    study.add_argument("--records", help="the file of the figures (default: records.jsonl in the study's folder)")
    study.add_argument("--jobs", type=int, default=1, help="cells at the same time, a process each (default: 1)")
    study.add_argument("--minutes", type=float, help="begin no further cell after this time")
    study.set_defaults(command=_study)

    report = commands.add_parser(
        "report", help="write the HTML report of runs or of a study, a plot of its comparisons, tables in Markdown",
        description="Report on runs and studies. Runs with the same settings but for task, questions and seed are "
        "pooled; others stand side by side. The page is written unless --plot is all that is asked of the paths.",
    )  # fmt: skip
    report.add_argument("paths", nargs="*", metavar="PATH", help="folders of runs, or .jsonl files of studies")
    report.add_argument(
        "--output", help="the HTML file (default: report.html in the first run's folder, or beside the first study)"
    )
    report.add_argument("--plot", metavar="FILE", help="draw the comparisons to this .svg or .png file")
    report.add_argument(
        "--markdown", metavar="FILE", help="refresh the tables of this Markdown file, which names its own records"
    )
    report.set_defaults(command=_report)

    env = commands.add_parser("env", help="versions, compiled features, devices: what a bug report needs")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(command=_env)
    return parser


def _add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML or JSON file, or the folder of an earlier run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. boosting.num_rounds=5 seed=1")
    parser.add_argument(
        "--quick", action="store_true", help="the small version that the file's section `quick` describes"
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="delete a run of another configuration in the way")


def _run(options: argparse.Namespace) -> None:
    from ensemw2s import processes
    from ensemw2s.config import load_config
    from ensemw2s.experiment import PHASES, Experiment
    from ensemw2s.tables import results_table

    quiet_libraries()
    console = _console()
    if processes.count() > 1:
        # The launcher ends all processes when one is gone; an interrupt leaves time to say how to go on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = processes.on_main(load_config, options.config, options.overrides, quick=options.quick)
    experiment = Experiment(config, overwrite=options.overwrite, say=_say)
    records = experiment.run(options.phases or PHASES)
    if processes.is_main():
        if options.phases is None or "evaluate" in options.phases:
            console.print(results_table(records))
        console.print(f"results: {experiment.folder / 'results.jsonl'}")
    processes.end()


def _plan(options: argparse.Namespace) -> None:
    from ensemw2s.config import load_config
    from ensemw2s.plan import plan, plan_table

    quiet_libraries()
    _console().print(plan_table(plan(load_config(options.config, options.overrides, quick=options.quick))))


def _study(options: argparse.Namespace) -> None:
    from ensemw2s.study import Study, load_study

    quiet_libraries()
    config = load_study(options.config, options.overrides)
    if options.tasks:
        config = config.with_tasks(options.tasks.split(","))
    study = Study(config, options.records, say=_say)
    study.run(options.jobs, options.minutes)
    print(study.file)


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width of its own; 80 columns would fold the table.
    return Console(width=None if sys.stdout.isatty() else 120)


def _report(options: argparse.Namespace) -> None:
    from ensemw2s.markdown_tables import refresh_tables
    from ensemw2s.report import write_forest_plot, write_report

    if not options.paths and (options.output or options.plot or not options.markdown):
        raise ValueError("report needs a PATH, a run's folder or a study's .jsonl file (--markdown alone needs none)")
    if options.plot:
        write_forest_plot(options.paths, options.plot)
        print(options.plot)
    if options.paths and (options.output or not options.plot):
        output = options.output or _default_page(Path(options.paths[0]))
        write_report(options.paths, output)
        print(output)
    if options.markdown:
        count = refresh_tables(options.markdown)
        print(f"{options.markdown}: {count} table{'' if count == 1 else 's'} refreshed")


def _default_page(path: Path) -> Path:
    return path.with_suffix(".html") if path.suffix == ".jsonl" else path / "report.html"


def _env(options: argparse.Namespace) -> None:
    from ensemw2s.experiment import environment

    facts = environment()
    del facts["kind"]
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        rows: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for key, item in rows.items():
            print(f"{f'{name} {key}'.strip():<32} {item}")


def quiet_libraries() -> None:
    """Silence what transformers and datasets print beside our own messages."""
    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _say(line: str) -> None:
    from tqdm.auto import tqdm

    # Written above a progress bar that may be on the screen.
    tqdm.write(line)


def _go_on(arguments: Sequence[str]) -> str:
    return f"What was finished is kept; go on with the same command:\n  ensemw2s {' '.join(arguments)}"


def _explain(error: Exception) -> None:
    """Say what went wrong, once: not on a process that failed because the main one did."""
    from ensemw2s import processes

    place = f"process {processes.index()} of {processes.count()}: " if processes.count() > 1 else ""
    if processes.is_lost_contact(error):
        _complain(
            f"{place}another process is gone or does not answer ({error}). Its own message, if it had time for one, is "
            "above; the kernel's log tells of a lack of memory. What was finished is kept: run the same command again, "
            "with any number of processes"
        )
    elif not isinstance(error, processes.MainProcessError):
        _complain(f"{place}error: {error}")


def _complain(message: str) -> None:
    print(message, file=sys.stderr)
