"""The command line: help, exit codes, messages."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ensemw2s.cli import EXAMPLES, main
from ensemw2s.experiments import experiment
from ensemw2s.ops import available_backends
from ensemw2s.runtime import processes
from ensemw2s.runtime.files import write_json_lines
from tests.experiments.test_experiment import settings
from tests.many_runs import study_records
from tests.running import wait_for_files


def write(folder: Path, values: dict[str, object]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("arguments", [[], ["plan"], ["run"], ["boost"], ["report"], ["env"]])
def test_help_is_there_for_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    assert "usage: ensemw2s" in capsys.readouterr().out


def test_env_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["backends"]) == set(available_backends())
    assert set(facts["versions"]) >= {"torch", "transformers", "ensemw2s"}
    assert main(["env"]) == 0
    assert "backends mixture_sample" in capsys.readouterr().out


def test_a_misspelt_key_is_named_with_the_nearest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, settings(tmp_path))
    assert main(["run", config, "boosting.num_ronds=2"]) == 2
    assert "unknown key boosting.num_ronds: did you mean boosting.num_rounds?" in capsys.readouterr().err


def test_overrides_may_stand_before_and_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, settings(tmp_path))
    assert main(["run", config, "boosting.num_rounds=2", "--overwrite", "boosting.prior=7"]) == 2
    assert "prior must be" in capsys.readouterr().err
    for words in (["--overwritten"], ["stray"]):
        with pytest.raises(SystemExit) as stop:
            main(["run", config, "--overwrite", *words])
        assert stop.value.code == 2


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["run", "a.yaml", "--seed", "1"], "seed=1"),
        (["run", "--seed", "1", "a.yaml"], "seed=1"),
        (["plan", "a.yaml", "--output-dir=there", "--seed"], "output_dir=there seed=VALUE"),
        (["study", "a.yaml", "--seeds", "3"], "seeds=3"),
        (["run", "a.yaml", "--boosting.num_rounds", "5"], "boosting.num_rounds=5"),
        (
            ["run", "a.yaml", "--num_rounds=5", "--max-new-tokens", "8"],
            "boosting.num_rounds=5 labelling.max_new_tokens=8",
        ),
        (["boost", "a.yaml", "--learning-rate", "1e-3"], "boosting.learning_rate=1e-3 or student.learning_rate=1e-3"),
    ],
)
def test_a_setting_that_is_written_as_an_option_is_told_from_one(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith(f". Settings of the configuration are given without dashes, as KEY=VALUE: {meant}")


@pytest.mark.parametrize(
    "words", [["run", "a.yaml", "--sed", "1"], ["run", "a.yaml", "--seeds"], ["env", "--seed", "1"]]
)
def test_other_options_are_refused_without_that_hint(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "unrecognized arguments" in (said := capsys.readouterr().err) and "KEY=VALUE" not in said


def test_the_page_on_the_command_line_has_every_exit_code() -> None:
    codes = re.findall(r"(?:^  |; )([0-9]+) ", EXAMPLES.partition("exit codes:")[2], flags=re.MULTILINE)
    page = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
    assert codes == ["0", "1", "2", "130", "141"]
    assert re.findall(r"^\| ([0-9]+) \|", page.read_text(), flags=re.MULTILINE) == codes


def test_a_phase_alone_needs_the_ones_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", write(tmp_path, settings(tmp_path))]) == 2
    assert "run boost first" in capsys.readouterr().err


def test_a_study_is_reported_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "pair.jsonl"
    write_json_lines(study, study_records(seeds=2, n=10))
    assert main(["report", str(study)]) == 0
    assert (tmp_path / "pair.html").exists()
    folder = tmp_path / "my_study"
    folder.mkdir()
    shutil.copy(study, folder / "records.jsonl")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == (tmp_path / "pair.html").read_text()
    assert main(["report", str(study), "--plot", str(tmp_path / "a.svg")]) == 0
    assert main(["report", str(study), "--plot", str(tmp_path / "a.svg"), "--output", str(tmp_path / "b.html")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"pair.jsonl", "pair.html", "my_study", "a.svg", "b.html"}
    assert capsys.readouterr().out.split("\n") == [
        str(tmp_path / "pair.html"), str(folder / "report.html"), str(tmp_path / "a.svg"), str(tmp_path / "a.svg"),
        str(tmp_path / "b.html"), "",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["--plot", "a.svg"], ["--output", "a.html"]])
def test_a_report_of_nothing_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", *words])
    assert stop.value.code == 2
    assert "the following arguments are required: PATH" in capsys.readouterr().err


def test_a_full_disk_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiment.Experiment, "run", fail)
    assert main(["run", write(tmp_path, settings(tmp_path))]) == 2
    assert "free some space and run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (processes.MainProcessError("the main process failed: ValueError: x"), ""),
        (FloatingPointError("NaN in row 3"), "process 1 of 2: error: NaN in row 3\n"),
        (RuntimeError("pair.cc:547] Connection closed by peer"), "process 1 of 2: another process is gone or does not"),
    ],
)
def test_one_of_several_processes_says_what_the_main_one_does_not(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        # Only now is this the second of two: before, it would wait for the first.
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "index", lambda: 1)
        raise error

    monkeypatch.setattr(experiment.Experiment, "run", fail)
    assert main(["run", write(tmp_path, settings(tmp_path))]) == 2
    text = capsys.readouterr().err
    assert text.startswith(said) and bool(text) == bool(said)
    assert ("run the same command again, with any number of processes" in text) == ("peer" in str(error))


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    values = settings(tmp_path)
    # Many rounds, so that a busy machine cannot finish them before the signal comes.
    values["boosting"] = values["boosting"] | {"num_rounds": 4}
    config = write(tmp_path, values)
    command = [sys.executable, "-m", "ensemw2s", "run", config]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that starts this suite in the background lets it, and what it starts, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    single = tmp_path / "run/small/ensembles/single_expert/boosting/rounds/1/attempt-1/expert/adapter_model.safetensors"
    wait_for_files(running, single)
    for _ in range(10):
        running.send_signal(signal.SIGINT)
        # Python forgets an interrupt that comes within a destructor; whoever sits there presses the keys again.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, errors = running.communicate(timeout=15)
            break
    assert running.returncode == 130, errors
    assert f"go on with the same command:\n  ensemw2s run {config}" in errors
    before = single.stat().st_mtime_ns
    assert main(["run", config]) == 0
    assert single.stat().st_mtime_ns == before
    assert (tmp_path / "run" / "small" / "report.html").exists()


def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException) -> int:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(experiment.Experiment, "run", fail)
    return main(["run", write(tmp_path, settings(tmp_path))])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "error: /a/b: Permission denied. This user may not",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "error: /a: Read-only file system. This disk can only"),
        (OSError(errno.EFBIG, "File too large"), "error: File too large. No file may grow so large here"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "error: x: File name too long. File systems take"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "error: x: Is a directory. A folder is where a file"),
        (
            FileExistsError(errno.EEXIST, "File exists", "x"),
            "error: x: File exists. A file is where a folder should be",
        ),
        (MemoryError(), "error: there is not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "error: something in the input is nested too deeply"),
        (yaml.YAMLError("bad"), "error: bad"),
        (ValueError(), "error: ValueError"),
        (ValueError("a\x1b[31mb\u202e"), "error: a\\x1b[31mb\\u202e\n"),
    ],
)
def test_errors_become_sentences(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(monkeypatch, tmp_path, error) == 2
    assert said in capsys.readouterr().err


def test_a_message_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(monkeypatch, tmp_path, ValueError("x" * 10**6)) == 2
    assert len(capsys.readouterr().err) < 2100


def test_an_unexpected_error_asks_for_a_report_and_shows_its_traceback_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(monkeypatch, tmp_path, KeyError("lost")) == 1
    said = capsys.readouterr().err
    assert "unexpected error, a fault of ensemw2s: KeyError: 'lost'. Please report it" in said
    assert "ENSEMW2S_DEBUG=1" in said and said.count("\n") == 1
    monkeypatch.setenv("ENSEMW2S_DEBUG", "1")
    with pytest.raises(KeyError, match="lost"):
        failing(monkeypatch, tmp_path, KeyError("lost"))


def test_a_reader_that_goes_away_ends_the_command_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failing(monkeypatch, tmp_path, BrokenPipeError(errno.EPIPE, "Broken pipe")) == 141
    assert capfd.readouterr().err == ""
